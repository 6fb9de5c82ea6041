"""A ModelPatcher that leaves packed weights packed, whatever is patched onto them.

`PackedPatcher` is mixed into ComfyUI's ModelPatcher: it leaves the patch list of a packed layer on the layer instead of
merging it into the weight. The layer finds its patches wherever ComfyUI put them: there (resident), in a LowVramPatch
among its weight functions (offloaded) or in `weight_lowvram_function` (dynamic VRAM). While the model is sampled the
patcher also lets the kernels keep memory from step to step, and afterwards gives back what is mapped from files.

Merges of whole models (a strength on the base weight other than 1) turn the layer dense until the patches are removed,
as ComfyUI does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import comfy.utils
import torch

from .. import kernels
from ..weights.mapped import give_back
from ..weights.packed_weight import TABLES
from .dense_on_read import DenseOnRead
from .kept import Kept
from .layout import as_parameter, is_packed, unwrap
from .lora import LayerPatches, merges_models, model_as_lora, plain_terms
from .model_class import is_dynamic
from .record import saved_record, saved_text_record
from .tensors import tensors_of

if TYPE_CHECKING:
    from comfy.hooks import HookGroup, WeightHook
    from comfy.model_patcher import MemoryCounter, ModelPatcher
    from comfy.model_patcher import ModelPatcher as Mixed
else:
    Mixed = object

logger = logging.getLogger(__name__)

CALLBACK_KEY = "bonsai"


class PackedPatcher(Mixed):
    """Mixed into a ModelPatcher class by `adopt`. Only packed layers behave differently."""

    def _packed_module(self, key: str) -> torch.nn.Module | None:
        """The module whose packed weight has this key, None if there is none."""
        name, _, leaf = key.rpartition(".")
        if leaf != "weight" or not name:
            return None
        module = comfy.utils.get_attr(self.model, name)
        return module if is_packed(getattr(module, "weight", None)) else None

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        if return_weight and is_packed(self._base(key)):
            return self._patched_weight(key, device_to)
        module = self._packed_module(key)
        patches = self.patches.get(key)
        if module is None or (patches is not None and merges_models(patches)):
            if module is not None and key not in self.backup:
                self.backup[key] = _Backup(_parameter(module.weight, self.offload_device), False)
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **kwargs)
        if kwargs.get("force_cast") and device_to is not None and module.weight.device != torch.device(device_to):
            if key not in self.backup:
                self.backup[key] = _Backup(module.weight, False)
            comfy.utils.set_attr_param(self.model, key, module.weight.to(device_to))
        module.weight_lowvram_function = None  # left over if dynamic VRAM streamed this layer before
        module.resident_patch = None if patches is None else LayerPatches(key, patches, module.weight.shape)
        return module.weight

    def _base(self, key: str) -> torch.Tensor | None:
        """The tensor of this key as it was loaded; what ComfyUI put in its place holds the patches already."""
        kept = self.backup.get(key)
        return comfy.utils.get_attr(self.model, key) if kept is None else kept.weight

    def _patched_weight(self, key: str, device: torch.device | None = None) -> torch.Tensor:
        """The weight of one of our layers, dense and with all patches, in the dtype it computes in."""
        module, base = comfy.utils.get_attr(self.model, key.rpartition(".")[0]), self._base(key)
        dense = _values(base, base.device if device is None else device)
        patches = [LayerPatches(key, self.patches[key], dense.shape)] if key in self.patches else []
        if module.hook_patch is not None:
            patches.append(module.hook_patch)
        return module.set_weight(module.patched(dense, patches), return_weight=True)

    def _packed_modules(self) -> dict[str, torch.nn.Module]:
        """{key of its weight: module} of every layer that is packed now."""
        named = self.model.named_modules()
        return {f"{name}.weight": module for name, module in named if is_packed(getattr(module, "weight", None))}

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """{key: tensor} as ComfyUI's; a packed weight is dense, made when it is read, its tables stand beside it."""
        tensors = super().model_state_dict(filter_prefix)
        packed = {key: module for key, module in self._packed_modules().items() if key in tensors}
        tensors.update((key, module.weight) for key, module in packed.items())
        return DenseOnRead(tensors, {key: module.resident_weight for key, module in packed.items()})

    def _kept(self) -> set[Kept]:
        """What the LoRAs of the model's layers keep on the device."""
        return {module.kept_loras for module in self.model.modules() if hasattr(module, "resident_patch")}

    def loaded_size(self) -> int:
        """Bytes on the device as ComfyUI counts them, and what LoRAs keep there.

        Not under dynamic VRAM, which could take all that it counts without asking.
        """
        return super().loaded_size() + (0 if is_dynamic(self) else sum(kept.nbytes for kept in self._kept()))

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        self._reopen()
        return super().partially_load(*args, **kwargs)

    def partially_unload(
        self, device_to: torch.device | None, memory_to_free: float = 0, *args: Any, **kwargs: Any
    ) -> float:
        """Bytes that were freed: what LoRAs keep goes first, for they can be sent again."""
        freed = sum(kept.give_back() for kept in self._kept()) if memory_to_free > 0 else 0
        return freed + super().partially_unload(device_to, max(0, memory_to_free - freed), *args, **kwargs)

    def _reopen(self) -> None:
        for kept in self._kept():
            kept.reopen()

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self._reopen()
        result = super().load(*args, **kwargs)
        self._report_slow_patches()
        return result

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self._give_back_packed()
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for module in self.model.modules():
                if hasattr(module, "resident_patch"):
                    module.resident_patch = None
            for kept in self._kept():
                kept.forget()

    def _give_back_packed(self) -> None:
        """Puts the packed weights that merges replaced back as the parameters they were.

        ComfyUI would make a parameter of each. It unloads all models outside of inference mode, and there torch makes
        none of a packed tensor from inside.
        """
        for key, kept in list(self.backup.items()):
            if is_packed(kept.weight) and isinstance(kept.weight, torch.nn.Parameter):
                del self.backup[key]
                comfy.utils.get_attr(self.model, key.rpartition(".")[0]).register_parameter("weight", kept.weight)

    def _load_list(self, *args: Any, **kwargs: Any) -> list[tuple]:
        """What ComfyUI knows of each layer when it loads, with what a packed one truly takes while it is offloaded."""
        return [self._true_needs(entry) for entry in super()._load_list(*args, **kwargs)]

    def _true_needs(self, entry: tuple) -> tuple:
        """ComfyUI's entry; for a packed layer it takes room for the whole unpacked weight, which is never there.

        Dynamic VRAM only sorts by it, and has entries of another form.
        """
        module = entry[3] if len(entry) == 5 else None
        if not is_packed(getattr(module, "weight", None)):
            return entry
        needs, own, name, *others = entry
        key = f"{name}.weight"
        scratch = module.scratch_bytes(self.patches.get(key, ()), self.weight_wrapper_patches.get(key, ()))
        return entry if scratch is None else (min(needs, own + scratch), own, name, *others)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What ComfyUI's save nodes write, and our record of it.

        Raises ValueError if a packed layer carries a LoRA or a value is not finite.
        """
        with self._storable():
            return super().state_dict_for_saving(*args, **kwargs) | saved_record(self)

    def model_state_dict_for_saving(
        self, model: torch.nn.Module | None = None, prefix: str = "", **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """The same for a text encoder, or for one part of a model, in versions of ComfyUI that have it."""
        with self._storable():
            whole = model is None and not hasattr(self.model, "diffusion_model")
            record = saved_text_record(self.model) if whole else {}
            return super().model_state_dict_for_saving(model, prefix, **kwargs) | record

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
            for name in patched:
                module = ours[name]
                if is_packed(module.weight) or getattr(module, "comfy_patched_weights", None) is not True:
                    module.set_weight(self._patched_weight(f"{name}.weight"))
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

    def pre_run(self) -> None:
        super().pre_run()
        if not torch.is_grad_enabled():  # training keeps results for its backward pass
            kernels.keep_memory(self)

    def cleanup(self) -> None:
        super().cleanup()
        kernels.release_memory(self)
        self.give_back_pages()

    def give_back_pages(self) -> None:
        """Where a CPU computes, what is mapped from files leaves the process until it is read again."""
        if self.load_device.type == "cpu":
            tensors = tensors_of(self.model).values()
            give_back(unwrap(tensor).codes if is_packed(tensor) else tensor for tensor in tensors)

    def add_hook_patches(self, hook: WeightHook, patches: Mapping[str | tuple, Any], *args: Any, **kwargs: Any) -> Any:
        """As ComfyUI's. Raises ValueError for a hook of codes or of weights of another size, and takes nothing."""
        packed = {key: module.weight.shape for key, module in self._packed_modules().items()}
        _refuse_codes(patches or {}, packed)
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def patch_hooks(self, hooks: HookGroup | None) -> None:
        """As ComfyUI's; what goes wrong meanwhile leaves no hook on any layer."""
        self.cached_hook_patches.clear()  # ComfyUI's cache holds merged weights; a packed layer has none to cache
        try:
            super().patch_hooks(hooks)
        except BaseException:
            self.unpatch_hooks()
            raise

    def patch_hook_weight_to_device(
        self,
        hooks: HookGroup,
        combined_patches: dict[str, list[tuple]],
        key: str,
        original_weights: dict[str, torch.Tensor],
        memory_counter: MemoryCounter,
    ) -> None:
        module = self._packed_module(key)
        if module is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        elif key in combined_patches:
            module.hook_patch = LayerPatches(key, combined_patches[key], module.weight.shape)
            original_weights.pop(key, None)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for module in self.model.modules():
            if getattr(module, "hook_patch", None) is not None:
                module.hook_patch = None
        self._give_back(whitelist_keys_set)
        super().unpatch_hooks(whitelist_keys_set)

    def _give_back(self, keys: set[str] | None) -> None:
        """Puts back the parameters that hooks replaced, of all keys if none are given.

        ComfyUI copies the values back instead, which would leave them in the merged dtype; it does so with buffers.
        """
        for key in list(self.hook_backup):
            replaced = isinstance(comfy.utils.get_attr(self.model, key), torch.nn.Parameter)
            if replaced and (not keys or key in keys):
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


def refuse_patched(model: torch.nn.Module) -> None:
    """Raises ValueError if a packed layer of a loaded model carries patches."""
    packed = [(name, m) for name, m in model.named_modules() if is_packed(getattr(m, "weight", None))]
    _refuse_loras([name for name, m in packed if m.resident_patch is not None or m.weight_function])


def _refuse_loras(layers: Sequence[str]) -> None:
    """Raises ValueError if there are packed layers with a LoRA; `layers`: their names."""
    if layers:
        raise ValueError(
            f"{len(layers)} packed layers ({layers[0]}, ..) carry a LoRA, which cannot be merged into their codes "
            "nor be kept apart in this file. Save before the LoRA is loaded, or save a model with Save Bonsai Model: "
            "it leaves LoRAs out, or keeps them with include_loras."
        )


def _refuse_codes(patches: Mapping[str | tuple, Any], packed: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError if a hook's patches bring codes or tables, or weights that are not of the size of packed ones.

    packed: {key: shape} of the packed weights of the model.
    """
    values = {key if isinstance(key, str) else key[0]: value for key, value in patches.items()}
    tables = {f"{key}_{name}" for key in packed for name in TABLES}
    for key, value in values.items():
        weight = model_as_lora(value)
        coded = weight is not None and (f"{key}_scale" in values or not weight.is_floating_point())
        if key in tables or (coded and key.endswith(".weight")):
            raise ValueError(
                f"a hook brings codes for {key}, not weights: Create Hook Model as LoRA takes a checkpoint of dense "
                "weights. Mix packed models with a merge node instead."
            )
        if weight is not None and key in packed and weight.shape != packed[key]:
            raise ValueError(
                f"a hook brings {key} of shape {list(weight.shape)}, this model's is {list(packed[key])}: Create Hook "
                "Model as LoRA needs a checkpoint of the same model."
            )


def _values(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a packed or dense weight as dense float32 values on `device`."""
    if is_packed(weight):
        return unwrap(weight).to(device).dequantize(torch.float32)
    return weight.detach().to(device, torch.float32, copy=True)


@dataclass
class _Backup:
    """What ComfyUI keeps of a weight it replaced."""

    weight: torch.Tensor
    inplace_update: bool


def _parameter(weight: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    """The weight on that device; itself if it is there."""
    return weight if weight.device == device else as_parameter(weight.to(device))


@functools.cache
def _patcher_class(base: type) -> type:
    """`base` with PackedPatcher in front; the same class for the same base."""
    return type(f"Bonsai{base.__name__}", (PackedPatcher, base), {})


def adopt(patcher: ModelPatcher) -> None:
    """Makes a ModelPatcher, and every clone of it, leave packed weights packed."""
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _patcher_class(type(patcher))
    on_clone = comfy.patcher_extension.CallbacksMP.ON_CLONE
    if not patcher.get_callbacks(on_clone, CALLBACK_KEY):
        patcher.add_callback_with_key(on_clone, CALLBACK_KEY, _adopt_clone)


def _adopt_clone(patcher: ModelPatcher, clone: ModelPatcher) -> None:
    adopt(clone)
