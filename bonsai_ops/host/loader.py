"""A pack file -> ComfyUI's ModelPatcher around ComfyUI's own Flux class, with the block layers kept packed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch
from comfy.cli_args import args

from ..kernels import dispatch
from ..weights.errors import PackError
from ..weights.formats import Pack
from ..weights.packed_weight import DENSITIES, PackedWeight
from ..weights.read import open_transformer, read_weights
from . import model_class as build
from .attention import attend_in_parts
from .layout import wrap
from .linear import make_bonsai_ops
from .patcher import adopt
from .precision import compute_dtype

logger = logging.getLogger(__name__)

MEMORY_MODES = ("auto", "classic")
ATTACHMENT = "bonsai"


@dataclass(frozen=True)
class LoadOptions:
    """How to load.

    compute_dtype: auto, bf16, fp16 or fp32. memory: auto or classic (no dynamic VRAM). mode: how packed layers are
    multiplied (dispatch.MODES). layout: how ternary weights lie in memory (packed_weight.DENSITIES). Raises ValueError
    for any other value of the last three.
    """

    compute_dtype: str = "auto"
    memory: str = "auto"
    mode: str = dispatch.EXACT
    layout: str = "compact"

    def __post_init__(self) -> None:
        for name, value, known in (("memory mode", self.memory, MEMORY_MODES), ("layout", self.layout, DENSITIES)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown, expected {' or '.join(known)}")
        dispatch.check_mode(self.mode)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, kept on the model as attachment `bonsai`. Sizes in bytes, time in seconds."""

    path: str
    format: str
    variant: str
    packed_layers: int
    packed_bytes: int
    dense_bytes: int
    seconds: float
    dtype: str
    backend: str
    declined: Mapping[str, str]
    """{backend, mode or dtype that would be faster: why it is not used}."""
    source: Mapping[str, str]
    mode: str = dispatch.EXACT
    """The mode in use, which is exact if the one that was asked for is declined."""
    architecture: str = "flux2"
    """flux2, or the ComfyUI class of a model of any kind that was patched."""
    model: Mapping[str, object] = field(default_factory=dict)
    """That class's configuration (build.describe), empty for flux2."""

    @property
    def resident_bytes(self) -> int:
        return self.packed_bytes + self.dense_bytes


def load_bonsai_model(
    path: str | Path,
    options: Mapping[str, str] | None = None,
    *,
    disable_dynamic: bool = False,
    progress: Callable[[int, int], None] | None = None,
):
    """Loads a pack (file or folder) of any format as a ModelPatcher.

    options: fields of LoadOptions. disable_dynamic: what ComfyUI passes when it clones through `cached_patcher_init`.
    progress(weights done, weights in all) is called a layer; what it raises ends the load. Raises PackError for a file
    that cannot be used; nothing is half-loaded then.
    """
    started = time.perf_counter()
    settings = LoadOptions(**dict(options or {}))
    pack, entries = open_transformer(path)
    device = comfy.model_management.get_torch_device()
    told = settings.compute_dtype == "auto" and (args.fp32_unet or args.bf16_unet or args.fp16_unet)
    dtype = None if told else compute_dtype(settings.compute_dtype, device)
    weights = read_weights(pack, entries, progress, settings.layout)
    logical = sum(w.shape[0] * w.shape[1] if isinstance(w, PackedWeight) else w.numel() for w in weights.values())
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=logical,
            weight_dtype=torch.bfloat16,
            supported_dtypes=[torch.bfloat16, torch.float16, torch.float32],
        )
        dtype = comfy.model_management.unet_manual_cast(dtype, device) or dtype
    report = _report(pack, weights, device, dtype, settings.mode, started)
    state_dict = {
        name: wrap(w, dtype, settings.mode) if isinstance(w, PackedWeight) else w for name, w in weights.items()
    }
    del weights
    model = _make(pack, state_dict, dtype, disable_dynamic=disable_dynamic or settings.memory == "classic")
    # ComfyUI falls back to fp32 for a dtype it thinks slow on the device (bf16 on every CPU); the loader has decided.
    model.model.manual_cast_dtype = None
    adopt(model)
    attend_in_parts(model)
    model.cached_patcher_init = (load_bonsai_model, (str(path), asdict(settings)))
    model.set_attachments(ATTACHMENT, report)
    logger.info(
        "Bonsai: %s %s, %d layers packed, %.1f MB resident, computes in %s, backend %s, %s%s, %.1f s from %s",
        report.variant,
        report.format,
        report.packed_layers,
        report.resident_bytes / 1e6,
        report.dtype,
        report.backend,
        report.mode,
        "".join(f" (not {name}: {reason})" for name, reason in report.declined.items()),
        report.seconds,
        report.path,
    )
    return model


def _make(pack: Pack, state_dict: dict, dtype: torch.dtype, disable_dynamic: bool):
    """The ModelPatcher around a state dict, built from the file's own record of its configuration if it has one."""
    recorded = build.config_from(pack.model) if pack.model else None
    if recorded is None:
        model = comfy.sd.load_diffusion_model_state_dict(
            state_dict,
            model_options={"custom_operations": make_bonsai_ops(), "dtype": dtype},
            disable_dynamic=disable_dynamic,
        )
        if model is None:
            kind = "FLUX.2" if pack.architecture == "flux2" else pack.architecture
            cure = "Update ComfyUI to 0.9.2 or newer." if kind == "FLUX.2" else "Update ComfyUI."
            raise PackError(pack.path, f"was read, but this ComfyUI does not recognise it as {kind}", cure)
        return model
    config, model_type = recorded
    config.set_inference_dtype(dtype, None)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    try:
        base = build.build(config, model_type, state_dict)
        patcher = build.patcher_of(base, device, offload, dynamic=not disable_dynamic)
        if not comfy.model_management.is_device_cpu(offload):
            base.to(offload)
        build.fill(base, state_dict, assign=build.is_dynamic(patcher))
    except ValueError as error:
        raise PackError(
            pack.path, f"does not fit this ComfyUI ({error})", "Update ComfyUI, or patch and save the model again."
        ) from error
    return patcher


def _report(
    pack: Pack,
    weights: Mapping[str, PackedWeight | torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    started: float,
) -> LoadReport:
    packed = [w for w in weights.values() if isinstance(w, PackedWeight)]
    schemes = sorted({w.scheme for w in packed})
    dense = sum(w.nbytes for w in weights.values() if not isinstance(w, PackedWeight))
    choice = dispatch.resolve(dispatch.call_of(device, dtype, packed[0], mode))
    return LoadReport(
        str(pack.path),
        pack.format,
        schemes[0] if len(schemes) == 1 else "mixed",
        len(packed),
        sum(w.nbytes for w in packed),
        dense,
        time.perf_counter() - started,
        str(dtype).removeprefix("torch."),
        choice.backend.name,
        choice.declined,
        pack.source,
        choice.mode,
        pack.architecture,
        pack.model,
    )
