"""ComfyUI operations whose Linear (and Embedding) hold packed weights: `custom_operations=make_bonsai_ops()`.

The modules own no dense memory before a state dict arrives. A packed entry of it (a QuantizedTensor from layout.py) is
multiplied in packed form, wherever it lies, with its LoRAs as products beside it (lora.py); a dense entry behaves as in
ComfyUI's manual_cast operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import kernels
from ..weights.packed_weight import SCRATCH_BYTES, PackedWeight
from .adapters import branches, low_rank, values_of
from .kept import Kept
from .layout import as_parameter, device_of, is_packed, mode_of, owned, unwrap
from .lora import LOWVRAM_PATCH, LayerPatches, hand_over, made_of, patches_of, plain_terms
from .rows import on_rows

if TYPE_CHECKING:
    from comfy.model_patcher import LowVramPatch


class _PackedModule(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """What Linear and Embedding share: loading, moving and saving a weight that may be a QuantizedTensor."""

    comfy_cast_weights = True
    kept_loras: Kept
    """What the LoRAs of the model keep on the device."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.compute_dtype = dtype
        self.weight_function: list[Callable] = []
        self.bias_function: list[Callable] = []
        self.resident_patch: LayerPatches | None = None
        self.hook_patch: LayerPatches | None = None
        self._dynamic_patch: LowVramPatch | None = None
        self.bias_lowvram_function: LowVramPatch | None = None
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def weight_scale(self) -> torch.Tensor | None:
        """Scale table [N, K / group] of a packed weight, None for a dense one (merge nodes look it up by this name)."""
        return unwrap(self.weight).scale if is_packed(self.weight) else None

    @property
    def weight_zero(self) -> torch.Tensor | None:
        """Zero table like `weight_scale`, None where the weight has none."""
        return unwrap(self.weight).zero if is_packed(self.weight) else None

    @property
    def weight_up(self) -> torch.Tensor | None:
        """Left matrix [N, r] of a packed weight's residual, None without one."""
        return unwrap(self.weight).up if is_packed(self.weight) else None

    @property
    def weight_down(self) -> torch.Tensor | None:
        """Right matrix [r, K] of a packed weight's residual, None without one."""
        return unwrap(self.weight).down if is_packed(self.weight) else None

    @property
    def weight_lowvram_function(self) -> LowVramPatch | None:
        """Where dynamic VRAM puts a patch that it would merge and round; hidden from it while the weight is packed."""
        return None if is_packed(self.weight) else self._dynamic_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: LowVramPatch | None) -> None:
        hand_over(self._dynamic_patch, patch)
        self._dynamic_patch = patch

    def _offloaded(self) -> list[LowVramPatch]:
        """The patches that ComfyUI has merged into an offloaded weight at each call."""
        found = [f for f in self.weight_function if isinstance(f, LOWVRAM_PATCH)]
        return found if self._dynamic_patch is None else [*found, self._dynamic_patch]

    def _layer_patches(self) -> list[LayerPatches]:
        """The patches on a packed weight; those of an offloaded layer's LowVramPatch stand for its resident_patch."""
        if not self.weight_function and self._dynamic_patch is self.resident_patch is self.hook_patch is None:
            return []
        found = [patches_of(f, self.weight.shape) for f in self._offloaded()] or [self.resident_patch]
        return [p for p in (*found, self.hook_patch) if p is not None]

    def unseen_patches(self) -> list[LayerPatches]:
        """The patches that are lost on whoever casts and multiplies the packed weight itself, as ComfyUI does here and
        there: all but the weight functions, which its cast applies."""
        applied = [f for f in self.weight_function if isinstance(f, LOWVRAM_PATCH)]
        if not applied:
            return self._layer_patches()
        return [] if self.hook_patch is None else [self.hook_patch]

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if is_packed(param):
            owned(param, self)

    def resident_weight(self) -> torch.Tensor:
        """What would lie in memory if the weight were dense, in its dtype: with patches, but for offloaded ones."""
        patches = [None if self._offloaded() else self.resident_patch, self.hook_patch]
        dense = unwrap(self.weight).dequantize(torch.float32)
        return self.patched(dense, [p for p in patches if p is not None]).to(self.weight.dtype)

    def _wrappers(self) -> list[Callable]:
        """Weight functions that are no patches: what `ModelPatcher.add_weight_wrapper` put there."""
        return [f for f in self.weight_function if not isinstance(f, LOWVRAM_PATCH)]

    def patched(
        self, dense: torch.Tensor, patches: Sequence[LayerPatches], wrappers: Sequence[Callable] = ()
    ) -> torch.Tensor:
        """The unpacked fp32 weight with patches merged and wrappers applied; `dense` itself may be changed."""
        original = dense.clone() if any(patch.reads_original for patch in patches) else None
        for patch in patches:
            dense = patch.merged(dense, original)
        for function in wrappers:
            dense = function(dense)
        return dense

    def product(
        self,
        x: torch.Tensor,
        weight: QuantizedTensor,
        bias: torch.Tensor | None,
        patches: Sequence[LayerPatches],
        wrappers: Sequence[Callable] = (),
        keep: Kept | None = None,
    ) -> torch.Tensor:
        """x W^T + bias with patches and wrappers; the packed weight lies on x's device. keep: as for add_to."""
        trained = branches(wrappers) if wrappers else []
        if trained is None or any(patch.terms is None for patch in patches):
            # a gradient needs all of the weight later on; a compiled graph would have a copy of the code for each piece
            whole = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
            if not (wrappers or whole) and all(patch.by_rows for patch in patches):
                return self._product_by_rows(x, unwrap(weight), bias, patches, keep)
            dense = self.patched(unwrap(weight).dequantize(torch.float32), patches, wrappers)
            return torch.nn.functional.linear(x, dense.to(x.dtype), bias)
        first = low_rank(wrappers[0]) if wrappers else None
        if first is not None:
            trained = trained[1:]
        y = kernels.linear(x, unwrap(weight), None if trained else bias, mode_of(weight), first)
        for patch in patches:
            y = patch.add_to(y, x, keep)
        for branch in trained:
            y = branch(x, y)
        return y + bias if trained and bias is not None else y

    def _product_by_rows(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        patches: Sequence[LayerPatches],
        keep: Kept | None,
    ) -> torch.Tensor:
        """x W^T + bias with patches that can be cut, as many rows at a time as `pieces` unpacks."""
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        merges = [patch.rows_merged(x.device, keep) for patch in patches]
        for first, last, dense in weight.pieces(torch.float32):
            for merge in merges:
                dense = merge(dense, first, last)
            part = None if bias is None else bias[first:last]
            y[..., first:last] = torch.nn.functional.linear(x, dense.to(x.dtype), part)
        return y

    def scratch_bytes(self, patches: Sequence[tuple], wrappers: Sequence[Callable] = ()) -> int | None:
        """Bytes that a call may take beside the packed weight and its inputs, with these patches of ComfyUI and these
        functions of the weight.

        None where it unpacks the whole weight.
        """
        terms, trained = plain_terms(patches), values_of(wrappers)
        if trained is None or (terms is None and wrappers):
            return None
        if terms is None:
            shape = self.weight.shape
            return None if on_rows(patches, shape, 0, shape[0]) is None else 3 * SCRATCH_BYTES
        values = trained + sum(term.up.numel() + term.down.numel() for term in terms)
        if trained:  # the residual is multiplied with what is trained, in one
            values += 0 if self.weight_up is None else self.weight_up.numel() + self.weight_down.numel()
        return SCRATCH_BYTES + self.weight.dtype.itemsize * values

    def _cast_packed(self, device: torch.device, bias_dtype: torch.dtype) -> tuple:
        """(packed weight, bias, stream) on `device`: ComfyUI moves the codes, its weight functions stay away."""
        functions = self.weight_function
        if functions:
            self.weight_function = []
        try:
            return comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype, device=device, bias_dtype=bias_dtype, offloadable=True
            )
        finally:
            if functions:
                self.weight_function = functions

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                self.register_parameter(name, as_parameter(value))
            elif name == "weight" or self.has_bias:
                missing_keys.append(prefix + name)
        if strict:
            own = (f"{prefix}weight", f"{prefix}bias")
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in own]

    def state_dict(self, *args: Any, destination: dict | None = None, prefix: str = "", **kwargs: Any) -> dict:
        """{prefix + weight, weight_scale, weight_zero, bias}: codes and tables, as our files store them."""
        destination = {} if destination is None else destination
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        if is_packed(self.weight):
            destination.update(self.weight.state_dict(f"{prefix}weight"))
        elif self.weight is not None:
            destination[f"{prefix}weight"] = self.weight
        return destination

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        """Module._apply sets `param.data`, which a QuantizedTensor does not support: put a new Parameter instead.

        What the patches hold for the old place goes with it. A tensor from outside of inference mode is moved outside
        of it: inside, torch makes no Parameter of what it becomes.
        """
        for patches in (self.resident_patch, self.hook_patch, made_of(self._dynamic_patch)):
            if patches is not None:
                patches.forget()
        for name, param in self._parameters.items():
            if param is None:
                continue
            with torch.inference_mode(torch.is_inference_mode_enabled() and param.is_inference()):
                moved = _leave_inference(fn(param))
                self.register_parameter(name, as_parameter(moved))
        return self

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Dense values of the weight for whoever wants to add a patch to them: without those that it has."""
        if is_packed(weight):
            return unwrap(weight).dequantize(weight.dtype)
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Takes a patched dense weight as it is, in the dtype the model computes in."""
        weight = weight.to(self.compute_dtype or self.weight.dtype)
        if return_weight:
            return weight
        self.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
        return None


class PackedLinear(_PackedModule):
    """y = x W^T + bias with W packed or dense."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., in_features] -> [.., out_features], computed in x's dtype on x's device."""
        comfy.ops.run_every_op()
        if is_packed(packed := self.weight):
            return self._packed_forward(x, packed)
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        y = torch.nn.functional.linear(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _packed_forward(self, x: torch.Tensor, packed: QuantizedTensor) -> torch.Tensor:
        patches, wrappers = self._layer_patches(), self._wrappers()
        in_place, bias = device_of(packed) == x.device, self.bias
        if not torch.compiler.is_compiling():
            x = _in_autocast(x)
        elif in_place and not (patches or wrappers):
            return torch.nn.functional.linear(x, packed, bias)
        # an offloaded layer keeps none: ComfyUI left no room for more than its weight
        keep = self.kept_loras if in_place or self._dynamic_patch is not None else None
        if in_place and (bias is None or self._bias_is_plain(x.device)):
            # a cast would do no more, and takes longer than the rest of a small call
            bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
            return self.product(x, packed, bias, patches, wrappers, keep)
        weight, bias, stream = self._cast_packed(x.device, x.dtype)
        y = self.product(x, weight, bias, patches, wrappers, keep)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _bias_is_plain(self, device: torch.device) -> bool:
        """True if ComfyUI's cast would neither move the bias nor patch it."""
        patched = self.bias_function or self.bias_lowvram_function is not None
        return self.bias.device == device and not patched

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.has_bias}, packed={is_packed(self.weight)}"


class PackedEmbedding(_PackedModule):
    """Rows of a table [vocabulary, channels], packed or dense."""

    has_bias = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def scratch_bytes(self, patches: Sequence[tuple], wrappers: Sequence[Callable] = ()) -> int | None:
        """None with patches or wrappers, else 0: only the rows that are read are unpacked, and they are the result."""
        return None if patches or wrappers else 0

    def forward(self, index: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """index int64 [..] -> rows [.., channels] in `out_dtype` (default: the weight's dtype)."""
        comfy.ops.run_every_op()
        dtype = out_dtype or self.weight.dtype
        if is_packed(self.weight):
            weight, _, stream = self._cast_packed(index.device, dtype)
            patches, wrappers = self._layer_patches(), self._wrappers()
            if patches or wrappers:
                dense = self.patched(unwrap(weight).dequantize(torch.float32), patches, wrappers)
                rows = torch.nn.functional.embedding(index, dense).to(dtype)
            else:
                rows = unwrap(weight).select_rows(index.reshape(-1), dtype).view(*index.shape, self.embedding_dim)
        else:
            weight, _, stream = comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype, device=index.device, offloadable=True
            )
            rows = torch.nn.functional.embedding(index, weight, self.padding_idx).to(dtype)
        comfy.ops.uncast_bias_weight(self, weight, None, stream)
        return rows


_may_autocast = functools.cache(torch.amp.is_autocast_available)
"""Asked by every call of a layer."""


def _in_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that torch's own linear computes in here: within autocast, as while ComfyUI trains, in another."""
    kind = x.device.type
    if not _may_autocast(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _leave_inference(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or outside of inference mode a copy of one that was made inside."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def make_bonsai_ops() -> type:
    """A fresh operations class for one load: nothing set on it reaches another model."""
    kept = Kept()

    class BonsaiOps(comfy.ops.manual_cast):
        class Linear(PackedLinear):
            kept_loras = kept

        class Embedding(PackedEmbedding):
            kept_loras = kept

    return BonsaiOps
