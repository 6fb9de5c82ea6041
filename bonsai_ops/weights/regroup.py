"""Codes whose fields lie along K, as files have them -> the bytes of a codec, without a byte for each code in between.

    bit, crumb, nibble   as many bits a code as in the file: P rows n apart make a square of P x P fields in one integer
                         of P bytes, and their bytes are the rows of its transpose
    trit5                of fields of 2 bits: 3 a + b of two rows fits into 4 bits, so that half of the sum is done on
                         four codes a byte

`codec.encode_rows` of the same codes gives the same bytes in twice the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from .codec import get_codec

PIECE_BYTES = 1 << 20
"""Of the result that are worked on together: few enough for a processor's cache."""
WHOLE = 32
"""Columns come in multiples of it, the smallest group that a packed weight has."""
PLAIN = {"bit": 1, "crumb": 2, "nibble": 4}
"""{codec: bits a field} where the codes stay what they are."""
_TRANSPOSE = {
    # bits: (integer of a square, ((distance of two fields, those of the nearer one), ..))
    1: (torch.int64, ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))),
    2: (torch.int32, ((6, 0x00CC00CC), (12, 0x0000F0F0))),
    4: (torch.int16, ((4, 0x00F0),)),
}
_LOW_FIELDS, _LOW_HALVES = 0x33333333, 0x0F0F0F0F
"""Every second field of 2 bits, and of 4 bits, in an int32."""
_CEIL_FACTOR, _CEIL_SHIFT, _CEIL_ADDED = 219, 12, 4050 - (7 << 12)
"""ceil(256 v / 243) = v + 7 + ((219 v + (v >> 1) + added) >> 12) for v below 243, within int16."""

Read = Callable[[int, int], torch.Tensor]
"""(lo, hi) -> uint8 [hi - lo, K bits / 8], fields of rows lo .. hi - 1, the first in the low bits."""


def regroups(name: str, bits: int) -> bool:
    """Whether fields of so many bits become bytes of that codec here."""
    return PLAIN.get(name) == bits or (name, bits) == ("trit5", 2)


def regroup_rows(name: str, rows: int, columns: int, read: Read, bits: int) -> torch.Tensor:
    """The bytes of a codec, uint8 [byte_rows, columns], of fields of `bits` bits that `read` delivers piece by piece.

    Fields of a trit5 weight are 0, 1 or 2: whoever reads has looked. Raises ValueError for a codec that is not made of
    such fields, an empty weight, columns that are no multiple of WHOLE and a piece of another shape or dtype.
    """
    codec = get_codec(name)
    if not regroups(name, bits) or rows < 1 or columns < 1 or columns % WHOLE:
        raise ValueError(f"codes of {bits} bits, {(rows, columns)}, do not become codec {name}")
    width, n = columns * bits // 8, codec.byte_rows(rows)
    out = torch.empty(n, columns, dtype=torch.uint8)
    step = max(1, PIECE_BYTES // columns)

    def plane(number: int, lo: int, hi: int) -> torch.Tensor | None:
        """Fields of the rows of byte rows lo .. hi - 1, those behind the last row 0; None where there is none."""
        first, last = min(number * n + lo, rows), min(number * n + hi, rows)
        if first == last:
            return None
        fields = read(first, last)
        if fields.dtype != torch.uint8 or tuple(fields.shape) != (last - first, width):
            raise ValueError(
                f"fields of rows {first}..{last - 1} are {fields.dtype} {tuple(fields.shape)}, "
                f"expected torch.uint8 {(last - first, width)}"
            )
        if last - first == hi - lo:
            return fields
        return torch.nn.functional.pad(fields, (0, 0, 0, hi - lo - (last - first)))

    make = (_Trits if name == "trit5" else partial(_Squares, bits))(min(step, n), width)
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        make([plane(number, lo, hi) for number in range(codec.fields)], out[lo:hi])
    return out


class _Squares:
    """Bytes of as many bits a code as the fields have, some rows of so many bytes at a time, in memory of its own."""

    def __init__(self, bits: int, rows: int, width: int) -> None:
        dtype, self._steps = _TRANSPOSE[bits]
        self._room = torch.empty(3, rows, width, dtype=dtype)

    def __call__(self, parts: Sequence[torch.Tensor | None], out: torch.Tensor) -> None:
        """out [i, K] = the transposed squares of the fields of P rows, the first in the top bits."""
        square, wide, other = self._room[:, : len(out)]
        square.zero_()
        for part in parts:
            square.mul_(256)
            if part is not None:
                square.add_(wide.copy_(part))
        for distance, nearer in self._steps:
            torch.bitwise_right_shift(square, distance, out=other).bitwise_xor_(square).bitwise_and_(nearer)
            torch.bitwise_left_shift(other, distance, out=wide).bitwise_xor_(other)
            square.bitwise_xor_(wide)
        out.copy_(square.view(torch.uint8))


class _Trits:
    """Bytes of five trits of fields of 2 bits, some rows of so many bytes at a time, in memory of its own."""

    def __init__(self, rows: int, width: int) -> None:
        self._pairs = torch.empty(4, rows, 2, width // 4, dtype=torch.int32)
        self._sums = torch.empty(2, rows, 2, 2, width // 4, dtype=torch.int32)
        self._wide = torch.empty(2, rows, 2, 2, width, dtype=torch.int16)

    def __call__(self, parts: Sequence[torch.Tensor | None], out: torch.Tensor) -> None:
        """out [i, K] = ceil(256 v / 243) with v of the trits of five rows."""
        # fields 0 and 2, then fields 1 and 3 of a byte, each with room for a number below 16; four bytes an integer
        first, other, second, last = self._pairs[:, : len(out)]
        sums, more = self._sums[:, : len(out)]
        wide, carry = self._wide[:, : len(out)]
        _apart(parts[0], first).mul_(3).add_(_apart(parts[1], other))
        _apart(parts[2], second).mul_(3).add_(_apart(parts[3], other))
        _unfold(first, sums).mul_(9).add_(_unfold(second, more)).mul_(3)
        sums.add_(_unfold(_apart(parts[4], last), more))
        wide.copy_(sums.view(torch.uint8))
        torch.bitwise_right_shift(wide, 1, out=carry).add_(wide, alpha=_CEIL_FACTOR)
        wide.add_(carry.add_(_CEIL_ADDED).bitwise_right_shift_(_CEIL_SHIFT))
        low, high = wide[:, 0, 0].add_(wide[:, 0, 1], alpha=256), wide[:, 1, 0].add_(wide[:, 1, 1], alpha=256)
        words = carry.view(torch.int32).view(len(out), 2, -1)
        low, high = words[:, 0].copy_(low.add_(7 * 257)), words[:, 1].copy_(high.add_(7 * 257))
        out.copy_(high.mul_(1 << 16).add_(low.bitwise_and_(0xFFFF)).view(torch.uint8))


def _apart(part: torch.Tensor | None, both: torch.Tensor) -> torch.Tensor:
    """both [i, 2, ..] = fields of 2 bits, every second one in a byte of its own."""
    if part is None:
        return both.zero_()
    words = part.reshape(-1).view(torch.int32).view(both[:, 0].shape)
    torch.bitwise_and(words, _LOW_FIELDS, out=both[:, 0])
    torch.bitwise_right_shift(words, 2, out=both[:, 1]).bitwise_and_(_LOW_FIELDS)
    return both


def _unfold(pairs: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out [i, 2, ..] = the low and the high four bits of every byte."""
    torch.bitwise_and(pairs, _LOW_HALVES, out=out[:, 0])
    torch.bitwise_right_shift(pairs, 4, out=out[:, 1]).bitwise_and_(_LOW_HALVES)
    return out
