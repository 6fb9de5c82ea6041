"""A pack file -> ComfyUI's ModelPatcher around ComfyUI's own Flux class, with the block layers kept packed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sd
import torch

from .. import kernels
from ..weights.errors import PackError, escaped, shown
from ..weights.formats import Pack
from ..weights.packed_weight import DENSITIES, PackedWeight
from ..weights.read import open_text_encoder, open_transformer, read_weights
from .attention import attend_in_parts
from .flags import maps_files
from .gradients import right_gradients
from .inventory import Origin, attach_inventory
from .layout import wrapped
from .linear import make_bonsai_ops
from .misfit import explain_misfits
from .model_class import described_configuration, empty_model, filled
from .patcher import adopt
from .precision import DTYPES, compute_dtype
from .progress import Progress

if TYPE_CHECKING:
    from comfy.model_base import ModelType
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import BASE

logger = logging.getLogger(__name__)

_SAID = 240
"""Most characters of an error of ComfyUI in ours."""
CHOICES = {
    "compute_dtype": ("auto", *DTYPES),
    "memory": ("auto", "classic"),
    "mode": kernels.MODES,
    "layout": tuple(DENSITIES),
}
"""{field of LoadOptions: what it may be}."""


@dataclass(frozen=True)
class LoadOptions:
    """How to load. Raises ValueError for what is not among CHOICES.

    compute_dtype: auto, bf16, fp16 or fp32. memory: auto or classic (no dynamic VRAM). mode: how packed layers are
    multiplied. layout: the density at which ternary weights lie in memory; the word is that of shared workflows.
    """

    compute_dtype: str = "auto"
    memory: str = "auto"
    mode: str = kernels.EXACT
    layout: str = "compact"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown, expected one of {', '.join(known)}")


def require_readable(folder: Path) -> None:
    """Raises PackError for a pack of which the transformer or the text encoder cannot be used; reads headers only."""
    open_transformer(folder, maps_files())
    open_text_encoder(folder, maps_files())


def load_bonsai_model(
    path: str | Path,
    options: Mapping[str, str] | None = None,
    *,
    disable_dynamic: bool = False,
    progress: Progress | None = None,
) -> ModelPatcher:
    """Loads a pack (file or folder) of any format as a ModelPatcher.

    options: fields of LoadOptions. disable_dynamic: what ComfyUI passes when it clones through `cached_patcher_init`.
    progress(weights done, weights in all) is called a layer; what it raises ends the load. Raises PackError for a file
    that cannot be used; nothing is half-loaded then.
    """
    started = time.perf_counter()
    settings = LoadOptions(**dict(options or {}))
    pack = open_transformer(path, maps_files())
    if pack.beside:
        logger.info(
            "Bonsai: %s is a checkpoint; its transformer is loaded, what else is in it (%s) is not",
            escaped(str(pack.path)),
            shown(", ".join(pack.beside)),
        )
    weights = read_weights(pack, progress, settings.layout)
    count = sum(w.shape[0] * w.shape[1] if isinstance(w, PackedWeight) else w.numel() for w in weights.values())
    dtype = compute_dtype(settings.compute_dtype, comfy.model_management.get_torch_device(), count)
    state_dict = wrapped(weights, dtype, settings.mode)
    del weights
    model = _make(pack, state_dict, dtype, disable_dynamic=disable_dynamic or settings.memory == "classic")
    # ComfyUI falls back to fp32 for a dtype it thinks slow on the device (bf16 on every CPU); the loader has decided.
    model.model.manual_cast_dtype = None
    adopt(model)
    attend_in_parts(model)
    explain_misfits(model)
    right_gradients(model)
    model.cached_patcher_init = (load_bonsai_model, (str(path), asdict(settings)))
    release = pack.release
    origin = Origin(str(pack.path), pack.format, pack.source, pack.architecture, pack.configuration, release)
    inventory = attach_inventory(model, origin)
    logger.info(
        "Bonsai: %s %s, %d layers packed, %.1f MB resident, computes in %s, backend %s, %s%s, %.1f s from %s, %s",
        inventory.scheme,
        pack.format,
        inventory.packed_layers,
        inventory.resident_bytes / 1e6,
        inventory.dtype,
        inventory.backend,
        inventory.mode,
        inventory.not_faster,
        time.perf_counter() - started,
        escaped(str(pack.path)),
        release,
    )
    if model.load_device.type == "cpu":
        kernels.tell_threads()
    return model


def _make(
    pack: Pack, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype, disable_dynamic: bool
) -> ModelPatcher:
    """The ModelPatcher around a state dict: of the configuration that the file describes, else as ComfyUI sees fit."""
    described = described_configuration(pack.configuration) if pack.configuration else None
    if described is not None:
        return _described(pack, *described, state_dict, dtype, disable_dynamic)
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            state_dict,
            model_options={"custom_operations": make_bonsai_ops(), "dtype": dtype},
            disable_dynamic=disable_dynamic,
        )
    except Exception as error:  # what it takes the model for is guessed from shapes
        if kernels.is_the_devices(error):
            raise
        raise _misfit(pack, error) from error
    if model is None:
        kind = "FLUX.2" if pack.architecture == "flux2" else pack.architecture
        cure = "Update ComfyUI to 0.9.2 or newer." if kind == "FLUX.2" else "Update ComfyUI."
        raise PackError(pack.path, f"was read, but this ComfyUI does not recognise it as {kind}", cure)
    return model


def _described(
    pack: Pack,
    configuration: BASE,
    model_type: ModelType,
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    disable_dynamic: bool,
) -> ModelPatcher:
    configuration.set_inference_dtype(dtype, None)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    try:
        model = empty_model(configuration, model_type, state_dict)
        return filled(model, state_dict, device, offload, dynamic=not disable_dynamic)
    except ValueError as error:
        raise _misfit(pack, error) from error


def _misfit(pack: Pack, error: Exception) -> PackError:
    last = (str(error).splitlines() or [""])[-1].strip()
    said = shown(last or type(error).__name__, _SAID)
    return PackError(
        pack.path, f"does not fit this ComfyUI ({said})", "Update ComfyUI, or patch and save the model again."
    )
