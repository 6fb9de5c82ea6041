"""Codes <-> bytes: how the integer codes of a weight [N, K] are stored in memory and in our native files.

A codec has a radix r and puts P = fields codes of 0 .. r-1 into one byte:

    name     radix  fields   bits a code
    bit          2       8   1
    crumb        4       4   2
    trit5        3       5   1.6   (3^5 = 243 of the 256 byte values)
    nibble      16       2   4
    byte       256       1   8

Layout, the same for all ("N-planar": nothing of K is padded, groups along K never straddle a byte):

    n = 8 * ceil(N / (8 P)) byte rows; B[i, k] holds the codes of rows i, n + i, 2n + i, .. (P-1) n + i at column k.
    Rows >= N are padding and hold code 0.

Byte value: with v = c_0 r^(P-1) + c_1 r^(P-2) + .. + c_(P-1), B = ceil(256 v / r^P). So B / 256 is the fraction
0.c_0 c_1 .. in base r, and every code is the carry of a multiplication: y = r B; c = y >> 8; B = y & 255; and so on.
For radix 2, 4, 16 and 256 this is plain bit packing, first code in the top bits.

Only torch integer operations; the same result on every device. No I/O, no ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

SCRATCH_BYTES = 32 << 20
"""Bound on the temporary memory of one encode or decode step; about six bytes a code are in use at a time."""

CHECKED_BYTES = 512 << 10
"""Bytes that `holds` looks at together: few enough for a processor's cache."""


@dataclass(frozen=True)
class Codec:
    """One way to put codes into bytes. `radix`: number of code values; `fields`: codes a byte."""

    name: str
    radix: int
    fields: int

    def byte_rows(self, rows: int) -> int:
        """Byte rows n that hold `rows` rows of codes."""
        return 8 * -(-rows // (8 * self.fields))

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that codes [rows, columns] take."""
        return self.byte_rows(rows) * columns


CODECS = {
    c.name: c
    for c in (
        Codec("bit", 2, 8),
        Codec("crumb", 4, 4),
        Codec("trit5", 3, 5),
        Codec("nibble", 16, 2),
        Codec("byte", 256, 1),
    )
}


def get_codec(name: str) -> Codec:
    """The codec called `name`. Raises ValueError for an unknown one."""
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}, expected one of {', '.join(CODECS)}")
    return CODECS[name]


def step_rows(codec: Codec, columns: int) -> int:
    """Byte rows a step may take so that its temporaries stay below SCRATCH_BYTES."""
    return max(8, SCRATCH_BYTES // (6 * codec.fields * max(columns, 1)) // 8 * 8)


def encode_rows(name: str, rows: int, columns: int, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Packs codes that `read` delivers piece by piece.

    read(lo, hi) -> uint8 codes [hi - lo, columns] of rows lo .. hi-1, each below the radix; called with at most
    step_rows() rows. Returns uint8 [byte_rows, columns] on the device of what `read` returns. Raises ValueError for an
    empty weight, a piece of the wrong shape or dtype or a code outside the codec.
    """
    codec = get_codec(name)
    if rows < 1 or columns < 1:
        raise ValueError(f"cannot encode a weight of shape {(rows, columns)}")
    n = codec.byte_rows(rows)
    step = step_rows(codec, columns)
    to_byte = 256 / codec.radix**codec.fields
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        value: torch.Tensor | None = None
        for plane in range(codec.fields):
            first, last = min(plane * n + lo, rows), min(plane * n + hi, rows)
            if value is not None:
                value.mul_(codec.radix)
            if first == last:
                continue
            codes = read(first, last)
            if codes.dtype != torch.uint8 or tuple(codes.shape) != (last - first, columns):
                raise ValueError(
                    f"codes of rows {first}..{last - 1} are {codes.dtype} {tuple(codes.shape)}, "
                    f"expected torch.uint8 {(last - first, columns)}"
                )
            highest = int(codes.max())
            if highest >= codec.radix:
                raise ValueError(f"code {highest} in rows {first}..{last - 1} does not fit codec {name}")
            if value is None:
                value = torch.zeros(hi - lo, columns, dtype=torch.uint8, device=codes.device)
            value[: last - first].add_(codes)
        if value is None:
            continue  # nothing but padding
        if lo == 0:
            out = torch.zeros(n, columns, dtype=torch.uint8, device=value.device)
        # ceil(256 v / r^P); v is below r^P, so the quotient is never within rounding of the next integer
        out[lo:hi] = value if to_byte == 1 else (value.to(torch.float32) * to_byte).ceil_().to(torch.uint8)
    return out


def encode(name: str, codes: torch.Tensor) -> torch.Tensor:
    """Packs uint8 codes [N, K] into uint8 [byte_rows(N), K]. Raises ValueError for a code outside the codec."""
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [N, K]")
    rows, columns = codes.shape
    return encode_rows(name, rows, columns, lambda lo, hi: codes[lo:hi])


def planes(name: str, packed: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the codes of each plane of `packed` (uint8 [i, K], any run of byte rows) in turn, int16 [i, K].

    Plane p of byte rows lo .. hi-1 are the weight's rows p n + lo .. p n + hi - 1.
    """
    codec = get_codec(name)
    rest = packed.to(torch.int16)
    if codec.fields == 1:  # the byte is the code; its carry does not fit int16
        yield rest
        return
    for plane in range(codec.fields):
        rest = rest * codec.radix if plane == 0 else rest.mul_(codec.radix)
        yield rest >> 8
        rest.bitwise_and_(255)


def fractions(name: str, packed: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """What is left of `packed` (uint8 [i, K], a run of byte rows) at the planes first .. last-1: uint8 [planes, i, K].

    It begins with the code of its plane, code = radix * fraction >> 8: r^plane B modulo 256, one operation a plane. For
    plane 0 alone it is `packed` itself.
    """
    radix = get_codec(name).radix
    if (first, last) == (0, 1):
        return packed.unsqueeze(0)
    out = torch.empty(last - first, *packed.shape, dtype=torch.uint8, device=packed.device)
    for plane in range(first, last):
        torch.mul(packed, radix**plane % 256, out=out[plane - first])
    return out


def decode_plane(name: str, packed: torch.Tensor, plane: int) -> torch.Tensor:
    """The codes of one plane of `packed` (uint8 [i, K], any run of byte rows): uint8 [i, K]."""
    radix = get_codec(name).radix
    prefix = packed.to(torch.int32).mul_(radix ** (plane + 1)).bitwise_right_shift_(8)
    return prefix.remainder_(radix).to(torch.uint8)


def holds(name: str, radix: int, packed: torch.Tensor) -> bool:
    """True if every byte of `packed` (uint8) is one that the codec makes of codes below `radix`.

    Piece by piece; on a CPU about 0.2 s a GB. With r and P of the codec, r^P B mod 256 < r^P for the bytes that it
    makes and no others.
    """
    codec = get_codec(name)
    made = codec.radix**codec.fields
    third = name == "crumb" and radix == 3
    if radix < codec.radix and not third:
        raise ValueError(f"codes below {radix} in codec {name} are not checked")
    if made == 256 and not third:
        return True
    for piece in packed.reshape(-1).split(CHECKED_BYTES):
        if third:
            if int((piece >> 1).bitwise_and_(piece).bitwise_and_(0x55).max()):
                return False
        elif int((piece * made).max()) >= made:
            return False
    return True


def decode(name: str, packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Unpacks uint8 [byte_rows(rows), K] into uint8 codes [rows, K]. Raises ValueError if the shape does not fit."""
    codec = get_codec(name)
    n = codec.byte_rows(rows)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[0] != n:
        raise ValueError(
            f"{name} codes of {rows} rows are {packed.dtype} {tuple(packed.shape)}, expected torch.uint8 [{n}, K]"
        )
    columns = packed.shape[1]
    out = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    step = step_rows(codec, columns)
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        for plane, codes in enumerate(planes(name, packed[lo:hi])):
            first, last = min(plane * n + lo, rows), min(plane * n + hi, rows)
            out[first:last] = codes[: last - first]
    return out


def decode_selected(name: str, packed: torch.Tensor, rows: int, index: torch.Tensor) -> torch.Tensor:
    """Codes of the rows in `index` (int64 [T], each below `rows`): uint8 [T, K]. For embedding tables."""
    codec = get_codec(name)
    n = codec.byte_rows(rows)
    plane = torch.div(index, n, rounding_mode="floor")
    power = torch.pow(codec.radix, plane + 1)
    prefix = (packed.index_select(0, index - plane * n).to(torch.int64) * power.unsqueeze(-1)) >> 8
    return prefix.remainder_(codec.radix).to(torch.uint8)


_SPREAD = {
    # bits: (integer type of one spread byte, ((shift, mask), ..)): each step halves the distance between fields
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    4: (torch.int16, ((4, 0x0F0F),)),
}


def spread_fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpacks bytes whose `bits`-wide fields run along the last dimension, least significant first.

    uint8 [n, B] -> uint8 [n, 8 B / bits]. This is the order of gemlite (after transposing) and of MLX words.
    """
    if bits not in _SPREAD:
        raise ValueError(f"fields of {bits} bits are not supported, expected 1, 2 or 4")
    wide, steps = _SPREAD[bits]
    x = packed.contiguous().to(wide)
    for shift, mask in steps:
        x = x.bitwise_or_(x << shift).bitwise_and_(mask)
    return x.view(torch.uint8)
