"""What the plain torch path moves: bytes read and written a weight, and operators, counted without a GPU.

Operators see a tensor as its element type says; a GPU converts as it reads and writes, so that nothing is hidden
between them. A view that skips elements counts as what it spans, a number that is repeated once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels import eager
from ...weights.codec import get_codec
from ...weights.packed_weight import SCHEMES, PackedWeight
from .static_unpack import moved

ROWS, COLUMNS = 9216, 3072
"""Of the layer that is counted, on torch's device meta."""
CASES = {
    # (scheme, codec): columns a scale covers; bytes a weight and operators a plane that are allowed
    ("ternary", "trit5"): (128, 9.1, 2.8),
    ("ternary", "crumb"): (128, 9.1, 2.5),
    ("binary", "bit"): (128, 9.1, 1.8),
    ("affine", "nibble"): (64, 14.4, 5.5),
    ("affine", "byte"): (64, 11.4, 8),
    ("zero_point", "nibble"): (64, 14.4, 5.5),
}
"""Bytes with the values in 16 bits and the tables; operators with those that convert tables, without the product."""


class Traffic(TorchDispatchMode):
    """Counts `launches` and `nbytes` of the operators within it; views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        returns = func._schema.returns
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        if is_view or func._schema.name.startswith("aten::empty"):
            return result
        out = given.get("out")
        reads = [one for one in (*args, *(v for name, v in given.items() if name != "out")) if _is_tensor(one)]
        writes = [out] if out is not None else [result] if _is_tensor(result) else []
        self.launches += 1
        self.nbytes += sum(map(_spanned, (*reads, *writes)))
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _spanned(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the last one along dimensions that are not repeated."""
    steps = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    nearest = min((stride for size, stride in steps if size > 1), default=1)
    count = 1
    for size, _ in steps:
        count *= size
    return count * nearest * tensor.dtype.itemsize


@dataclass(frozen=True)
class Row:
    """bytes: a weight, by torch's operators. launches: operators a plane. one_launch: bytes of the unpacking kernel."""

    scheme: str
    codec: str
    bytes: float
    launches: float
    one_launch: float

    def failures(self) -> list[str]:
        """The gates it misses, one sentence each."""
        found = []
        _, most_bytes, most_launches = CASES[self.scheme, self.codec]
        if self.bytes > most_bytes:
            found.append(f"{self.bytes} bytes a weight, limit {most_bytes}")
        if self.launches > most_launches:
            found.append(f"{self.launches} operators a plane, limit {most_launches}")
        return found


def measure(scheme: str, codec: str) -> Row:
    """Counts what a layer takes in bf16, on no device: operators are asked for, nothing is computed."""
    group, coder = CASES[scheme, codec][0], get_codec(codec)
    table = torch.empty(ROWS, COLUMNS // group, dtype=torch.bfloat16, device="meta")
    zero = table if SCHEMES[scheme].has_zero else None
    codes = torch.empty(coder.byte_rows(ROWS), COLUMNS, dtype=torch.uint8, device="meta")
    weight = PackedWeight(codes, table, (ROWS, COLUMNS), scheme, codec, group, zero)
    with Traffic() as traffic:
        for _ in weight.pieces(torch.bfloat16, eager.GPU_SCRATCH_BYTES):
            pass
    return Row(
        scheme,
        codec,
        round(traffic.nbytes / (ROWS * COLUMNS), 2),
        round(traffic.launches / coder.fields, 2),
        moved(scheme, codec, group),
    )


def show() -> list[Row]:
    """Prints a row for each of CASES and returns them."""
    print("\nunpacking by torch's operators: bytes read and written a weight, operators a plane; beside it one launch")
    print("{:24}{:>8}{:>11}{:>13}".format("weight", "bytes", "operators", "one launch"))
    rows = []
    for case in CASES:
        rows.append(row := measure(*case))
        print(f"{row.scheme + ' ' + row.codec:24}{row.bytes:>8.2f}{row.launches:>11.2f}{row.one_launch:>13.2f}")
        for failure in row.failures():
            print(f"    misses a gate: {failure}")
    return rows
