"""Which dtype a model computes in on a device: ComfyUI's choice, except that a CPU with fast bf16 uses it."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.cli_args import args

from ..kernels import cpu_has_fast_bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(choice: str, device: torch.device, weights: int) -> torch.dtype:
    """The dtype for `choice` (auto or one of DTYPES) of a model with so many weights on `device`.

    Asked for a dtype on its command line (--fp32-unet and the like), ComfyUI decides about auto on a CPU too.
    """
    if choice != "auto":
        return DTYPES[choice]
    if device.type == "cpu" and not (args.fp32_unet or args.bf16_unet or args.fp16_unet):
        return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
    dtype = comfy.model_management.unet_dtype(
        model_params=weights,
        weight_dtype=torch.bfloat16,
        supported_dtypes=[torch.bfloat16, torch.float16, torch.float32],
    )
    return comfy.model_management.unet_manual_cast(dtype, device) or dtype
