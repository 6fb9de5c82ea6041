"""Errors of the machine, which say nothing about the file or the kernel they happened in."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = (
    "out of memory",
    "cannot allocate memory",
    "cudaerrormemoryallocation",
    "alloc failed",
    "defaultcpuallocator",
)
LOST_DEVICE = (
    "illegal memory access",
    "illegal address",
    "illegal instruction was encountered",
    "cudaerrorillegaladdress",
    "misaligned address",
    "invalid address space",
    "invalid program counter",
    "hardware stack error",
    "device-side assert",
    "cudaerrorassert",
    "cuda error assert",
    "unspecified launch failure",
    "cuda error launch failed",
    "cudaerrorlaunchfailure",
    "launch timed out",
    "ecc error",
    "context is destroyed",
)
"""Words of the errors after which CUDA or ROCm answers every further call of the process with the same error."""


def is_the_devices(error: BaseException) -> bool:
    """Whether memory ran out or the device's context is lost, which no other file or kernel makes good.

    Triton's "out of resource: shared memory" is neither: the kernel asks for more than a block can have.
    """
    known = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError), MemoryError)
    if isinstance(error, known):
        return True
    return isinstance(error, RuntimeError) and _says(error, (*OUT_OF_MEMORY, *LOST_DEVICE))


def is_lost(error: BaseException) -> bool:
    """Whether the device's context is lost: every further call on it fails, until the process ends."""
    return isinstance(error, RuntimeError) and _says(error, LOST_DEVICE) and not _says(error, OUT_OF_MEMORY)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower().replace("_", " ")
    return any(some in text for some in words)
