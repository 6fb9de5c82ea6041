"""LoRAs put into the weights of a file: into the residual of a packed layer, or merged into a dense tensor.

    up down + sum over LoRAs of (strength alpha / rank) up_i down_i  =  [up, f_1 up_1, ..] [down; down_1; ..]

The product on the right is the one on the left, to the order of its sums. A LoRA on a slice of rows or columns, as of
q, k or v, is put among rows or columns of zeros. Matrices keep their dtype where it holds them exactly, else they are
fp32. A dense tensor takes any patch, by ComfyUI's arithmetic in fp32; a matrix is then rounded as the model rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..weights.finite import NOT_FINITE, is_finite
from ..weights.packed_weight import PackedWeight, narrow_exact
from .lora import LayerPatches, LowRank, plain_terms
from .rows import PLAIN_LORA
from .tensors import PREFIX

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Weights = dict[str, PackedWeight | torch.Tensor]
WAY_OUT = "Turn include_loras off to save the model without its LoRAs, or take that one away."


@dataclass(frozen=True)
class Folded:
    """What became of the LoRAs. ranks: of the residual of each packed layer that took some. merged: dense tensors.

    nbytes: by how much the weights grew.
    """

    ranks: Mapping[str, int]
    merged: Sequence[str]
    nbytes: int

    def __str__(self) -> str:
        if not self.ranks and not self.merged:
            return "LoRAs: there are none on this model"
        low, high = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        rank = f"{low}" if low == high else f"{low} to {high}"
        parts = [f"in {len(self.ranks)} packed layers (rank {rank})"] if self.ranks else []
        parts += [f"merged into {len(self.merged)} dense tensors"] if self.merged else []
        return f"LoRAs: {', '.join(parts)}, {self.nbytes / 1e6:+.1f} MB"


def fold_loras(model: ModelPatcher, weights: Weights) -> tuple[Weights, Folded]:
    """(the weights with the LoRAs of the ModelPatcher in them, what became of these). weights: {ComfyUI's name: ..}.

    Raises ValueError for what is no plain LoRA on a packed layer, for one of no finite values and for changes that a
    file cannot hold.
    """
    patches = {name: p for name in weights if (p := model.patches.get(PREFIX + name))}
    _refuse_others(model, weights, patches)
    folded, ranks, merged = dict(weights), {}, []
    for name, found in patches.items():
        weight = weights[name]
        layer = LayerPatches(PREFIX + name, found, weight.shape)
        if isinstance(weight, PackedWeight):
            terms = [term for term in layer.terms if term.factor]
            if not terms:
                continue
            folded[name] = _into_residual(weight, terms)
            ranks[name.removesuffix(".weight")] = folded[name].rank
        else:
            folded[name] = _into_dense(weight, layer, model.model.get_dtype_inference())
            merged.append(name)
        if not all(is_finite(t) for t in _tensors(folded[name])):
            raise ValueError(f"with its LoRA {name} {NOT_FINITE}. {WAY_OUT}")
    nbytes = sum(folded[name].nbytes - weights[name].nbytes for name in patches)
    return folded, Folded(ranks, merged, nbytes)


def _refuse_others(model: ModelPatcher, weights: Weights, patches: Mapping[str, Sequence[tuple]]) -> None:
    """Raises ValueError for the first change of the model's weights that cannot be folded."""
    for name, found in patches.items():
        if not isinstance(weights[name], PackedWeight):
            continue
        other = next((patch for patch in found if plain_terms([patch]) is None), None)
        if other is not None:
            raise ValueError(
                f"{name} carries {_kind(other)}, no plain LoRA: it would make the packed layer dense. {WAY_OUT}"
            )
    if "bypass_lora" in model.injections:
        raise ValueError(
            "this model carries a LoRA in bypass mode, which ComfyUI keeps outside of the weights. Load it with Load "
            "LoRA instead, or turn include_loras off."
        )
    if wrapped := next(iter(model.weight_wrapper_patches), None):
        raise ValueError(f"a node wraps the weight {wrapped}, which no file can hold. {WAY_OUT}")


def _kind(patch: tuple) -> str:
    """What a patch of ComfyUI is, for a message."""
    _, value, _, _, function = patch
    if isinstance(value, tuple):
        return {"diff": "a full difference", "set": "a new weight"}.get(value[0], f"a patch of the kind {value[0]!r}")
    if not isinstance(value, PLAIN_LORA):
        return f"a patch of the kind {getattr(value, 'name', type(value).__name__)}"
    _, _, _, middle, dora_scale, _ = value.weights
    if dora_scale is not None:
        return "a DoRA"
    if function is not None:
        return "a LoRA behind a function"
    return "a LoRA with a middle matrix" if middle is not None else "a LoRA of another shape"


def _into_residual(weight: PackedWeight, terms: Sequence[LowRank]) -> PackedWeight:
    rows, columns = weight.shape
    place = {"dtype": torch.float32, "device": weight.codes.device}
    ups, downs = [], []
    if weight.up is not None:
        ups, downs = [weight.up.float()], [weight.down.float()]
    for term in terms:
        up, down = (term.up.flatten(1).to(**place) * term.factor, term.down.flatten(1).to(**place))
        ups.append(_among_zeros(up, 0, term.rows, rows))
        downs.append(_among_zeros(down, 1, term.columns, columns))
    return replace(weight, up=narrow_exact(torch.cat(ups, dim=1)), down=narrow_exact(torch.cat(downs)))


def _among_zeros(matrix: torch.Tensor, dim: int, span: tuple[int, int] | None, size: int) -> torch.Tensor:
    """The matrix at `span` of dimension `dim` of one of that `size`; itself if it is the whole."""
    if span is None:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = size
    whole = matrix.new_zeros(shape)
    whole.narrow(dim, *span).copy_(matrix)
    return whole


def _into_dense(weight: torch.Tensor, patches: LayerPatches, dtype: torch.dtype) -> torch.Tensor:
    """The dense tensor with any patches; a matrix in `dtype`, in which the model computes with it."""
    merged = patches.merged(weight.detach().to(torch.float32, copy=True))
    if merged.shape != weight.shape:
        raise ValueError(f"a LoRA makes {patches.key} {list(merged.shape)} of {list(weight.shape)}. {WAY_OUT}")
    return narrow_exact(merged.to(dtype) if merged.ndim > 1 else merged)


def _tensors(weight: PackedWeight | torch.Tensor) -> list[Any]:
    return list(weight.tables().values()) if isinstance(weight, PackedWeight) else [weight]
