"""Which dtype a model computes in on a device: ComfyUI's choice, except that a CPU with fast bf16 uses it."""

from __future__ import annotations

import torch

from ..kernels import cpu_has_fast_bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The dtype for `choice` (auto, bf16, fp16, fp32) on `device`; None means that ComfyUI decides.

    Raises ValueError for an unknown choice.
    """
    if choice in DTYPES:
        return DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"compute dtype {choice!r} is unknown, expected auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
    return None
