"""The rows of a weight: those that one product takes, for backends that unpack a part of it, and how they must lie."""

from __future__ import annotations

import torch

ROW_STEP = 64
"""Granularity of the rows in one product: the columns of its result start on a cache line."""


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(first, last + 1) of runs of about `most` rows, of one length if some number of runs allows it."""
    count = -(-rows // max(ROW_STEP, most // ROW_STEP * ROW_STEP))
    even = [n for n in range(count, count + 4) if rows % (n * ROW_STEP) == 0]
    step = rows // even[0] if even else ROW_STEP * -(-rows // (count * ROW_STEP))
    return [(lo, min(lo + step, rows)) for lo in range(0, rows, step)]


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels read it: row after row, from a multiple of 16 bytes on."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # without it a transposed one stays transposed
