"""Which dtype a model computes in on a device: ComfyUI's choice, except that a CPU with fast bf16 uses it."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.cli_args import args

from ..kernels import cpu_has_fast_bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(choice: str, device: torch.device, weights: int) -> torch.dtype:
    """The dtype for `choice` (auto or one of DTYPES) of a model with so many weights on `device`.

    auto is what the command line asks for (--force-fp32, --bf16-unet and the like); on a CPU, which computes in each of
    them, to the letter. fp64 becomes fp32.
    """
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cpu":
        return _on_a_cpu()
    supported = list(DTYPES.values())
    dtype = comfy.model_management.unet_dtype(
        model_params=weights, weight_dtype=torch.bfloat16, supported_dtypes=supported
    )
    dtype = comfy.model_management.unet_manual_cast(dtype, device, supported) or dtype
    return dtype if dtype in supported else torch.float32


def _on_a_cpu() -> torch.dtype:
    if args.force_fp32 or args.fp32_unet or args.fp64_unet:
        return torch.float32
    if args.bf16_unet or args.fp16_unet:
        return torch.bfloat16 if args.bf16_unet else torch.float16
    return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
