"""Layers in a CUDA graph, which newer versions of ComfyUI record to generate text: nothing waits, nothing stays.

A processor has no graphs: that one is recorded is only said to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_weights import random_weight
from twins import QKV, Pair, bfl_lora, loaded, module_of, with_lora
from waits import Waits, recording

pytestmark = pytest.mark.host


def layer_with_lora(pair: Pair, lora_file: Callable[..., str]) -> Any:
    return module_of(loaded(with_lora(pair.packed, lora_file(bfl_lora()))), QKV)


def inputs() -> torch.Tensor:
    return torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))


def test_a_graph_keeps_no_matrices(pair: Pair, lora_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in the graph's memory, which holds them while it runs only; calls outside would read rubbish."""
    layer, x = layer_with_lora(pair, lora_file), inputs()
    state = recording(monkeypatch)
    first = layer(x)
    assert layer.resident_patch.kept == []
    state.on = False
    assert torch.equal(layer(x), first)
    kept = layer.resident_patch.kept
    assert len(kept) == 2
    state.on = True
    assert torch.equal(layer(x), first)
    assert all(a is b for a, b in zip(layer.resident_patch.kept, kept, strict=True))


def test_a_lora_elsewhere_is_refused_in_a_graph(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving it would wait; CUDA says that in words nobody understands."""
    from comfy.weight_adapter import LoRAAdapter

    from bonsai_ops.host.lora import LayerPatches

    layer = module_of(loaded(pair.packed), QKV)
    shape = layer.weight.shape
    up, down = torch.ones(shape[0], 2, device="meta"), torch.ones(2, shape[1], device="meta")
    lora = LoRAAdapter(set(), (up, down, None, None, None, None))
    layer.resident_patch = LayerPatches(QKV, [(1.0, lora, 1.0, None, None)], shape)
    recording(monkeypatch)
    with pytest.raises(RuntimeError, match=rf"LoRA on {QKV} is not on cpu.*--disable-cuda-graphs"):
        layer(inputs())
    layer.resident_patch = None


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "lora"])
def test_no_call_of_a_layer_waits(pair: Pair, lora_file: Callable[..., str], patched: bool) -> None:
    """Neither the first nor a later one; nor does an embedding."""
    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops

    layer = layer_with_lora(pair, lora_file) if patched else module_of(loaded(pair.packed), QKV)
    table = make_bonsai_ops().Embedding(40, 128, dtype=torch.float32)
    table.load_state_dict({"weight": wrap(random_weight("affine", "nibble", 40, 128), torch.float32)})
    x, index = inputs(), torch.tensor([[3, 3, 7]])
    with torch.inference_mode():
        for _ in range(2):
            with Waits() as waits:
                layer(x)
                torch.nn.functional.linear(x, layer.weight)
                table(index)
            assert waits.found == []
