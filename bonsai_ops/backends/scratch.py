"""One buffer in main memory that the CPU's products share from call to call.

Some 20 MB that are allocated for each product come as fresh pages from the system; clearing and mapping them takes 3 to
10 % of a product's time on the machine where this was measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

ALIGNMENT = 64

_kept: list[torch.Tensor] = []


@contextlib.contextmanager
def borrowed(*parts: tuple[tuple[int, ...], torch.dtype]) -> Iterator[list[torch.Tensor]]:
    """A contiguous tensor for each (shape, dtype), with whatever was in it; side by side in one buffer.

    The largest buffer that came back is kept for the next call. Calls at the same time, in several threads, get buffers
    of their own.
    """
    ends, total = [], 0
    for shape, dtype in parts:
        total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        ends.append(total)
    try:
        buffer = _kept.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel() < total:
        with torch.inference_mode(False):  # one that was made in inference mode could not be written outside of it
            buffer = torch.empty(total, dtype=torch.uint8)
    try:
        yield [
            buffer[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for first, (shape, dtype) in zip((0, *ends), parts, strict=False)
        ]
    finally:
        _kept.append(buffer)
        _kept.sort(key=torch.Tensor.numel)
        del _kept[:-1]


def release() -> None:
    """Gives the buffer back to the system."""
    _kept.clear()
