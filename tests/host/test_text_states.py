"""A prompt is encoded once in a server, whichever graph asks and whatever ComfyUI let go of meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bonsai_ops.tools.environment import link_plugin
from bonsai_ops.tools.server import ComfyServer

pytestmark = pytest.mark.host

COUNTER = '''
import torch
from comfy.text_encoders.llama import Qwen3_4B

ran = []
torch.nn.modules.module.register_module_forward_pre_hook(
    lambda module, _: ran.append(1) if isinstance(module, Qwen3_4B) else None
)

class CountEncodings:
    """How often a text encoder ran in this process, once the conditioning is there."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"conditioning": ("CONDITIONING",)}})
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "count", "test", True

    def count(self, conditioning):
        return {"ui": {"encodings": [len(ran)]}}

NODE_CLASS_MAPPINGS = {"CountEncodings": CountEncodings}
'''


@pytest.fixture(scope="module")
def server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """Its cache keeps what the last graph used, and no more."""
    base = tmp_path_factory.mktemp("base")
    link_plugin(base)
    (base / "custom_nodes" / "counter.py").write_text(COUNTER)
    with ComfyServer(Path(sys.executable), comfyui_path, base, extra_args=["--cache-classic"]) as started:
        yield started


def graph(prefix: str, loader: str, text: str = "a red tree", layer: int | None = None) -> dict[str, Any]:
    """A prompt behind a loader; every node's id begins with the prefix."""
    loaders = {
        "LoadBonsaiTextEncoder": {"text_encoder_name": "seedling/text_encoder-mlx-4bit/model.safetensors"},
        "LoadBonsaiPack": {"pack_name": "seedling", "compute_dtype": "auto", "memory": "auto"},
    }
    clip = [f"{prefix}1", int(loader == "LoadBonsaiPack")]
    found = {clip[0]: {"class_type": loader, "inputs": loaders[loader]}}
    if layer is not None:
        inputs = {"clip": clip, "stop_at_clip_layer": layer}
        found[f"{prefix}2"] = {"class_type": "CLIPSetLastLayer", "inputs": inputs}
        clip = [f"{prefix}2", 0]
    found[f"{prefix}3"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": text}}
    found[f"{prefix}4"] = {"class_type": "CountEncodings", "inputs": {"conditioning": [f"{prefix}3", 0]}}
    return found


WITHOUT_A_MODEL = {
    "7": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "nothing"}},
}


def test_a_prompt_is_encoded_once(server: ComfyServer) -> None:
    """After a graph without the loader, whose CLIP ComfyUI lets go of, and by both loaders in turns."""

    def encodings(*asked: Any) -> int:
        drawn = graph(*asked)
        (count,) = (out["encodings"][0] for out in server.wait(server.queue(drawn))["outputs"].values())
        return count

    alone, pack = "LoadBonsaiTextEncoder", "LoadBonsaiPack"
    assert encodings("a", alone) == 1
    for prefix, loader in (("b", alone), ("a", pack), ("b", alone), ("a", pack)):
        server.wait(server.queue(WITHOUT_A_MODEL))
        assert encodings(prefix, loader) == 1
    assert encodings("a", alone, "a blue pot") == 2
    assert [encodings("a", alone, "a red tree", layer) for layer in (-1, -2, -1, -2)] == [3, 4, 4, 4]
    assert encodings("a", pack, "a blue pot") == 4
