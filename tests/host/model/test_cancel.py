"""Cancel at every stage of every node of ours that takes long: it ends there, leaves nothing and can be run again.

None of them looks for a network meanwhile, nor does the plugin when it is imported: here there is none.

The nodes are the plugin's own, imported as ComfyUI imports it. Cancel is pressed when it is looked for the n-th time,
for some n from the first to the last.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, KINDS, patch, stock
from node_table import call
from twins import LATENT, bfl_lora, draw, text, with_lora, write_pack

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN

pytestmark = pytest.mark.host

QUICK = {"BonsaiModelInfo", "BonsaiRightGradients"}
"""Nodes that have no bar: they look at a model or change how it is called."""
LEAST = {"SaveBonsaiModel": 22}
"""{node: how often Cancel is looked for at least}. Of this model 22 layers are made compact before any is written."""
MODEL, PACK, ENCODER = "cancel.safetensors", "cancel-pack", "cancel-encoder.safetensors"


@pytest.fixture(scope="module")
def ours(comfy: Any, connections: list[str]) -> Iterator[dict[str, Any]]:
    """{id: node class} of the plugin."""
    name = "bonsai_cancelled_plugin"
    spec = importlib.util.spec_from_file_location(
        name, PLUGIN / "__init__.py", submodule_search_locations=[str(PLUGIN)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    module = importlib.import_module(f"{name}.nodes")
    module.folders.register()
    yield {node.define_schema().node_id: node for node in module.NODES}
    for imported in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[imported]
    gc.collect()


@pytest.fixture(scope="module")
def models(comfy: Any, comfy_base_directory: Path) -> Iterator[Path]:
    """A transformer, a whole pack and a text encoder where ComfyUI finds them."""
    folder = comfy_base_directory / "models"
    small = synthetic.TextGeometry(hidden=128, mlp=256, heads=1, key_heads=1)
    write_pack(folder / "diffusion_models" / MODEL, "ternary")
    synthetic.write_pipeline(folder / "bonsai" / PACK, variant="ternary", seed=0)
    synthetic.write_text_encoder(folder / "text_encoders" / "cancel", small)
    (folder / "text_encoders" / "cancel" / "model.safetensors").rename(folder / "text_encoders" / ENCODER)
    yield folder


def sampled(width: int, shape: tuple[int, ...] = LATENT) -> dict[str, Any]:
    """Three steps, as the nodes that sample ask for them."""
    positive = text(width=width)
    return {
        "positive": positive,
        "negative": positive,
        "latent": {"samples": torch.zeros(shape)},
        "seed": 3,
        "steps": 3,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
    }


class Presser:
    """Stands for main.py and a user: presses Cancel when ComfyUI or a node looks for it for the n-th time."""

    def __init__(self, management: Any) -> None:
        self.look, self.press = (
            management.throw_exception_if_processing_interrupted,
            management.interrupt_current_processing,
        )
        self.looks, self.at = 0, 0

    def looked(self) -> None:
        self.looks += 1
        if self.looks == self.at:
            self.press()
        self.look()

    def moved(self, *bar: Any, **more: Any) -> None:
        """main.py's hook looks too, at moves of a bar that depend on the clock: they are not counted."""
        self.look()

    def begin(self, at: int) -> None:
        """Cancel will be pressed then; 0: never."""
        self.looks, self.at = 0, at
        self.press(False)


@pytest.fixture
def presser(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Presser]:
    kept, presser = comfy.utils.PROGRESS_BAR_HOOK, Presser(comfy.model_management)
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", presser.looked)
    comfy.utils.set_progress_bar_global_hook(presser.moved)
    yield presser
    comfy.utils.set_progress_bar_global_hook(kept)
    presser.press(False)
    comfy.model_management.unload_all_models()


CONNECTS = ("socket.", "urllib.", "ftplib.", "smtplib.", "http.client.", "webbrowser.")


@pytest.fixture(scope="module")
def connections() -> Iterator[list[str]]:
    """What looked for a network in this process and was refused, as long as the tests of this file run.

    A hook cannot be taken away.
    """
    seen: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple) -> None:
        if watching and event.startswith(CONNECTS):
            seen.append(f"{event} {arguments}"[:200])
            raise ConnectionError("there is no network here")

    sys.addaudithook(hook)
    yield seen
    watching.clear()


def fingerprint(kind: str, value: Any, width: int) -> list[torch.Tensor]:
    """Tensors that are the same to the bit for equal outputs."""
    if kind == "MODEL":
        return [draw(value, positive=text(width=width), negative=text(width=width), steps=1)]
    if kind == "CLIP":
        return [value.encode_from_tokens_scheduled(value.tokenize("a tree"))[0][0]]
    if kind == "VAE":
        return [value.decode(torch.ones(1, 128, 2, 2))]
    if kind == "LATENT":
        return [value["samples"]]
    if kind == "BONSAI_CALIBRATION":
        return [value.layers[name].power for name in sorted(value.layers)]
    return []  # reports and plots, with the seconds that it took


def work_of(
    name: str, models: Path, ours: Mapping[str, Any], lora_file: Callable[..., str]
) -> tuple[dict[str, Any], int]:
    """(inputs of a node, width of the text that its model takes)."""
    options = {"compute_dtype": "fp32", "memory": "auto"}
    if name == "LoadBonsaiModel":
        return {"model_name": MODEL, **options}, 128
    if name == "LoadBonsaiPack":
        return {"pack_name": PACK, **options}, synthetic.TINY.context
    if name == "LoadBonsaiTextEncoder":
        return {"text_encoder_name": ENCODER}, 0
    if name in ("BonsaiSampler", "SaveBonsaiModel"):
        ((_, model),) = call(ours["LoadBonsaiModel"], {"model_name": MODEL, "layout": "fast", **options})
        if name == "SaveBonsaiModel":
            branched = with_lora(model, lora_file(bfl_lora()))
            return {"model": branched, "filename_prefix": "cancel/x", "include_loras": True}, 128
        given = {n: v for n, v in sampled(128).items() if n in ("positive", "latent", "seed", "steps")}
        return {"model": model, **given, "denoise": 1.0}, 128
    source = stock("flux2")
    if name == "PatchToBitLinear":
        return {"model": source, "rank": 4}, CONTEXT
    given = sampled(CONTEXT, KINDS["flux2"].latent)
    if name == "CalibrateBitLinear":
        return {"model": source, **given}, CONTEXT
    if name == "RecoverBitLinear":
        prompts = {"prompts": given["positive"], "latent": given["latent"], "sigmas": torch.tensor([1.0, 0.5, 0.0])}
        numbers = {"seed": 3, "points": 4, "steps": 2, "batch": 1, "learning_rate": 1e-3, "minutes": 0.0}
        models = {"original": source, "patched": patch(source, rank=2)[0]}
        return {name: [value] for name, value in {**models, **prompts, **numbers}.items()}, CONTEXT
    assert name == "MeasureBitLinear", f"{name} is new: say here how it is called"
    return {"original": source, "patched": patch(source)[0], **given}, CONTEXT


NAMES = (
    "LoadBonsaiPack",
    "LoadBonsaiModel",
    "LoadBonsaiTextEncoder",
    "BonsaiSampler",
    "SaveBonsaiModel",
    "PatchToBitLinear",
    "CalibrateBitLinear",
    "MeasureBitLinear",
    "RecoverBitLinear",
)


def test_every_node_is_here(ours: Mapping[str, Any]) -> None:
    assert set(ours) == {*NAMES, *QUICK}


def test_without_a_network(ours: Mapping[str, Any], models: Path, connections: list[str]) -> None:
    """The import, the nodes without a bar, a model, and a text that is encoded; the others are watched below."""
    assert connections == []
    with pytest.raises(ConnectionError), socket.socket() as opened:
        opened.connect(("127.0.0.1", 9))
    assert len(connections) == 1 and connections.pop().startswith("socket.")
    inputs = {"pack_name": PACK, "compute_dtype": "fp32", "memory": "auto"}
    (_, model), (kind, clip), _ = call(ours["LoadBonsaiPack"], inputs)
    for name in sorted(QUICK):
        call(ours[name], {"model": model})
    assert fingerprint(kind, clip, 0) and connections == []


@pytest.mark.parametrize("name", NAMES)
def test_cancel(
    name: str,
    ours: Mapping[str, Any],
    models: Path,
    presser: Presser,
    comfy: Any,
    comfy_base_directory: Path,
    lora_file: Callable[..., str],
    connections: list[str],
) -> None:
    inputs, width = work_of(name, models, ours, lora_file)
    written = comfy_base_directory / "output" / "cancel"

    def run() -> tuple[list[torch.Tensor], int]:
        """(what tells its outputs from others, how often Cancel was looked for)"""
        presser.begin(0)
        outputs, looks = call(ours[name], inputs), presser.looks
        return [tensor for kind, value in outputs for tensor in fingerprint(kind, value, width)], looks

    def files() -> list[tuple[str, bytes]]:
        return sorted((path.name, path.read_bytes()) for path in written.iterdir()) if written.is_dir() else []

    expected, looks = run()
    first = files()
    assert looks >= LEAST.get(name, 6), "Cancel is hardly looked for"
    for at in sorted({1, 2, looks // 3, looks // 2, looks - 1, looks}):
        presser.begin(at)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call(ours[name], inputs)
        assert presser.looks == at and files() == first, "it went on, or a file is left"
    if name == "RecoverBitLinear":
        run()  # goes on from what Cancel left and forgets it
    again, _ = run()
    assert len(again) == len(expected) and all(map(torch.equal, again, expected))
    assert connections == [], "it looked for a network"
    if name == "SaveBonsaiModel":
        (_, one), (_, other) = files()
        assert one == other and len(first) == 1
    if name == "PatchToBitLinear":
        (as_it_was,), (fresh,) = (fingerprint("MODEL", model, width) for model in (inputs["model"], stock("flux2")))
        assert torch.equal(as_it_was, fresh)
