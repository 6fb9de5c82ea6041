"""A MODEL -> a native file: the base weights, compact, and its LoRAs if that is asked for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..weights.formats import native
from ..weights.packed_weight import PackedWeight, at_density, narrow_exact
from ..weights.read import as_transformer
from .fold import fold_loras
from .layout import is_packed, unwrap
from .lora import merges_models
from .progress import Progress
from .record import model_record
from .tensors import base_tensors

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)


def base_weights(model: ModelPatcher, progress: Progress | None = None) -> dict[str, PackedWeight | torch.Tensor]:
    """{ComfyUI's name: packed (compact) or dense weight} of a ModelPatcher's transformer as loaded, patches undone.

    Persistent buffers are among them. progress(0, 1) is called before a weight is made compact: for its Cancel.

    Raises ValueError if no layer of it is packed, or if it is a merge, whose layers are dense.
    """
    if any(merges_models(patches) for patches in model.patches.values()):
        raise ValueError("this model is a merge, which is dense: save it with Save Model")
    weights: dict[str, PackedWeight | torch.Tensor] = {}
    for name, tensor in base_tensors(model).items():
        if is_packed(tensor):
            if progress is not None:
                progress(0, 1)
            weights[name] = at_density(unwrap(tensor), "compact")
        else:
            weights[name] = narrow_exact(tensor.detach()) if tensor.dtype == torch.float32 else tensor.detach()
    if not any(isinstance(w, PackedWeight) for w in weights.values()):
        raise ValueError(
            "this model has no packed layer: save a dense model with Save Model, or pack it first with "
            "Patch to BitLinear"
        )
    return weights


def bfl_name(name: str) -> str:
    """BFL's name for a weight that newer versions of ComfyUI call otherwise; any other name as it is."""
    return re.sub(r"(norm\.(?:query|key)_norm)\.weight$", r"\1.scale", name)


def workflow_metadata(prompt: object, extra_pnginfo: Mapping[str, object] | None) -> dict[str, str]:
    """What ComfyUI hands a saving node, each as JSON: the prompt, and whatever the page and other nodes added."""
    own = {} if prompt is None else {"prompt": json.dumps(prompt, default=str)}
    return native.join_metadata(own, {k: json.dumps(v, default=str) for k, v in (extra_pnginfo or {}).items()})


def save_bonsai_model(
    model: ModelPatcher,
    path: Path,
    *,
    progress: Progress | None = None,
    extra: Mapping[str, object] | None = None,
    include_loras: bool = False,
) -> str:
    """Writes the model's base weights to a new native file and returns what became of its LoRAs, a line for users.

    include_loras: its LoRAs become part of the file (fold.py); else they are left out. progress(bytes done, bytes in
    all); what it raises ends the save and leaves nothing behind. extra: further metadata, as of workflow_metadata.
    Raises ValueError before anything is written, PackError, or OSError from the disk.
    """
    weights, said = base_weights(model, progress), ""
    if include_loras:
        weights, folded = fold_loras(model, weights)
        said = str(folded)
        logger.info("Bonsai: saving %s", said)
    elif model.patches:
        said = f"LoRAs: {len(model.patches)} layers carry patches; the file holds the base model without them"
        logger.warning("Bonsai: %s", said)
    weights = {bfl_name(name): weight for name, weight in weights.items()}
    record = model_record(model, weights)
    native.write(path, weights, record, progress, extra=extra, check=as_transformer)
    return said
