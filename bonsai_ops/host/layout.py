"""A packed weight as comfy-kitchen's QuantizedTensor, the form in which ComfyUI moves, counts and saves it.

One layout serves all schemes. The tensor's logical shape is [N, K] and its dtype the compute dtype, so that activations
are never cast to uint8; codes, scale, zero and the low-rank residual travel together as one unit.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

if TYPE_CHECKING:
    from .lora import LayerPatches

LAYOUT = "BonsaiPackedLayout"
UNWRAPPED = "_bonsai_unwrapped"
"""Attribute of a QuantizedTensor: (its parameters, the packed weight made of them and its codes)."""
WRITES = "add_ sub_ mul_ div_ addmm_ addcmul_ addcdiv_ lerp_ clamp_ neg_ fill_ zero_ normal_ uniform_ masked_fill_"
"""Operators of aten on the values of a tensor. comfy-kitchen would write to an unpacked copy and lose it."""


class PackedLayer(Protocol):
    """What linear.py's layers tell of themselves to a product of their weight outside of their forward."""

    def unseen_patches(self) -> list[LayerPatches]: ...

    def patched(self, dense: torch.Tensor, patches: list[LayerPatches]) -> torch.Tensor: ...

    def product(
        self, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, patches: list[LayerPatches]
    ) -> torch.Tensor: ...


class Owner:
    """The layer that a packed weight belongs to: its patches are part of every product of the weight.

    It says nothing about the weight: any two are equal, a copy is the same, and a pickle forgets the layer.
    """

    def __init__(self, layer: PackedLayer | None = None) -> None:
        self.layer = (lambda: None) if layer is None else weakref.ref(layer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner)

    def __hash__(self) -> int:
        return hash(Owner)

    def __deepcopy__(self, memo: dict) -> Owner:
        return self

    def __reduce__(self) -> tuple:
        return (Owner, ())


NOBODY = Owner()


@dataclass(frozen=True)
class PackedParams(BaseLayoutParams):
    """Everything of a PackedWeight but its codes, and the mode of kernels.MODES.

    transposed: it is seen as [K, N]. owner: see `owned`.
    """

    scheme: str = "ternary"
    codec: str = "trit5"
    group_size: int = 128
    zero: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    transposed: bool = False
    mode: str = kernels.EXACT
    owner: Owner = NOBODY

    def _tensor_fields(self) -> list[str]:
        return [name for name in TABLES if getattr(self, name) is not None]

    def copy_from(self, src: PackedParams, non_blocking: bool = False) -> None:
        """Takes the values of another weight's tables. Raises ValueError if that has another form or other tables.

        comfy-kitchen's own takes a table that is missing here from the other weight, as it is: shared by both.
        """
        form = [(p.orig_shape, p.transposed, _form(p), p._tensor_fields()) for p in (self, src)]
        if form[0] != form[1]:
            raise ValueError(f"a packed weight {form[0]} cannot take the values of {form[1]}")
        for name in self._tensor_fields():
            getattr(self, name).copy_(getattr(src, name), non_blocking=non_blocking)


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
        """Values [N, K], with the patches of the layer that owns the weight; `unwrap` gives the weight without them."""
        layer = params.owner.layer()
        patches = () if layer is None else layer.unseen_patches()
        if not patches:
            return _weight(qdata, params).dequantize(params.orig_dtype)
        return layer.patched(_weight(qdata, params).dequantize(torch.float32), patches).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata, *(getattr(qtensor.params, name) for name in qtensor.params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: PackedParams) -> dict[str, torch.Tensor]:
        """{suffix behind `<layer>.weight`: tensor}, as the native format names them."""
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def linear_input_act(cls, weight: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
        """Declines: whoever asks for a product with an activation computes both, and calls the layer or `_linear`."""
        return NotImplemented

    @classmethod
    def optimize_for_gemv(cls, weight: QuantizedTensor, storage: torch.Tensor) -> QuantizedTensor:
        """The weight as it is: its codes have one form for any number of tokens."""
        return weight


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
    """The packed weight inside a tensor made by `wrap` (also if that is transposed now).

    It is made once and stays with the tensor until that gets other codes or parameters.
    """
    codes, params = tensor._qdata, tensor._params
    if torch.compiler.is_compiling():  # a graph writes nothing to the tensors that come in
        return _weight(codes, params)
    made_of, weight = tensor.__dict__.get(UNWRAPPED, (None, None))
    # its class is another one where the plugin was imported twice
    if made_of is not params or weight.codes is not codes or type(weight) is not PackedWeight:
        weight = _weight(codes, params)
        setattr(tensor, UNWRAPPED, (params, weight))
    return weight


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """The tensor as a parameter that asks for no gradient and shares all memory with it.

    torch detaches what it makes a parameter of, and comfy-kitchen copies the tables of what is detached.
    """
    made = torch.nn.Parameter(tensor, requires_grad=False)
    if is_packed(tensor):
        made._params = tensor._params
    return made


def device_of(tensor: QuantizedTensor) -> torch.device:
    """Where the codes lie; `tensor.device` asks every class of tensors first, and takes longer than the answer."""
    return tensor._qdata.device


def mode_of(tensor: QuantizedTensor) -> str:
    """The mode that `wrap` was given."""
    return tensor._params.mode


def owned(weight: QuantizedTensor, layer: PackedLayer) -> None:
    """Tells a tensor made by `wrap` which layer it is the weight of.

    A product of the tensor itself, outside of the layer's forward, then has the patches that nobody else applies: those
    in `layer.unseen_patches()`. What the tensor is moved or cast to belongs to the layer too.
    """
    weight._params = dataclasses.replace(weight._params, owner=Owner(layer))


def _weight(codes: torch.Tensor, params: PackedParams) -> PackedWeight:
    shape = tuple(params.orig_shape)
    return PackedWeight(codes, shape=shape[::-1] if params.transposed else shape, **_described(params))


def _described(weight: PackedWeight | PackedParams) -> dict[str, Any]:
    """Everything of a packed weight but its codes and shape."""
    return {name: getattr(weight, name) for name in (*TABLES, *FORM)}


def _form(params: PackedParams) -> tuple:
    return tuple(getattr(params, name) for name in FORM)


def _product(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, with the patches of the layer that owns the weight."""
    layer = weight._params.owner.layer()
    patches = () if layer is None else layer.unseen_patches()
    if patches:
        return layer.product(x, weight, bias, patches)
    return kernels.linear(x, unwrap(weight), bias, mode_of(weight))


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _linear(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, bias = (*args, None)[:3]
    if is_packed(weight) and not weight._params.transposed and not isinstance(x, QuantizedTensor):
        return _product(x, weight, bias)
    return torch.nn.functional.linear(_dense(x), _dense(weight), _dense(bias))


def _mm(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight = args[:2]
    if is_packed(weight) and weight._params.transposed and not isinstance(x, QuantizedTensor):
        return _product(x, weight, None)
    return torch.mm(_dense(x), _dense(weight))


def _addmm(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    bias, x, weight = args[:3]
    plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1
    if plain and is_packed(weight) and weight._params.transposed and not isinstance(x, QuantizedTensor):
        return _product(x, weight, None) + bias
    return torch.addmm(_dense(bias), _dense(x), _dense(weight), **kwargs)


def _transpose(qt: QuantizedTensor, args: tuple, kwargs: dict[str, Any]) -> QuantizedTensor:
    params = qt._params
    turned = dataclasses.replace(params, orig_shape=tuple(params.orig_shape)[::-1], transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, LAYOUT, turned)


def _write(op: Callable) -> Callable:
    """Refuses to write into a packed weight; into a dense tensor `op` writes what it makes of one."""

    def handler(qt: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        if is_packed(args[0]):
            raise RuntimeError(
                "a Bonsai weight holds codes, and no value is written into it: change a dense copy of it instead"
            )
        return op(*map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})

    return handler


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
    for packet in (getattr(aten, name) for name in WRITES.split()):
        for overload in packet.overloads():
            op = getattr(packet, overload)
            register_layout_op(op, BonsaiPackedLayout)(_write(op))


_register()
