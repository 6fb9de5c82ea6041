"""What a saved model says of itself (weights/formats/native.py), whoever saves it, and what is saved by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..weights.finite import NOT_FINITE, is_finite
from ..weights.formats import native
from ..weights.packed_weight import PackedWeight
from ..weights.read import must_be_finite, source_record
from .inventory import attached_inventory
from .layout import is_packed, unwrap
from .tensors import tensors_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def model_record(model: ModelPatcher, weights: Mapping[str, PackedWeight | torch.Tensor]) -> native.NativeRecord:
    """The record of a file of the model's transformer; `weights`: what it will hold.

    Raises ValueError if a loader would refuse them, for they are not finite.
    """
    inventory = attached_inventory(model)
    origin = None if inventory is None else inventory.origin
    if origin is None:
        record = native.make_record(weights)
    else:
        source = source_record(Path(origin.path), origin.format, origin.source)
        record = native.make_record(weights, source, origin.architecture, origin.configuration)
    _refuse_not_finite(weights, record.architecture)
    return record


def saved_record(model: ModelPatcher) -> dict[str, torch.Tensor]:
    """{name: record} for ComfyUI's own nodes to save beside a model's weights as its modules hold them now.

    Nothing for a model without a packed layer, such as a merge. Raises ValueError as above.
    """
    weights = _held(model.model.diffusion_model)
    if not any(isinstance(w, PackedWeight) for w in weights.values()):
        return {}
    record = model_record(model, weights)
    return model.model.model_config.process_unet_state_dict_for_saving({native.RECORD_TENSOR: record.to_tensor()})


def saved_text_record(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same for a text encoder, ComfyUI's whole module of one; also for a merge, which only our loader reads."""
    weights = _held(encoder)
    _refuse_not_finite(weights, native.TEXT_ENCODER)
    return {native.RECORD_TENSOR: native.make_record(weights, {}, native.TEXT_ENCODER).to_tensor()}


def _held(model: torch.nn.Module) -> dict[str, PackedWeight | torch.Tensor]:
    """{name: packed or dense tensor} as the modules hold them."""
    return {name: unwrap(t) if is_packed(t) else t.detach() for name, t in tensors_of(model).items()}


def _refuse_not_finite(weights: Mapping[str, PackedWeight | torch.Tensor], architecture: str) -> None:
    for name, weight in weights.items():
        tables = weight.tables().values() if isinstance(weight, PackedWeight) else [weight]
        if must_be_finite(name, architecture) and not all(map(is_finite, tables)):
            raise ValueError(
                f"{name} {NOT_FINITE} (NaN or infinity), and a file of it could not be loaded. Nothing was saved: load "
                "the model again, and leave out what changed it"
            )
