"""The packed MODEL: a second model of the source's class around packed weights, and the same again on request."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...weights.packed_weight import PackedWeight
from .. import comfyui
from ..attention import attend_in_parts
from ..gradients import right_gradients
from ..inventory import Origin, attach_inventory, attached_inventory
from ..layout import is_packed, wrap
from ..misfit import explain_misfits
from ..model_class import configuration_for_twin, describe_configuration, empty_model, filled, is_dynamic
from ..patcher import adopt
from ..tensors import base_tensors, tensors_of
from .carry import carry_over

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

_patched: weakref.WeakValueDictionary[str, ModelPatcher] = weakref.WeakValueDictionary()
"""{name: patched ModelPatcher} while one is alive, so that ComfyUI can ask for it again by plain arguments."""


def empty_twin(base: BaseModel) -> BaseModel:
    """A BaseModel like `base` of our operations, without weights. Raises ValueError if its class forbids that."""
    names = dict.fromkeys(tensors_of(base.diffusion_model))
    return empty_model(configuration_for_twin(base), base.model_type, names)


def assemble(
    source: ModelPatcher,
    twin: BaseModel,
    tensors: Mapping[str, torch.Tensor | PackedWeight],
    carried_out: Sequence[str] = (),
    like: ModelPatcher | None = None,
) -> ModelPatcher:
    """The packed ModelPatcher: weights into the twin, everything that was set on the source beside it.

    carried_out: keys of weights whose patches are part of `tensors` already. like: a packed model whose origin it has.
    """
    patcher = around(source, twin, tensors, dynamic=is_dynamic(source))
    for key in carried_out:
        patcher.patches.pop(key, None)
    carry_over(source, patcher)
    name = uuid.uuid4().hex
    _patched[name] = patcher
    patcher.cached_patcher_init = (rebuild_patched, (name,))
    known = None if like is None else attached_inventory(like)
    kind = type(twin).__name__
    architecture = type(twin.model_config).__name__
    origin = Origin("", f"patched {kind}", {"patched": kind}, architecture, describe_configuration(twin))
    attach_inventory(patcher, origin if known is None or known.origin is None else known.origin)
    return patcher


def around(
    source: ModelPatcher,
    twin: BaseModel,
    tensors: Mapping[str, torch.Tensor | PackedWeight],
    dynamic: bool,
    shared: bool = False,
) -> ModelPatcher:
    """A clone of the patcher `source` around the twin, filled with `tensors`; shared: which it holds as they are."""
    dtype = twin.get_dtype_inference()
    offload = source.offload_device
    weights = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedWeight):
            tensor = wrap(tensor, dtype)
        elif isinstance(tensor, QuantizedTensor) and not is_packed(tensor):
            tensor = tensor.dequantize()
        weights[name] = (tensor if is_packed(tensor) else tensor.detach()).to(offload)
    fresh = filled(twin, weights, source.load_device, offload, dynamic, shared)
    patcher = source.clone(disable_dynamic=not dynamic, model_override=fresh.get_clone_model_override())
    patcher.size, patcher.parent = 0, None
    comfyui.share_clone_base(patcher, fresh)
    patcher.cached_hook_patches, patcher.hook_backup, patcher.current_hooks = {}, {}, None
    patcher.is_injected = False
    adopt(patcher)
    attend_in_parts(patcher)
    explain_misfits(patcher)
    right_gradients(patcher)
    return patcher


def rebuild_patched(name: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The patched model called `name` once more, around the same packed weights: ComfyUI's `cached_patcher_init`.

    Raises RuntimeError if it is not alive in this process: it exists in memory only.
    """
    living = _patched.get(name)
    if living is None:
        raise RuntimeError(
            "this patched model exists only in the memory of the process that patched it. Save it with "
            '"Save Bonsai Model" and load the file with "Load Bonsai Model" to use it elsewhere.'
        )
    twin = empty_twin(living.model)
    patcher = around(living, twin, base_tensors(living), dynamic=not disable_dynamic)
    carry_over(living, patcher)
    return patcher
