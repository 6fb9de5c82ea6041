"""A packed weight as comfy-kitchen's QuantizedTensor, the form in which ComfyUI moves, counts and saves it.

One layout serves all schemes. The tensor's logical shape is [N, K] and its dtype the compute dtype, so that activations
are never cast to uint8; codes, scale, zero and the low-rank residual travel together as one unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import (
    QuantizedLayout,
    QuantizedTensor,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)
from comfy_kitchen.tensor.base import BaseLayoutParams

from .. import kernels
from ..weights.packed_weight import FORM, TABLES, PackedWeight

LAYOUT = "BonsaiPackedLayout"


@dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """Everything of a PackedWeight but its codes, and the mode of kernels.MODES. `transposed`: it is seen as [K, N]."""

    scheme: str = "ternary"
    codec: str = "trit5"
    group_size: int = 128
    zero: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    transposed: bool = False
    mode: str = kernels.EXACT

    def _tensor_fields(self) -> list[str]:
        return [name for name in TABLES if getattr(self, name) is not None]


class BonsaiPackedLayout(QuantizedLayout):
    """Layout of 1-bit, ternary and small affine codes with a scale a row and group."""

    Params = PackedParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, PackedParams]:
        """Always raises: rounding a dense weight (with a LoRA merged, say) to these codes would erase the change."""
        raise RuntimeError(
            "a Bonsai weight is never requantized: rounding to 1 bit or three levels loses what was added to it"
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: PackedParams) -> torch.Tensor:
        return _weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata, *(getattr(qtensor.params, name) for name in qtensor.params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: PackedParams) -> dict[str, torch.Tensor]:
        """{suffix behind `<layer>.weight`: tensor}, as the native format names them."""
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}


def wrap(weight: PackedWeight, dtype: torch.dtype, mode: str = kernels.EXACT) -> QuantizedTensor:
    """The packed weight as a tensor of shape [N, K] that computes in `dtype` and is multiplied in `mode`."""
    params = PackedParams(orig_dtype=dtype, orig_shape=tuple(weight.shape), mode=mode, **_described(weight))
    return QuantizedTensor(weight.codes, LAYOUT, params)


def wrapped(
    weights: Mapping[str, PackedWeight | torch.Tensor], dtype: torch.dtype, mode: str = kernels.EXACT
) -> dict[str, torch.Tensor]:
    """A state dict for ComfyUI: packed weights wrapped, dense ones as they are."""
    return {name: wrap(w, dtype, mode) if isinstance(w, PackedWeight) else w for name, w in weights.items()}


def is_packed(tensor: Any) -> bool:
    """True for a tensor made by `wrap`."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def unwrap(tensor: QuantizedTensor) -> PackedWeight:
    """The packed weight inside a tensor made by `wrap` (also if that is transposed now)."""
    return _weight(tensor._qdata, tensor._params)


def mode_of(tensor: QuantizedTensor) -> str:
    """The mode that `wrap` was given."""
    return tensor._params.mode


def _weight(codes: torch.Tensor, params: PackedParams) -> PackedWeight:
    shape = tuple(params.orig_shape)
    return PackedWeight(codes, shape=shape[::-1] if params.transposed else shape, **_described(params))


def _described(weight: PackedWeight | PackedParams) -> dict[str, Any]:
    """Everything of a packed weight but its codes and shape."""
    return {name: getattr(weight, name) for name in (*TABLES, *FORM)}


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _linear(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, bias = (*args, None)[:3]
    if is_packed(weight) and not weight._params.transposed and not isinstance(x, QuantizedTensor):
        return kernels.linear(x, unwrap(weight), bias, mode_of(weight))
    return torch.nn.functional.linear(_dense(x), _dense(weight), _dense(bias))


def _mm(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight = args[:2]
    if is_packed(weight) and weight._params.transposed and not isinstance(x, QuantizedTensor):
        return kernels.linear(x, unwrap(weight), None, mode_of(weight))
    return torch.mm(_dense(x), _dense(weight))


def _addmm(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    bias, x, weight = args[:3]
    plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1
    if plain and is_packed(weight) and weight._params.transposed and not isinstance(x, QuantizedTensor):
        return kernels.linear(x, unwrap(weight), None, mode_of(weight)) + bias
    return torch.addmm(_dense(bias), _dense(x), _dense(weight), **kwargs)


def _transpose(qt: QuantizedTensor, args: tuple, kwargs: dict[str, Any]) -> QuantizedTensor:
    params = qt._params
    turned = dataclasses.replace(params, orig_shape=tuple(params.orig_shape)[::-1], transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, LAYOUT, turned)


def _register() -> None:
    """Once a process: a second import of this file keeps the layout of the first."""
    try:
        known = get_layout_class(LAYOUT)
    except KeyError:
        known = None
    if known is not None:
        return
    register_layout_class(LAYOUT, BonsaiPackedLayout)
    aten = torch.ops.aten
    for op, handler in (
        (aten.linear.default, _linear),
        (aten.mm.default, _mm),
        (aten.addmm.default, _addmm),
        (aten.t.default, _transpose),
    ):
        register_layout_op(op, BonsaiPackedLayout)(handler)


_register()
