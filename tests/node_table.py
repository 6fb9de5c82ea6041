"""ComfyUI's own nodes by table: what each takes, values for it, and what it gives.

A node is called as ComfyUI's executor calls it, with its defaults and a value for each socket made by its type; sizes
and lengths are made small. New nodes of a newer ComfyUI need nothing here, unless they take a new type.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from twins import LATENT, latent, low_rank, run_node, text

WATCHED = frozenset(
    ("MODEL", "CLIP", "CONDITIONING", "LATENT", "SIGMAS", "SAMPLER", "GUIDER", "NOISE", "HOOKS", "HOOK_KEYFRAMES")
)
"""Types whose nodes are in the table."""
NOT_BUILT = {
    "CLIP_VISION": "a published model's file",
    "GLIGEN": "a published model's file",
    "LATENT_UPSCALE_MODEL": "a published model's file",
    "MODEL_PATCH": "a published model's file",
    "OPTICAL_FLOW": "a published model's file",
    "PHOTOMAKER": "a published model's file",
}
"""{type of a socket: what it would take}. A node that requires one is left out."""
WRITES, COMPILES, ASKS_FILE = "writes files or shows them", "compiles", "chooses a file of a kind that is not here"
NO_NODES = {
    "nodes_glsl.py": "shades pictures, with a package that only the newest ComfyUI asks for",
    "nodes_replacements.py": "tells a running server which nodes took the place of others",
}
"""{file of ComfyUI that may fail to import: what it is for}."""
SIDE = 64
"""Pixels of a side of a picture, at least."""
STEPS = 2


class NotBuiltError(Exception):
    """A node is left out; the message is a key of NOT_BUILT or one of the reasons above."""


@dataclass(frozen=True)
class Slot:
    """An input of a node. `type`: COMBO also for ComfyUI's old form of a list."""

    name: str
    type: str
    options: Mapping[str, Any]
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS or self.type in ("COMFY_DYNAMICCOMBO_V3",) or "default" in self.options


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def all_nodes() -> dict[str, type]:
    """{id: class} of ComfyUI's own nodes, those of services of others left out. Raises if a file cannot be imported."""
    import nodes

    failed = asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    assert {*failed} <= NO_NODES.keys(), f"ComfyUI could not import {failed}"
    own = ("nodes", "comfy_extras.")
    return {
        name: node
        for name, node in nodes.NODE_CLASS_MAPPINGS.items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", "nodes").startswith(own) and not getattr(node, "API_NODE", False)
    }


def slots_of(inputs: Mapping[str, Mapping]) -> Iterator[Slot]:
    """The inputs of what a node's INPUT_TYPES gives, or of an option of a dynamic one."""
    for part in ("required", "optional"):
        for name, spec in (inputs.get(part) or {}).items():
            kind, options = spec[0], dict(spec[1]) if len(spec) > 1 and spec[1] else {}
            if not isinstance(kind, str):
                kind, options = "COMBO", {**options, "options": list(kind)}
            yield Slot(name, str(getattr(kind, "value", kind)), options, part == "optional")


def types_of(node: type) -> tuple[set[str], list[str]]:
    """(types of the inputs, types of the outputs in their order)."""
    taken: set[str] = set()
    for slot in slots_of(node.INPUT_TYPES()):
        for found in (slot, *_inside(slot)):
            taken.update(found.type.split(","))
    return taken, [str(getattr(kind, "value", kind)) for kind in node.RETURN_TYPES if isinstance(kind, str)]


def _inside(slot: Slot) -> Iterator[Slot]:
    """The inputs of which a dynamic input is made."""
    if slot.type == "COMFY_AUTOGROW_V3":
        yield from slots_of(slot.options["template"]["input"])
    if slot.type == "COMFY_DYNAMICCOMBO_V3":
        for option in slot.options["options"]:
            for inner in slots_of(option["inputs"]):
                yield from (inner, *_inside(inner))


def reason_left_out(name: str, node: type) -> str | None:
    """Why a node is not called, whatever its inputs are."""
    if getattr(node, "OUTPUT_NODE", False):
        return WRITES
    return COMPILES if "torch_compile" in getattr(node, "RELATIVE_PYTHON_MODULE", "") else None


@dataclass(eq=False)
class Side:
    """What the nodes of one side of the comparison work on: everything packed, or everything dense.

    model, other: MODELs of different weights. clip: CLIP. vae: VAE. lora: name of a file in models/loras.
    """

    model: Any
    other: Any
    clip: Any
    vae: Any
    lora: str
    width: int
    made: Counter = field(default_factory=Counter)

    def text(self, seed: int = 1) -> list:
        """A CONDITIONING of the width that the models read, with a picture as reference."""
        states, extra = text(seed, width=self.width)[0]
        reference = torch.randn(1, LATENT[1], 2, 2, generator=torch.Generator().manual_seed(50 + seed))
        return [[states, extra | {"reference_latents": [reference]}]]


@functools.cache
def _control_class() -> type:
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy: torch.Tensor, t: Any, cond: Any, batched_number: int, *rest: Any) -> dict:
            noise = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(7)).to(x_noisy)
            return self.control_merge({"input": [noise], "output": [noise * 0.5]}, None, x_noisy.dtype)

        def copy(self) -> Any:
            made = Control()
            self.copy_to(made)
            return made

    return Control


def _control() -> Any:
    """A CONTROL_NET of no weights: what it adds to each block depends on its strength alone."""
    return _control_class()()


def _seen() -> Any:
    """A CLIP_VISION_OUTPUT."""
    import comfy.clip_vision

    generator = torch.Generator().manual_seed(9)
    seen = comfy.clip_vision.Output()
    seen["last_hidden_state"] = torch.randn(1, 9, 64, generator=generator)
    seen["penultimate_hidden_states"] = torch.randn(1, 9, 64, generator=generator)
    seen["image_embeds"] = torch.randn(1, 64, generator=generator)
    seen["mm_projected"] = None
    return seen


def _style(side: Side) -> Any:
    """A STYLE_MODEL that reads a CLIP_VISION_OUTPUT as text."""
    import comfy.sd

    return comfy.sd.StyleModel(lambda states: states[:, :3].repeat(1, 1, side.width // states.shape[-1]))


def _keyframes() -> Any:
    first = run_node("comfy_extras.nodes_hooks.CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    return run_node(
        "comfy_extras.nodes_hooks.CreateHookKeyframe", strength_mult=0.3, start_percent=0.4, prev_hook_kf=first
    )


def _picture(number: int) -> torch.Tensor:
    return torch.rand(1, SIDE, SIDE * 3 // 2, 3, generator=torch.Generator().manual_seed(number))


def _mask() -> torch.Tensor:
    mask = torch.zeros(1, SIDE, SIDE * 3 // 2)
    mask[..., SIDE:] = 1
    return mask


CUSTOM = "comfy_extras.nodes_custom_sampler."
BUILT: dict[str, Callable[[Side, int], Any]] = {
    "MODEL": lambda side, number: side.other if number else side.model,
    "CLIP": lambda side, number: side.clip,
    "VAE": lambda side, number: side.vae,
    "CONDITIONING": lambda side, number: side.text(number + 1),
    "LATENT": lambda side, number: latent(20 + number),
    "IMAGE": lambda side, number: _picture(30 + number),
    "MASK": lambda side, number: _mask(),
    "SIGMAS": lambda side, number: torch.linspace(1, 0, STEPS + 1),
    "NOISE": lambda side, number: run_node(f"{CUSTOM}RandomNoise", noise_seed=5 + number),
    "SAMPLER": lambda side, number: run_node(f"{CUSTOM}KSamplerSelect", sampler_name="euler"),
    "GUIDER": lambda side, number: run_node(
        f"{CUSTOM}CFGGuider", model=side.model, positive=side.text(), negative=side.text(2), cfg=2.0
    ),
    "HOOKS": lambda side, number: run_node(
        "comfy_extras.nodes_hooks.CreateHookLora", lora_name=side.lora, strength_model=0.6 - number, strength_clip=0.4
    ),
    "HOOK_KEYFRAMES": lambda side, number: _keyframes(),
    "TIMESTEPS_RANGE": lambda side, number: (0.0, 0.5),
    "CONTROL_NET": lambda side, number: _control(),
    "CLIP_VISION_OUTPUT": lambda side, number: _seen(),
    "STYLE_MODEL": lambda side, number: _style(side),
    "LORA_MODEL": lambda side, number: low_rank({"diffusion_model.double_blocks.0.img_attn.qkv": (384, 128)}),
    "LATENT_OPERATION": lambda side, number: lambda latent, **kwargs: latent * 0.9,
    "AUDIO": lambda side, number: {"waveform": torch.zeros(1, 2, 4410), "sample_rate": 44100},
    "FLOATS": lambda side, number: [1.0, 0.5],
    "*": lambda side, number: 1,
}
"""{type of a socket: (side, how many of the type the node has already) -> a fresh value}."""


def values_for(node: type, side: Side, whole: bool) -> dict[str, Any]:
    """Arguments for a node. whole: its optional sockets are connected too, where a value can be built.

    Raises NotBuiltError.
    """
    side.made.clear()
    values: dict[str, Any] = {}
    for slot in slots_of(node.INPUT_TYPES()):
        if slot.optional and not slot.is_widget and not whole:
            continue
        try:
            values[slot.name] = _value(slot, side)
        except NotBuiltError:
            if not slot.optional:
                raise
    return {name: [value] for name, value in values.items()} if getattr(node, "INPUT_IS_LIST", False) else values


def has_optional_sockets(node: type) -> bool:
    return any(slot.optional and not slot.is_widget for slot in slots_of(node.INPUT_TYPES()))


def _value(slot: Slot, side: Side) -> Any:
    if slot.type == "COMFY_DYNAMICCOMBO_V3":
        option = slot.options["options"][0]
        return {slot.name: option["key"]} | {s.name: _value(s, side) for s in slots_of(option["inputs"])}
    if slot.type == "COMFY_AUTOGROW_V3":
        template = slot.options["template"]
        (inner,) = slots_of(template["input"])
        names = template.get("names") or [f"{template['prefix']}{i}" for i in range(max(2, template["min"]))]
        return {name: _value(inner, side) for name in names[: max(2, template["min"])]}
    for kind in slot.type.split(","):
        if kind in BUILT:
            number, side.made[kind] = side.made[kind], side.made[kind] + 1
            return BUILT[kind](side, number)
    if slot.type == "COMBO":
        return _choice(slot, side)
    if slot.type in WIDGETS or "default" in slot.options:
        return _small(slot)
    raise NotBuiltError(slot.type)


def _choice(slot: Slot, side: Side) -> Any:
    choices = slot.options.get("options") or []
    if side.lora in choices and "default" not in slot.options:
        return side.lora
    if not choices and not slot.optional:
        raise NotBuiltError(ASKS_FILE)
    chosen = slot.options.get("default", choices[0] if choices else None)
    return [chosen] if slot.options.get("multiselect") and not isinstance(chosen, list) else chosen


def _small(slot: Slot) -> Any:
    """The default of a widget; of a number of pixels, frames or steps a small one."""
    empty = {"INT": 1, "FLOAT": 1.0, "STRING": "a tree", "BOOLEAN": False}
    value = slot.options.get("default", slot.options.get("min", empty.get(slot.type)))
    if slot.type == "STRING":
        return value or "a tree"
    if slot.type not in ("INT", "FLOAT") or isinstance(value, bool):
        return value
    least, step = slot.options.get("min", 0), slot.options.get("step", 1) or 1
    wanted = value
    if re.search("width|height|resolution|size|pixels", slot.name):
        wanted = min(value, SIDE)
    elif slot.name == "scale_ratio":
        wanted = 1.0
    elif re.search("duration|seconds", slot.name):
        wanted = min(value, 1)
    elif re.search("length|frames|window|repeat", slot.name):
        wanted = min(value, 5)
    elif "steps" in slot.name:
        wanted = min(value, STEPS)
    if wanted == value:
        return value
    return type(value)(max(least, least + -(-(wanted - least) // step) * step))


def call(node: type, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Calls a node, of ComfyUI's old or new kind, and returns (type, value) of its outputs. Lists are taken apart."""
    if hasattr(node, "define_schema"):
        node.GET_SCHEMA()
        made = getattr(node.PREPARE_CLASS_CLONE(None), node.FUNCTION)(**values)
    else:
        function = getattr(node(), node.FUNCTION)
        made = function(**values)
    if inspect.isawaitable(made):
        made = asyncio.run(_awaited(made))
    made = made.get("result") if isinstance(made, dict) else getattr(made, "result", made)
    kinds, lists = types_of(node)[1], list(getattr(node, "OUTPUT_IS_LIST", None) or ())
    outputs = []
    for i, (kind, value) in enumerate(zip(kinds, made or (), strict=False)):
        outputs += [(kind, v) for v in value] if i < len(lists) and lists[i] else [(kind, value)]
    return outputs


async def _awaited(made: Any) -> Any:
    return await made


def difference(found: Any, truth: Any) -> float:
    """The largest difference relative to the largest value of the truth; infinite where they are built otherwise."""
    if isinstance(truth, torch.Tensor):
        return _tensors_differ(found, truth)
    if hasattr(truth, "tensors"):
        found, truth = getattr(found, "tensors", None), truth.tensors
    if isinstance(truth, dict):
        if not isinstance(found, dict) or found.keys() != truth.keys():
            return float("inf")
        return max((difference(found[key], truth[key]) for key in truth), default=0.0)
    if isinstance(truth, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(truth):
            return float("inf")
        return max((difference(f, t) for f, t in zip(found, truth, strict=True)), default=0.0)
    if isinstance(truth, float) and isinstance(found, float):
        return abs(found - truth) / max(abs(truth), 1e-30) if found != truth else 0.0
    same = found == truth if isinstance(truth, (int, str, type(None))) else type(found) is type(truth)
    return 0.0 if same else float("inf")


def _tensors_differ(found: Any, truth: torch.Tensor) -> float:
    if not isinstance(found, torch.Tensor) or found.shape != truth.shape or found.dtype != truth.dtype:
        return float("inf")
    if torch.equal(found, truth):
        return 0.0
    found, truth = found.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((found - truth)[finite].abs().max() / truth[finite].abs().max().clamp(min=1e-30))
