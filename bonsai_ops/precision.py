"""Which dtype a model computes in on a device: ComfyUI's choice, except that a CPU with fast bf16 uses it."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cpu_has_fast_bf16() -> bool:
    """True if this CPU multiplies bf16 matrices in hardware (AVX-512 BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def cpu_has_fast_int8() -> bool:
    """True if this CPU multiplies int8 matrices in hardware (AVX-512 VNNI or AMX)."""
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


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
