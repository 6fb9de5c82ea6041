"""The rows of a weight: those that one product takes, for backends that unpack a part of it, and how they must lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..weights import codec as codecs
from ..weights.packed_weight import PackedWeight

ROW_STEP = 64
"""Granularity of the rows in one product: the columns of its result start on a cache line."""


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(first, last + 1) of runs of about `most` rows, of one length if some number of runs allows it."""
    count = -(-rows // max(ROW_STEP, most // ROW_STEP * ROW_STEP))
    even = [n for n in range(count, count + 4) if rows % (n * ROW_STEP) == 0]
    step = rows // even[0] if even else ROW_STEP * -(-rows // (count * ROW_STEP))
    return [(lo, min(lo + step, rows)) for lo in range(0, rows, step)]


def runs(weight: PackedWeight, first: int, last: int, count: int) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Yields runs of about `count` values of the rows first .. last-1: (rows, counted from `first`; plane; bytes)."""
    n = codecs.get_codec(weight.codec).byte_rows(weight.shape[0])
    most = max(1, count // weight.shape[1])
    lo = first
    while lo < last:
        plane, byte_row = divmod(lo, n)
        hi = min(lo + most, last, (plane + 1) * n)
        yield slice(lo - first, hi - first), plane, weight.codes[byte_row : byte_row + hi - lo]
        lo = hi


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels read it: row after row, from a multiple of 16 bytes on."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # without it a transposed one stays transposed
