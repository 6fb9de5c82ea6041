"""LoRAs on packed layers: an exact low-rank branch beside the packed matmul. Nothing is rounded back to codes.

    y = x W^T + sum over patches of strength * alpha / rank * ((x[in-slice] down^T) up^T) on y[out-slice]

`PackedPatcher` is mixed into ComfyUI's ModelPatcher: it leaves the patch list of a packed layer on the layer instead of
merging it into the weight. The layer finds its patches wherever ComfyUI put them: there (resident), in a LowVramPatch
among its weight functions (offloaded) or in `weight_lowvram_function` (dynamic VRAM). While the model is sampled the
patcher also lets the CPU backend keep memory (backends/reuse.py).

What is not plain low rank (DoRA, LoHa, LoKr, full differences, functions) is applied exactly too: the layer is unpacked
at each call, ComfyUI's own calculate_weight changes it, and the dense product is taken. Merges of whole models (a
strength on the base weight other than 1) turn the layer dense until the patches are removed, as ComfyUI does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.lora
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import comfy.weight_adapter
import torch

from ..kernels.cpu import reuse
from .layout import is_packed

logger = logging.getLogger(__name__)

CALLBACK_KEY = "bonsai"
LOWVRAM_PATCH = comfy.model_patcher.LowVramPatch
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


class SideBranch:
    """The patches of one layer of shape (N, K). `patches`: ComfyUI's list for the key, in its order.

    `terms`: them as plain LoRAs, None if one is something else. A LoRA of another size is left out and logged.
    """

    def __init__(self, key: str, patches: Sequence[tuple], shape: Sequence[int]) -> None:
        self.key = key
        self.patches = list(patches)
        self.terms = plain_terms(self.patches)
        if self.terms is not None:
            fitting = [term for term in self.terms if term.fits(shape)]
            if len(fitting) < len(self.terms):
                logger.error("Bonsai: a LoRA does not fit %s %s and is left out there", key, list(shape))
            self.terms = fitting
        self._prepared: dict[tuple, list] = {}

    def add_to(self, y: torch.Tensor, x: torch.Tensor, keep: bool) -> torch.Tensor:
        """y [.., N] plus the branch of x [.., K]; both in one dtype on one device.

        keep: hold the matrices on that device in that dtype for the next call (resident layers).
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
        """Drops the matrices that `add_to` kept."""
        self._prepared = {}

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense weight with all patches, by ComfyUI's own arithmetic in the weight's dtype."""
        return comfy.lora.calculate_weight(self.patches, weight, self.key, intermediate_dtype=weight.dtype)

    def _matrices(self, device: torch.device, dtype: torch.dtype, keep: bool) -> list:
        """[(rows, columns, down [R, in], up [out, R])]: terms on the same slices joined, factors folded into up."""
        place = (device, dtype)
        if place in self._prepared:
            return self._prepared[place]
        slices: dict[tuple[Span, Span], list[LowRank]] = {}
        for term in self.terms:
            slices.setdefault((term.rows, term.columns), []).append(term)
        matrices = []
        for (rows, columns), terms in slices.items():
            down = torch.cat([t.down.flatten(1).to(device, dtype) for t in terms])
            up = torch.cat([(t.up.flatten(1).to(device, torch.float32) * t.factor).to(dtype) for t in terms], dim=1)
            matrices.append((rows, columns, down, up))
        if keep:
            self._prepared = {place: matrices}
        return matrices


def plain_terms(patches: Sequence[tuple]) -> list[LowRank] | None:
    """The patches as low-rank terms, None if one of them is something else."""
    terms = []
    for strength, value, strength_model, offset, function in patches:
        if strength_model != 1.0 or function is not None or not isinstance(value, comfy.weight_adapter.LoRAAdapter):
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


def branch_of(patch: object, shape: Sequence[int]) -> SideBranch:
    """The side branch of a ComfyUI LowVramPatch on a layer of `shape` (N, K), made once a patch."""
    branch = getattr(patch, "bonsai_branch", None)
    if branch is None:
        branch = patch.bonsai_branch = SideBranch(patch.key, patch.patches[patch.key], shape)
    return branch


class PackedPatcher:
    """Mixed into a ModelPatcher class by `adopt`. Only packed layers behave differently."""

    def _packed_module(self, key: str) -> torch.nn.Module | None:
        """The module whose packed weight has this key, None if there is none."""
        name, _, leaf = key.rpartition(".")
        if leaf != "weight" or not name:
            return None
        module = comfy.utils.get_attr(self.model, name)
        return module if is_packed(getattr(module, "weight", None)) else None

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, **kwargs):
        module = self._packed_module(key)
        patches = self.patches.get(key)
        if module is None or (patches is not None and merges_models(patches) and not return_weight):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        if return_weight:
            return module.weight if device_to is None else module.weight.to(device_to)
        if kwargs.get("force_cast") and device_to is not None and module.weight.device != torch.device(device_to):
            if key not in self.backup:
                self.backup[key] = _Backup(module.weight, False)
            comfy.utils.set_attr_param(self.model, key, module.weight.to(device_to))
        module.weight_lowvram_function = None  # left over if dynamic VRAM streamed this layer before
        module.resident_patch = None if patches is None else SideBranch(key, patches, module.weight.shape)
        return module.weight

    def load(self, *args, **kwargs):
        result = super().load(*args, **kwargs)
        self._report_slow_patches()
        return result

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for module in self.model.modules():
                if hasattr(module, "resident_patch"):
                    module.resident_patch = None

    def state_dict_for_saving(self, *args, **kwargs):
        """What ComfyUI's save nodes write. Raises ValueError if a packed layer carries a LoRA."""
        with self._storable():
            return super().state_dict_for_saving(*args, **kwargs)

    def model_state_dict_for_saving(self, *args, **kwargs):
        """The same for one part of the model, in versions of ComfyUI that have it."""
        with self._storable():
            return super().model_state_dict_for_saving(*args, **kwargs)

    @contextlib.contextmanager
    def _storable(self) -> Iterator[None]:
        """Inside, our layers count as resident, so that ComfyUI takes their tensors from the state dict as they are.

        Its lazily cast parameters, meant for offloaded layers, hold neither uint8 nor a result of another dtype. An
        offloaded layer of a merge is merged inside, as it would be if it were resident.
        """
        ours = {n: m for n, m in self.model.named_modules() if hasattr(m, "resident_patch") and m.weight is not None}
        patched = {name: patches for name in ours if (patches := self.patches.get(f"{name}.weight"))}
        _refuse_loras([n for n, p in patched.items() if is_packed(ours[n].weight) and not merges_models(p)])
        before = [(m, m.weight, getattr(m, "comfy_patched_weights", None)) for m in ours.values()]
        try:
            for name, patches in patched.items():
                module = ours[name]
                if is_packed(module.weight) or getattr(module, "comfy_patched_weights", None) is not True:
                    dense = module.convert_weight(module.weight.to(torch.float32, copy=True))
                    module.set_weight(SideBranch(f"{name}.weight", patches, dense.shape).merged(dense))
            for module in ours.values():
                module.comfy_patched_weights = True
            yield
        finally:
            for module, weight, resident in before:
                module.weight = weight
                if resident is None:
                    del module.comfy_patched_weights
                else:
                    module.comfy_patched_weights = resident

    def pre_run(self):
        super().pre_run()
        if not torch.is_grad_enabled():  # training keeps results for its backward pass
            reuse.open()

    def cleanup(self):
        super().cleanup()
        reuse.close()

    def patch_hooks(self, hooks):
        self.cached_hook_patches.clear()  # ComfyUI's cache holds merged weights; a packed layer has none to cache
        super().patch_hooks(hooks)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        module = self._packed_module(key)
        if module is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        elif key in combined_patches:
            module.hook_patch = SideBranch(key, combined_patches[key], module.weight.shape)
            original_weights.pop(key, None)

    def unpatch_hooks(self, whitelist_keys_set=None):
        for module in self.model.modules():
            if getattr(module, "hook_patch", None) is not None:
                module.hook_patch = None
        self._give_back(whitelist_keys_set)
        super().unpatch_hooks(whitelist_keys_set)

    def _give_back(self, keys: set[str] | None) -> None:
        """Puts back the weights that hooks replaced, of all keys if none are given.

        ComfyUI copies the values back instead, which would leave them in the merged dtype.
        """
        for key in list(self.hook_backup):
            if not keys or key in keys:
                weight, device = self.hook_backup.pop(key)
                comfy.utils.set_attr_param(self.model, key, weight.to(device))

    def _report_slow_patches(self) -> None:
        slow = [
            key
            for key, patches in self.patches.items()
            if self._packed_module(key) is not None and plain_terms(patches) is None
        ]
        if slow and getattr(self, "_reported_patches", None) != self.patches_uuid:
            self._reported_patches = self.patches_uuid
            logger.info(
                "Bonsai: %d layers (%s, ..) carry patches that are not plain LoRA; they are unpacked at each "
                "step: exact, but slower",
                len(slow),
                slow[0],
            )


def _refuse_loras(layers: Sequence[str]) -> None:
    """Raises ValueError if there are packed layers with a LoRA; `layers`: their names."""
    if layers:
        raise ValueError(
            f"{len(layers)} packed layers ({layers[0]}, ..) carry a LoRA, which cannot be merged into their codes "
            "nor be kept apart in this file. Save the model without it: Save Bonsai Model leaves LoRAs out."
        )


@dataclass
class _Backup:
    """What ComfyUI keeps of a weight it replaced."""

    weight: torch.Tensor
    inplace_update: bool


@functools.cache
def _patcher_class(base: type) -> type:
    """`base` with PackedPatcher in front; the same class for the same base."""
    return type(f"Bonsai{base.__name__}", (PackedPatcher, base), {})


def adopt(patcher: object) -> None:
    """Makes a ModelPatcher, and every clone of it, leave packed weights packed."""
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _patcher_class(type(patcher))
    on_clone = comfy.patcher_extension.CallbacksMP.ON_CLONE
    if not patcher.get_callbacks(on_clone, CALLBACK_KEY):
        patcher.add_callback_with_key(on_clone, CALLBACK_KEY, _adopt_clone)


def _adopt_clone(patcher: object, clone: object) -> None:
    adopt(clone)
