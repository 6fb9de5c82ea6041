"""LoRAs on packed layers: exact low-rank products beside the packed one. Nothing is rounded back to codes.

    y = x W^T + sum over patches of strength * alpha / rank * ((x[in-slice] down^T) up^T) on y[out-slice]

What is not plain low rank (DoRA, LoHa, LoKr, full differences, functions) is applied exactly too: the layer is unpacked
at each call, ComfyUI's own calculate_weight changes it, and the dense product is taken, some rows at a time where
rows.py can cut the patches. Which patches a layer has is for patcher.py and linear.py to say.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.lora
import torch

from .. import kernels
from . import comfyui
from .kept import Kept
from .rows import PLAIN_LORA, moved_to, on_rows

if TYPE_CHECKING:
    from comfy.model_patcher import LowVramPatch

logger = logging.getLogger(__name__)

LOWVRAM_PATCH = comfyui.optional("comfy.model_patcher.LowVramPatch") or ()
"""A class for isinstance, () where this ComfyUI has none."""
Span = tuple[int, int] | None
"""(start, length) of a slice of rows or columns, None for all of them."""


@dataclass(frozen=True)
class LowRank:
    """One plain LoRA on a slice of a layer: up [out, rank], down [rank, in], both as the file has them."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    rows: Span = None
    columns: Span = None

    def fits(self, shape: Sequence[int]) -> bool:
        """True if up and down have the size of the slice of a layer of `shape` (N, K)."""
        rows = shape[0] if self.rows is None else self.rows[1]
        columns = shape[1] if self.columns is None else self.columns[1]
        return (self.up.shape[0], self.up.shape[1], self.down.flatten(1).shape[1]) == (
            rows,
            self.down.shape[0],
            columns,
        )


class LayerPatches:
    """The patches of one layer of shape (N, K). `patches`: ComfyUI's list for the key, in its order.

    `terms`: them as plain LoRAs, None if one is something else. A LoRA of another size is left out and logged.
    """

    def __init__(self, key: str, patches: Sequence[tuple], shape: Sequence[int]) -> None:
        self.key, self.shape = key, tuple(shape)
        self.patches = list(patches)
        self.terms = plain_terms(self.patches)
        if self.terms is not None:
            fitting = [term for term in self.terms if term.fits(shape)]
            if len(fitting) < len(self.terms):
                logger.error("Bonsai: a LoRA does not fit %s %s and is left out there", key, list(shape))
            self.terms = fitting
        self._prepared: dict[tuple, list] = {}
        self._held: list[torch.Tensor] = []

    def add_to(self, y: torch.Tensor, x: torch.Tensor, keep: Kept | None) -> torch.Tensor:
        """y [.., N] plus what the patches make of x [.., K]; both in one dtype on one device.

        keep: where it admits them, the matrices stay on that device in that dtype for the next call. Raises
        RuntimeError while a CUDA graph is recorded if they lie elsewhere.
        """
        for rows, columns, down, up in self._matrices(x.device, x.dtype, keep):
            inner = torch.nn.functional.linear(x if columns is None else x.narrow(-1, *columns), down)
            if y.requires_grad or inner.requires_grad:
                y = y.clone()
            # In place: a buffer of y's size would cost more than the product itself.
            slice_ = y.view(-1, y.shape[-1])
            slice_ = slice_ if rows is None else slice_.narrow(-1, *rows)
            slice_.addmm_(inner.reshape(-1, inner.shape[-1]), up.t())
        return y

    def forget(self) -> None:
        """Drops the matrices that are kept."""
        self._prepared, self._held = {}, []

    @property
    def kept(self) -> list[torch.Tensor]:
        """The matrices that `add_to` and `rows_merged` hold for their next call."""
        return self._held

    @property
    def reads_original(self) -> bool:
        """True if a patch is the difference to the weight as it was loaded."""
        return any(model_as_lora(value) is not None for _, value, *_ in self.patches)

    def merged(self, weight: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight with all patches, by ComfyUI's own arithmetic in its dtype; `weight` itself may be changed.

        original: the weight as it was loaded, where `reads_original`.
        """
        originals = {} if original is None else {self.key: [(original,)]}
        return comfy.lora.calculate_weight(
            self.patches, weight, self.key, intermediate_dtype=weight.dtype, original_weights=originals
        )

    @functools.cached_property
    def by_rows(self) -> bool:
        """True if `rows_merged` can be asked."""
        return on_rows(self.patches, self.shape, 0, self.shape[0]) is not None

    def rows_merged(self, device: torch.device, keep: Kept | None) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
        """`merged` of some rows alone: a function of (rows first .. last - 1, which it may change, first, last).

        Its matrices are sent to `device` once. keep: as for add_to.
        """
        moved = self._on_device(device, keep)

        def merged(weight: torch.Tensor, first: int, last: int) -> torch.Tensor:
            patches = on_rows(moved, self.shape, first, last)
            return comfy.lora.calculate_weight(patches, weight, self.key, intermediate_dtype=weight.dtype)

        return merged

    def _on_device(self, device: torch.device, keep: Kept | None) -> list[tuple]:
        """The patches with the matrices of adapters on `device`; whole tensors stay, they are sent row by row."""
        place = (device,)
        if place not in self._prepared:
            moved = [(patch[0], moved_to(patch[1], device), *patch[2:]) for patch in self.patches]
            pairs = [(a[1].weights, b[1].weights) for a, b in zip(moved, self.patches, strict=True) if a[1] is not b[1]]
            sent = [a for pair in pairs for a, b in zip(*pair, strict=True) if a is not b]
            if not sent or not self._keep(place, moved, sent, keep):
                return moved
        return self._prepared[place]

    def _keep(self, place: tuple, prepared: list, matrices: list[torch.Tensor], keep: Kept | None) -> bool:
        # a graph's memory holds them while it runs and no longer
        if keep is None or kernels.capturing():
            return False
        # torch.compile would follow what is asked here through all layers: it keeps them unasked, as long as the patch
        if not torch.compiler.is_compiling() and not keep.admits(self, sum(m.nbytes for m in matrices)):
            return False
        self._prepared, self._held = {place: prepared}, matrices
        return True

    def _matrices(self, device: torch.device, dtype: torch.dtype, keep: Kept | None) -> list:
        """[(rows, columns, down [R, in], up [out, R])]: terms on the same slices joined, factors folded into up."""
        place = (device, dtype)
        if place in self._prepared:
            return self._prepared[place]
        if kernels.capturing():
            self._refuse_elsewhere(device)
        slices: dict[tuple[Span, Span], list[LowRank]] = {}
        for term in self.terms:
            slices.setdefault((term.rows, term.columns), []).append(term)
        matrices = []
        for (rows, columns), terms in slices.items():
            down = torch.cat([t.down.flatten(1).to(device, dtype) for t in terms])
            up = torch.cat([(t.up.flatten(1).to(device, torch.float32) * t.factor).to(dtype) for t in terms], dim=1)
            matrices.append((rows, columns, down, up))
        self._keep(place, matrices, [matrix for *_, down, up in matrices for matrix in (down, up)], keep)
        return matrices

    def _refuse_elsewhere(self, device: torch.device) -> None:
        if any(matrix.device != device for term in self.terms for matrix in (term.up, term.down)):
            raise RuntimeError(
                f"a LoRA on {self.key} is not on {device}, and nothing can be moved there while a CUDA graph is "
                "recorded: start ComfyUI with --disable-cuda-graphs to use LoRAs here"
            )


def plain_terms(patches: Sequence[tuple]) -> list[LowRank] | None:
    """The patches as low-rank terms, None if one of them is something else."""
    terms = []
    for strength, value, strength_model, offset, function in patches:
        if strength_model != 1.0 or function is not None or not isinstance(value, PLAIN_LORA):
            return None
        up, down, alpha, middle, dora_scale, reshape = value.weights
        if middle is not None or dora_scale is not None or reshape is not None:
            return None
        factor = float(strength) * (float(alpha) / down.shape[0] if alpha is not None else 1.0)
        span = None if offset is None else (offset[1], offset[2])
        rows, columns = (span, None) if offset is None or offset[0] == 0 else (None, span)
        terms.append(LowRank(up, down, factor, rows, columns))
    return terms


def merges_models(patches: Sequence[tuple]) -> bool:
    """True if a patch scales the base weight or brings a whole other weight: a merge, whose result is dense."""
    return any(strength_model != 1.0 or isinstance(value, list) for _, value, strength_model, _, _ in patches)


def model_as_lora(value: Any) -> torch.Tensor | None:
    """The weight to which the patch of a hook leads from the loaded one; None if it is another kind of patch."""
    return value[1][0] if isinstance(value, tuple) and len(value) == 2 and value[0] == "model_as_lora" else None


def patches_of(patch: LowVramPatch, shape: Sequence[int]) -> LayerPatches:
    """What a ComfyUI LowVramPatch does to a layer of `shape` (N, K), made once a patch."""
    made = made_of(patch)
    if made is None:
        made = patch.bonsai_patches = LayerPatches(patch.key, patch.patches[patch.key], shape)
    return made


def made_of(patch: LowVramPatch | None) -> LayerPatches | None:
    """What `patches_of` made of it, None if it made nothing yet."""
    return getattr(patch, "bonsai_patches", None)


def hand_over(old: LowVramPatch | None, new: LowVramPatch | None) -> None:
    """Lets a patch have what was made of the one before it, if they are the same: its matrices may be kept.

    Dynamic VRAM makes its patches anew each time a model is sampled.
    """
    made = made_of(old)
    if made is not None and new is not None and made_of(new) is None:
        patches = new.patches[new.key]
        if len(patches) == len(made.patches) and all(a is b for a, b in zip(patches, made.patches, strict=True)):
            new.bonsai_patches = made
