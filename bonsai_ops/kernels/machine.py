"""What this processor multiplies fast, and what the GPU is doing."""

from __future__ import annotations

import torch


def cpu_has_fast_bf16() -> bool:
    """True if this CPU multiplies bf16 matrices in hardware (AVX-512 BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def cpu_has_fast_int8() -> bool:
    """True if this CPU multiplies int8 matrices in hardware (AVX-512 VNNI or AMX)."""
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def capturing() -> bool:
    """True while a CUDA graph is recorded: the stream must not be waited for, and what is written then holds later.

    The graph runs what was recorded, not the code around it, and with memory of its own. Never starts CUDA.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
