"""ComfyUI's own nodes by table, all packed against all dense: the same comes out, or both raise.

What a node gives is looked at by its type: a MODEL, a CONDITIONING, SIGMAS .. are sampled with, a CLIP encodes. After
each node the packed model still draws what it drew before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from node_table import (
    ASKS_FILE,
    COMPILES,
    CUSTOM,
    NOT_BUILT,
    STEPS,
    WATCHED,
    WRITES,
    NotBuiltError,
    Side,
    all_nodes,
    call,
    difference,
    has_optional_sockets,
    reason_left_out,
    types_of,
    values_for,
)
from safetensors.torch import save_file
from twins import (
    TOKENS,
    draw,
    latent,
    load_stock,
    low_rank,
    read_dense,
    run_node,
    stock_text_encoder,
    with_lora,
    with_short_texts,
    write_pack,
)

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import NEWEST
from bonsai_ops.weights import flux2

pytestmark = [pytest.mark.host, pytest.mark.slow]

EQUAL = 2e-6
"""The largest difference, relative to the largest value, fp32."""
TEXT = synthetic.TextGeometry(hidden=128, mlp=256, heads=1, key_heads=1)
GEOMETRY = flux2.Geometry(hidden=128, context=3 * TEXT.hidden, in_channels=128, double_blocks=1, single_blocks=1)
AMPLIFIES = "makes so much of rounding that its dense twin moves as far when the LoRA's strength changes by 1e-6"
DIFFERENT = {
    "ModelSamplingContinuousEDM beside a LoRA": AMPLIFIES,
    "ModelSamplingContinuousV beside a LoRA": AMPLIFIES,
    "PerpNeg beside a LoRA": AMPLIFIES,
}
"""{node, with what follows it, "sampler .." or "scheduler ..": why its results differ}."""
SHIPPED_PACK = Path(synthetic.__file__).parents[1] / "models" / "bonsai" / "seedling"
PROMPT = "a tree in a pot"
KINDS = ("model", "sampling", "schedule", "clip", "conditioning", "hooks", "latent", "other")
CHANGING = ("model", "sampling", "clip", "hooks")
"""Kinds of nodes that could change a model."""


def kind_of(taken: set[str], given: list[str]) -> str:
    """One of KINDS for a node that takes and gives these types."""
    if "MODEL" in given:
        return "model"
    if {"GUIDER", "SAMPLER"} & set(given) or ("LATENT" in given and taken & {"MODEL", "GUIDER", "SAMPLER", "NOISE"}):
        return "sampling"
    if "SIGMAS" in given:
        return "schedule"
    for kind in ("clip", "conditioning", "hooks", "latent"):
        if kind.upper() in (taken | set(given) if kind == "clip" else given):
            return kind
    return "other"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, comfy_base_directory: Any) -> Iterator[dict[str, Any]]:
    """Packs of two models, the folder of a text encoder, and a LoRA for model and text encoder.

    It has packed layers only: ComfyUI's bypass rounds it to the dtype of a dense layer, bf16 here and fp32 in the twin.
    """
    folder = tmp_path_factory.mktemp("nodes")
    synthetic.write_text_encoder(folder / "text_encoder-mlx-4bit", TEXT)
    lora = comfy_base_directory / "models" / "loras" / "node-table.safetensors"
    lora.parent.mkdir(parents=True, exist_ok=True)
    layers = {
        "diffusion_model.double_blocks.0.img_attn.qkv": (384, 128),
        "diffusion_model.double_blocks.0.txt_mlp.0": (768, 128),
        "diffusion_model.single_blocks.0.linear1": (1152, 128),
        "text_encoders.qwen3_4b.transformer.model.layers.3.mlp.down_proj": (128, 256),
    }
    save_file(low_rank(layers), lora)
    yield {
        "model": write_pack(folder / "a" / "m.safetensors", "ternary", GEOMETRY),
        "other": write_pack(folder / "b" / "m.safetensors", "binary", GEOMETRY, seed=1),
        "folder": folder,
        "lora": lora.name,
    }
    lora.unlink()


def dense_twin(path: Path, disable_dynamic: bool = False) -> Any:
    """The dense MODEL of a pack, which nodes can have made again as they can ComfyUI's own."""
    model = load_stock(read_dense(path))
    model.cached_patcher_init = (dense_twin, (path,))
    return model


class Pixels(torch.nn.Module):
    """A VAE of no weights, exact and quick: a picture [B, 3, H, W] and the latent [B, 128, H / 16, W / 16]."""

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(picture, 16)[:, :128]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle(latent.repeat(1, 6, 1, 1), 16)


class Table:
    """Both sides, made anew whenever a node has changed what they draw."""

    def __init__(self, files: dict[str, Any]) -> None:
        from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
        from bonsai_ops.host.vae import load_vae

        self.files, self.nodes = files, all_nodes()
        ours = load_bonsai_text_encoder(files["folder"], compute_dtype="fp32")
        self.clips = (ours, stock_text_encoder(files["folder"] / "text_encoder-mlx-4bit" / "model.safetensors", TEXT))
        for clip in self.clips:  # without the padding of a prompt to 512 tokens, as with_short_texts
            clip.tokenizer.qwen3_4b.min_length = TOKENS
        self.vae = load_vae(SHIPPED_PACK)
        self.vae.first_stage_model = Pixels()
        self.make()

    def make(self) -> None:
        from bonsai_ops.host.loader import load_bonsai_model

        paths = (self.files["model"], self.files["other"])
        packed = [load_bonsai_model(path, {"compute_dtype": "fp32"}) for path in paths]
        dense = [dense_twin(path) for path in paths]
        for model in packed + dense:
            with_short_texts(model)
        self.sides = [
            Side(*models, clip, self.vae, self.files["lora"], GEOMETRY.context)
            for models, clip in zip((packed, dense), self.clips, strict=True)
        ]
        self.first = [self.plain(side) for side in self.sides]

    @staticmethod
    @torch.inference_mode()
    def plain(side: Side) -> torch.Tensor:
        return draw(side.model, positive=side.text(), negative=side.text(2), steps=1)

    def repaired(self) -> list[str]:
        """What a node has left behind on the packed model; both sides are new then."""
        try:
            found = [self.plain(side) for side in self.sides]
        except Exception as error:
            with torch.inference_mode():
                self.make()
            return [f"afterwards sampling raises {error!r}"]
        left = [not torch.equal(f, first) for f, first in zip(found, self.first, strict=True)]
        if any(left):
            with torch.inference_mode():
                self.make()
        return ["afterwards the packed model draws something else"] if left[0] and not left[1] else []


@pytest.fixture(scope="module")
def table(comfy: Any, files: dict[str, Any]) -> Iterator[Table]:
    with torch.inference_mode():
        made = Table(files)
    yield made
    comfy.model_management.unload_all_models()


def sampled(side: Side, model: Any = None, **settings: Any) -> torch.Tensor:
    """KSampler with guidance on the side's prompts."""
    settings["positive"] = settings.get("positive") or side.text()
    settings["negative"] = settings.get("negative") or side.text(2)
    return draw(model or side.model, **{"steps": STEPS, "cfg": 2.5, **settings})


def custom(side: Side, **parts: Any) -> torch.Tensor:
    """SamplerCustomAdvanced with the side's own parts where none are given."""
    from node_table import BUILT

    kinds = {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS"}
    parts = {name: parts[name] if name in parts else BUILT[kind](side, 0) for name, kind in kinds.items()}
    return run_node(f"{CUSTOM}SamplerCustomAdvanced", latent_image=latent(), **parts)["samples"]


def hooked(side: Side, hooks: Any) -> torch.Tensor:
    return sampled(side, positive=[[states, extra | {"hooks": hooks}] for states, extra in side.text()])


def keyed(side: Side, keyframes: Any) -> torch.Tensor:
    from node_table import BUILT

    node = "comfy_extras.nodes_hooks.SetHookKeyframes"
    return hooked(side, run_node(node, hooks=BUILT["HOOKS"](side, 0), hook_kf=keyframes))


def encoded(clip: Any) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))


LOOKS: dict[str, Callable[[Side, Any], Any]] = {
    "MODEL": sampled,
    "CLIP": lambda side, clip: encoded(clip),
    "LATENT": lambda side, given: (given, sampled(side, start=given, denoise=0.7, steps=1)),
    "SIGMAS": lambda side, given: (given, custom(side, sigmas=given)),
    "SAMPLER": lambda side, given: custom(side, sampler=given),
    "GUIDER": lambda side, given: custom(side, guider=given),
    "NOISE": lambda side, given: custom(side, noise=given),
    "HOOKS": hooked,
    "HOOK_KEYFRAMES": keyed,
}
"""{type: (side, what a node gave) -> what can be compared}."""


def outcome(side: Side, work: Callable[[Side], Any]) -> tuple[Any, Exception | None]:
    """(what `work` gives, None), or (None, what it raises); the same random numbers each time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.inference_mode():
            return work(side), None
    except NotBuiltError:
        raise
    except Exception as error:
        return None, error


def compared(table: Table, work: Callable[[Side], Any]) -> list[str]:
    """How what `work` gives for the packed side differs from the dense side's; empty if it does not.

    Where both raise, ours may say more.
    """
    from bonsai_ops.host.misfit import MisfitError

    (found, ours), (truth, theirs) = (outcome(side, work) for side in table.sides)
    if type(ours) is not type(theirs) and not (theirs and isinstance(ours, MisfitError)):
        return [f"packed: {ours!r:.150}; dense: {theirs!r:.150}"]
    distance = 0.0 if ours else difference(found, truth)
    return [f"differs by {distance:.1e}"] if distance > EQUAL else []


def used(node: type, whole: bool) -> Callable[[Side], Any]:
    """What a node gives, looked at."""

    def work(side: Side) -> Any:
        looked, takes = [], types_of(node)[0]
        outputs = call(node, values_for(node, side, whole))
        for kind, value in outputs:
            if kind in ("LATENT", "SIGMAS") and "MODEL" in takes:
                looked.append(value)
            elif kind in LOOKS:
                looked.append(LOOKS[kind](side, value))
            elif kind == "CONDITIONING" or takes & {"MODEL", "CLIP"}:
                looked.append(value)
        prompts = [value for kind, value in outputs if kind == "CONDITIONING"]
        if prompts and "CLIP" not in takes:
            negative = prompts[1] if prompts[1:] else None
            looked.append(sampled(side, positive=prompts[0], negative=negative, steps=1))
        return looked

    return work


def watched(table: Table) -> Iterator[tuple[str, type, str]]:
    """(id, class, kind) of the nodes that are called."""
    for name, node in table.nodes.items():
        taken, given = types_of(node)
        if WATCHED & (taken | set(given)) and reason_left_out(name, node) is None:
            yield name, node, kind_of(taken, given)


def told(wrong: dict[str, list[str]], seen: set[str]) -> str:
    """What is wrong with the table, a line each; empty if nothing is. seen: every case that was tried."""
    lines = [f"{name}: {'; '.join(found)}" for name, found in wrong.items() if name not in DIFFERENT]
    lines += [f"{name}: is equal, take it out of DIFFERENT" for name in DIFFERENT.keys() & seen - wrong.keys()]
    return "\n".join(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes(table: Table, kind: str) -> None:
    wrong: dict[str, list[str]] = {}
    seen = set()
    for name, node, own in watched(table):
        if own != kind:
            continue
        seen.add(name)
        found: list[str] = []
        for whole in (False, True) if has_optional_sockets(node) else (False,):
            with contextlib.suppress(NotBuiltError):
                found += compared(table, used(node, whole))
        if kind in CHANGING:
            found += table.repaired()
        if found:
            wrong[name] = found
    assert seen and table.repaired() == []
    assert told(wrong, seen) == ""


def test_model_nodes_beside_a_lora(table: Table) -> None:
    """On a packed layer a LoRA is a product beside it, on a dense one it is in the weight: rounding differs."""
    wrong: dict[str, list[str]] = {}
    seen = set()
    patched = [with_lora(side.model, side.lora, 0.5) for side in table.sides]
    for name, node, kind in watched(table):
        if kind != "model":
            continue

        def work(side: Side, node: type = node) -> Any:
            model = patched[table.sides.index(side)]
            given = values_for(node, dataclasses.replace(side, model=model), whole=False)
            return [sampled(side, value, steps=1) for kind, value in call(node, given) if kind == "MODEL"]

        with contextlib.suppress(NotBuiltError):
            case = f"{name} beside a LoRA"
            found = compared(table, work)
            seen.add(case)
            if found:
                wrong[case] = found
    assert told(wrong, seen) == "" and table.repaired() == []


def test_samplers_and_schedulers(table: Table, comfy: Any) -> None:
    import comfy.samplers

    wrong, seen = {}, set()
    ways = [("sampler", name, (name, "simple")) for name in comfy.samplers.KSampler.SAMPLERS]
    ways += [("scheduler", name, ("euler", name)) for name in comfy.samplers.KSampler.SCHEDULERS]
    for what, name, (sampler, scheduler) in ways:

        def work(side: Side, sampler: str = sampler, scheduler: str = scheduler) -> torch.Tensor:
            return sampled(side, sampler_name=sampler, scheduler=scheduler)

        seen.add(f"{what} {name}")
        found = compared(table, work)
        if found:
            wrong[f"{what} {name}"] = found
    assert told(wrong, seen) == "" and table.repaired() == []


def test_what_is_left_out(table: Table, comfy_version: str) -> None:
    """Every reason is known, and the newest ComfyUI has each; a new type of input is to be built or explained."""
    left: dict[str, list[str]] = {}
    for name, node in table.nodes.items():
        taken, given = types_of(node)
        if not WATCHED & (taken | set(given)):
            continue
        reason = reason_left_out(name, node)
        if reason is None:
            try:
                values_for(node, table.sides[0], whole=False)
            except NotBuiltError as error:
                reason = str(error)
        if reason is not None:
            left.setdefault(reason, []).append(name)
    known = {*NOT_BUILT, WRITES, COMPILES, ASKS_FILE}
    assert {reason: names for reason, names in left.items() if reason not in known} == {}
    assert comfy_version != NEWEST or known == left.keys()
