"""Our layout in comfy-kitchen: all that a layout and its tensors are asked for, by whichever version is installed.

A method that this file does not know fails the walk: it may multiply, round or store a packed weight by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_weights import random_weight
from twins import relative

from bonsai_ops.weights.packed_weight import SCHEMES

pytestmark = pytest.mark.host

ROWS, COLUMNS, RANK = 72, 256, 3
PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]


@pytest.fixture(params=PAIRS, ids="-".join)
def packed(request: pytest.FixtureRequest, comfy: Any) -> Any:
    """A tensor of each scheme and codec, with a residual."""
    import dataclasses

    from bonsai_ops.host.layout import wrap

    weight = random_weight(*request.param, ROWS, COLUMNS)
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLUMNS, generator=generator)
    return wrap(dataclasses.replace(weight, up=up, down=down), torch.float32)


def values(tensor: Any) -> torch.Tensor:
    from bonsai_ops.host.layout import unwrap

    return unwrap(tensor).dequantize()


def refused(function: Callable, *args: Any, error: str = "never requantized", **kwargs: Any) -> bool:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=error):
        function(*args, **kwargs)
    return True


def declined(tensor: Any, method: Callable, before: Callable = lambda: ()) -> bool:
    """A fused product is declined, and its inputs are as they were."""
    inputs = [torch.ones(2, COLUMNS), torch.ones(ROWS), torch.ones(COLUMNS), torch.ones(2, ROWS), torch.ones(ROWS)]
    x, bias, norm, residual, gate = inputs
    found = [
        method(*before(), x),
        method(*before(), x, bias, "gelu_tanh"),
        method(*before(), x, bias, "rms_norm", norm, 1e-6, residual, gate),
        method(*before(), x, bias=None, input_act=None, residual=residual, residual_scale=gate),
    ]
    return found == [NotImplemented] * 4 and all(bool((tensor == 1).all()) for tensor in inputs)


def unchanged(tensor: Any, method: Callable, *first: Any) -> bool:
    """The weight stays as it is, and so does the memory around it."""
    storage = torch.arange(4096, dtype=torch.int64).to(torch.uint8)
    before = storage.clone()
    return method(*first, storage) is tensor and torch.equal(storage, before)


LAYOUT: dict[str, Callable[[Any, Any], bool]] = {
    "Params": lambda c, t: type(t.params) is c.Params,
    "MIN_SM_VERSION": lambda c, t: c.MIN_SM_VERSION is None,
    "quantize": lambda c, t: refused(c.quantize, torch.ones(ROWS, COLUMNS)),
    "dequantize": lambda c, t: torch.equal(c.dequantize(t._qdata, t.params), values(t)),
    "get_plain_tensors": lambda c, t: (
        c.get_plain_tensors(t)[0] is t._qdata and len(c.get_plain_tensors(t)) == len(t.params._tensor_fields()) + 1
    ),
    "state_dict_tensors": lambda c, t: (
        list(c.state_dict_tensors(t._qdata, t.params)) == ["", *(f"_{n}" for n in t.params._tensor_fields())]
    ),
    "requantize_kwargs": lambda c, t: c.requantize_kwargs(t) == {},
    "linear_input_act": lambda c, t: declined(t, c.linear_input_act, lambda: (t,)),
    "optimize_for_gemv": lambda c, t: unchanged(t, c.optimize_for_gemv, t),
    "supports_fast_matmul": lambda c, t: c.supports_fast_matmul() is True,
    "get_requirements": lambda c, t: c.get_requirements()["fast_matmul_supported"] is True,
}
"""{member of QuantizedLayout: what our layout does}."""
OURS = ("linear_input_act", "optimize_for_gemv")
"""Members that our layout has in every version, whoever asks."""


def pinned(tensor: Any) -> bool:
    return tensor.is_pinned() is False


def flattened(tensor: Any) -> bool:
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    again = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return len(names) == len(tensor.params._tensor_fields()) + 1 and torch.equal(values(again), values(tensor))


def copied(tensor: Any) -> bool:
    again = tensor._copy_with()
    return torch.equal(values(again), values(tensor)) and again.params.scale is not tensor.params.scale


TENSOR: dict[str, Callable[[Any], bool]] = {
    "storage_shape": lambda t: t.storage_shape == tuple(t._qdata.shape),
    "storage_dtype": lambda t: t.storage_dtype == torch.uint8,
    "nbytes": lambda t: t.nbytes == t._qdata.nbytes,
    "padded_shape": lambda t: t.padded_shape == t.storage_shape,
    "is_padded": lambda t: t.is_padded is (tuple(t._qdata.shape) != (ROWS, COLUMNS)),
    "layout_cls": lambda t: t.layout_cls.__name__ == "BonsaiPackedLayout",
    "params": lambda t: t.params is t._params,
    "from_float": lambda t: refused(type(t).from_float, torch.ones(ROWS, COLUMNS), t._layout_cls),
    "_copy_with": copied,
    "data_ptr": lambda t: t.data_ptr() == t._qdata.data_ptr(),
    "is_pinned": pinned,
    "storage": lambda t: t.storage().data_ptr() == t._qdata.data_ptr(),
    "optimize_for_gemv": lambda t: unchanged(t, t.optimize_for_gemv),
    "linear_input_act": lambda t: declined(t, t.linear_input_act),
    "dequantize": lambda t: torch.equal(t.dequantize(), values(t)) and torch.equal(t.t().dequantize(), values(t).t()),
    "state_dict": lambda t: list(t.state_dict("w")) == ["w", *(f"w_{n}" for n in t.params._tensor_fields())],
    "requantize_from_float": lambda t: refused(t.requantize_from_float, torch.ones(ROWS, COLUMNS)),
    "__tensor_flatten__": flattened,
    "__tensor_unflatten__": flattened,
    "__torch_dispatch__": lambda t: relative(t + 1, values(t) + 1) < 1e-6,
    "_dequant_and_fallback": lambda t: torch.equal(type(t)._dequant_and_fallback(torch.neg, (t,), {}), -values(t)),
    "__repr__": lambda t: "BonsaiPackedLayout" in repr(t),
    "__init__": lambda t: t._layout_cls == "BonsaiPackedLayout",
    "__new__": lambda t: (t.shape, t.dtype, t.device.type) == ((ROWS, COLUMNS), torch.float32, "cpu"),
}
"""{member of QuantizedTensor: whether it does with ours what it should}."""
PARAMS = {"_tensor_fields", "_validate_tensor_fields", "to_device", "clone", "copy_from"}


def members(cls: type) -> set[str]:
    """What a class of comfy-kitchen defines, without what Python puts into every class."""
    kept = {"__init__", "__new__", "__repr__", "__tensor_flatten__", "__tensor_unflatten__", "__torch_dispatch__"}
    found = {name for name in (*vars(cls), *inspect.get_annotations(cls)) if not name.startswith("__") or name in kept}
    return found - {"_abc_impl"}


def test_no_member_is_unknown(comfy: Any) -> None:
    """Neither of a layout, its parameters nor its tensors."""
    from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor
    from comfy_kitchen.tensor.base import BaseLayoutParams

    assert members(QuantizedLayout) <= set(LAYOUT)
    assert members(QuantizedTensor) <= set(TENSOR) | {"__init__"}
    found = members(BaseLayoutParams) - {"scale", "orig_dtype", "orig_shape", "__init__", "__repr__"}
    assert found <= PARAMS


def test_each_member_of_the_layout(packed: Any) -> None:
    from comfy_kitchen.tensor import QuantizedLayout

    layout = packed.layout_cls
    for name, holds in LAYOUT.items():
        if name in OURS or hasattr(QuantizedLayout, name) or name == "Params":
            assert holds(layout, packed), name
    assert not set(OURS) - set(vars(layout))


def test_each_member_of_the_tensor(packed: Any) -> None:
    for name, holds in TENSOR.items():
        if name in vars(type(packed)):
            assert holds(packed), name


def test_each_member_of_the_parameters(packed: Any) -> None:
    """Copies are whole and share nothing; they lie where they should."""
    params = packed.params
    cloned, moved = params.clone(), params.to_device(torch.device("meta"))
    for name in params._tensor_fields():
        one, two = getattr(params, name), getattr(cloned, name)
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
        assert getattr(moved, name).device.type == "meta"
    for other in (cloned, moved):
        assert all(getattr(other, n) == getattr(params, n) for n in ("scheme", "codec", "group_size", "mode", "owner"))


def test_each_operation_on_the_tensor(packed: Any) -> None:
    """Those that comfy-kitchen has for every layout keep the weight packed; its residual goes along."""
    truth = values(packed)
    for made in (packed.detach(), packed.clone(), packed.to(torch.float64), packed.contiguous(), packed.t().t()):
        assert torch.equal(values(made), truth) and made._layout_cls == packed._layout_cls
    assert packed.to(torch.bfloat16).dtype == torch.bfloat16 and packed.to("meta").params.up.device.type == "meta"
    assert packed.is_contiguous()
    empty = torch.empty_like(packed)
    assert empty.copy_(packed) is empty and torch.equal(values(empty), truth)
    for one, two in zip(type(packed).state_dict(empty, "").values(), packed.state_dict("").values(), strict=True):
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()


def test_a_layer_shares_the_tables_that_it_is_given(packed: Any) -> None:
    """comfy-kitchen copies them on detach, which torch does to make a parameter: 8 % of a text encoder in 4 bits."""
    from bonsai_ops.host.linear import make_bonsai_ops

    layer = make_bonsai_ops().Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=torch.float32)
    layer.load_state_dict({"weight": packed})
    tensors = zip(layer.state_dict().values(), packed.state_dict("").values(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in tensors)
    assert layer.weight.params.owner.layer() is layer and packed.params.owner.layer() is None
    layer.to("cpu")
    assert layer.weight.params.scale.data_ptr() == packed.params.scale.data_ptr()


def test_a_copy_takes_no_table_of_the_other(comfy: Any) -> None:
    """Into a weight of another form or with other tables: refused. comfy-kitchen would let both share them."""
    import dataclasses

    from bonsai_ops.host.layout import wrap

    plain = random_weight("ternary", "trit5", ROWS, COLUMNS)
    with_residual = dataclasses.replace(plain, up=torch.ones(ROWS, 2), down=torch.ones(2, COLUMNS))
    other_rows = random_weight("ternary", "trit5", ROWS - 8, COLUMNS)
    for target, source in ((plain, with_residual), (with_residual, plain), (plain, other_rows)):
        tensor = wrap(target, torch.float32)
        assert refused(tensor.params.copy_from, wrap(source, torch.float32).params, error="cannot take the values")
        assert tensor.params.up is target.up and tensor.params.scale is target.scale


WRITES: list[Callable[[Any], Any]] = [
    lambda w: w.add_(1),
    lambda w: w.mul_(torch.ones(())),
    lambda w: w.sub_(torch.ones(ROWS, COLUMNS)),
    lambda w: w.addmm_(torch.ones(ROWS, 2), torch.ones(2, COLUMNS)),
    lambda w: w.zero_(),
    lambda w: w.fill_(2),
    lambda w: torch.nn.init.normal_(w),
    lambda w: torch.nn.init.uniform_(w),
    lambda w: w.clamp_(-1, 1),
]


def test_no_value_is_written_into_a_weight(packed: Any) -> None:
    """It would be lost without a word: comfy-kitchen writes into an unpacked copy. A dense tensor is written to."""
    truth = values(packed)
    with torch.no_grad():
        for write in WRITES:
            assert refused(write, packed, error="holds codes, and no value is written into it")
        assert torch.equal(torch.zeros(ROWS, COLUMNS).add_(packed), truth)
        assert torch.equal(torch.ones(ROWS, COLUMNS).addcmul_(packed, torch.ones(())), truth + 1)
    assert torch.equal(values(packed), truth)
