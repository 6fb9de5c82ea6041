"""What the help pages say of ComfyUI's own faults is true, for a packed model and its dense twin alike.

A test that fails with a newer ComfyUI tells that a sentence of the help is out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import HIDDEN, Pair, bfl_lora, draw, latent, low_rank, relative, run_node, text

pytestmark = pytest.mark.host

HELP = Path(__file__).resolve().parents[3] / "web" / "docs"


def said(node: str, words: str) -> bool:
    return words in (HELP / f"{node}.md").read_text(encoding="utf-8")


def bypassed(model: Any, name: str) -> Any:
    node = "comfy_extras.nodes_lora_debug.LoraLoaderBypassModelOnly"
    return run_node(node, model=model, lora_name=name, strength_model=0.5)


LOADERS = ("LoadBonsaiModel", "LoadBonsaiPack")
SPLIT = {f"transformer_blocks.0.attn.to_{part}": (HIDDEN, HIDDEN) for part in "qkv"}


def test_bypass_loras(pair: Pair, lora_file: Callable[..., str]) -> None:
    """LoraLoaderBypass drops what a LoRA has for q, k and v apart, and a second one replaces the first."""
    assert all(said(node, "Load LoRA (Bypass)") for node in LOADERS)
    split, first, second = lora_file(low_rank(SPLIT)), lora_file(bfl_lora()), lora_file(bfl_lora(seed=4))
    for model in (pair.packed, pair.dense):
        assert torch.equal(draw(bypassed(model, split)), draw(model))
        only = draw(bypassed(model, second))
        assert relative(only, draw(model)) > 1e-3
        assert torch.equal(draw(bypassed(bypassed(model, first), second)), only)


def test_areas_in_pixels(pair: Pair) -> None:
    """The left half of a picture, in pixels, is all of it; in percent it is the left half."""
    assert said("BonsaiSampler", "Conditioning (Set Area)")
    size = 16 * latent()["samples"].shape[3], 16 * latent()["samples"].shape[2]
    half = {"width": size[0] // 2, "height": size[1], "x": 0, "y": 0, "strength": 1.0}
    in_pixels = run_node("nodes.ConditioningSetArea", conditioning=text(), **half)
    half = {"width": 0.5, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 1.0}
    in_percent = run_node("nodes.ConditioningSetAreaPercentage", conditioning=text(), **half)
    for model in (pair.packed, pair.dense):
        assert relative(draw(model, positive=in_pixels), draw(model)) < 1e-5
        assert relative(draw(model, positive=in_percent), draw(model)) > 1e-3


def test_a8_promises_no_repetition() -> None:
    assert all(said(node, "no promise of the same picture") for node in LOADERS)
    assert said("BonsaiSampler", "except with the model's modes `a8` and `a8_fp8`")
