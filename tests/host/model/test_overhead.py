"""What a packed layer does beside its product: counted, not timed. `python -m bonsai_ops.bench --overhead` times it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from random_weights import random_weight
from twins import relative

from bonsai_ops.weights.packed_weight import PackedWeight

pytestmark = pytest.mark.host

MOST_CALLS = 40
"""Functions written in Python that one call of a layer without patches calls, torch's and ComfyUI's included."""
SIZE = (136, 256)


def layer_of(weight: PackedWeight, bias: torch.Tensor | None = None) -> Any:
    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops

    layer = make_bonsai_ops().Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    layer.load_state_dict({"weight": wrap(weight, torch.float32)} | ({} if bias is None else {"bias": bias}))
    return layer


def python_calls(function: Callable[[], Any]) -> list[str]:
    """The names of all functions written in Python that it calls."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


def operators(function: Callable[[], Any]) -> list[str]:
    """The operators of torch that it asks for, but for those within others and casts, which may do nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.cpu_parent is None and event.name != "aten::to"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_without_patches_does_little_else(
    comfy: Any, monkeypatch: pytest.MonkeyPatch, bias: bool, residual: bool
) -> None:
    """Nothing of torch but the product itself, and few calls from Python, which a GPU would have to wait for."""
    from bonsai_ops.kernels import MODES, dispatch

    weight = random_weight("ternary", "trit5", *SIZE)
    if residual:
        weight = replace(weight, up=torch.ones(SIZE[0], 2), down=torch.ones(2, SIZE[1]))
    idle = SimpleNamespace(
        NAME="idle", MODES=MODES, declines=lambda call: None, multiply=lambda x, *_: torch.empty(*x.shape[:-1], SIZE[0])
    )
    monkeypatch.setattr(dispatch, "BACKENDS", (idle, *dispatch.BACKENDS))
    layer = layer_of(weight, torch.ones(SIZE[0]) if bias else None)
    x = torch.ones(3, SIZE[1])
    with torch.inference_mode():
        layer(x)
        calls, asked = python_calls(lambda: layer(x)), operators(lambda: layer(x))
    if residual:  # views launch nothing
        asked = [name for name in asked if name not in ("aten::t", "aten::view", "aten::reshape")]
    assert asked == ["aten::empty", *(["aten::mm", "aten::addmm_"] if residual else [])]
    assert residual or len(calls) <= MOST_CALLS, calls


def test_a_layer_that_is_in_place_is_not_cast(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI is not asked to move what lies there; its bias functions and a bias of another dtype are heeded."""
    import comfy.ops

    weight, bias = random_weight("ternary", "trit5", *SIZE), torch.linspace(-1, 1, SIZE[0])
    x = torch.randn(3, SIZE[1], generator=torch.Generator().manual_seed(1))
    truth = torch.nn.functional.linear(x.double(), weight.dequantize().double(), bias.double())
    cast, casts = comfy.ops.cast_bias_weight, []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *a, **k: casts.append(a[0]) or cast(*a, **k))
    layer = layer_of(weight, bias)
    assert relative(layer(x), truth) < 1e-6 and casts == []
    wide = layer_of(weight, bias.double())
    assert relative(wide(x), truth) < 1e-6 and wide(x).dtype == torch.float32 and casts == []
    layer.bias_function = [lambda bias: bias + 1]
    assert relative(layer(x), truth + 1) < 1e-6 and casts == [layer]
    layer.bias_function = []
    layer.bias_lowvram_function = torch.nn.Identity()  # dynamic VRAM has the bias patched by the cast
    assert relative(layer(x), truth) < 1e-6 and casts == [layer, layer]
    layer.bias_lowvram_function = None
    casts.clear()
    layer.weight_function = [lambda weight: 2 * weight]
    assert relative(layer(x), 2 * (truth - bias) + bias) < 1e-6 and casts == []
    assert layer(x.to("meta")).device.type == "meta" and len(casts) == 1 and len(layer.weight_function) == 1


def test_an_unwrapped_weight_follows_its_tensor(comfy: Any) -> None:
    """It is made once, and again where the tensor has other codes, tables or parameters; no copy shares it."""
    from bonsai_ops.host.layout import unwrap, wrap

    first = random_weight("ternary", "trit5", *SIZE)
    first = replace(first, codes=first.codes.clone(), scale=first.scale.clone())
    second = replace(first, scale=2 * first.scale)
    tensor = wrap(first, torch.float32)
    made = unwrap(tensor)
    assert unwrap(tensor) is made and torch.equal(made.dequantize(), first.dequantize())
    tensor.copy_(wrap(second, torch.float32))
    assert torch.equal(unwrap(tensor).dequantize(), second.dequantize())
    clone, turned = tensor.clone(), tensor.t()
    assert unwrap(clone).codes.data_ptr() != unwrap(tensor).codes.data_ptr()
    assert unwrap(turned).shape == SIZE and turned.shape == SIZE[::-1]
    assert unwrap(tensor.to(torch.bfloat16)).codes is not None and unwrap(tensor.to("meta")).codes.is_meta
    assert unwrap(tensor).codes.device.type == "cpu"


def test_two_imports_unwrap_in_their_own_class(comfy: Any, second_import: str) -> None:
    """A tensor that both have seen is a packed weight for both."""
    import importlib

    from bonsai_ops.host.layout import unwrap, wrap

    other = importlib.import_module(f"{second_import}.host.layout")
    tensor = wrap(random_weight("ternary", "trit5", *SIZE), torch.float32)
    for _ in range(2):
        assert type(unwrap(tensor)) is PackedWeight
        assert type(other.unwrap(tensor)) is not PackedWeight
        assert torch.equal(unwrap(tensor).dequantize(), other.unwrap(tensor).dequantize())
