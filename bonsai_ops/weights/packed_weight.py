"""The canonical packed weight: what every format becomes and every backend multiplies.

    scheme      code -> value                         codec
    binary      w = s (1 - 2 c),  c in {0, 1}         bit
    ternary     w = s (1 - c),    c in {0, 1, 2}      trit5, crumb
    affine      w = c s + z       (z added last)      bit, crumb, nibble, byte
    zero_point  w = (c - z) s     (z subtracted)      nibble

s and z are per row and group of `group_size` consecutive columns. Values are computed in float32 and rounded once to
the requested dtype; for binary and ternary that equals rounding s, because the codes only negate it or make it zero.

A weight may have a low-rank residual, matrices up [N, r] and down [r, K]: then up down is added to these values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import codec as codecs

FORM = ("scheme", "codec", "group_size")
"""What says how the codes of a weight are read; a native file records it."""
TABLES = ("scale", "zero", "up", "down")
"""The tensors that may stand beside the codes."""

Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor]
"""(integer codes [.., g], scale [.., 1], zero [.., 1] or None, dtype) -> values [.., g] in that dtype."""


Unpack = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor]
"""(fractions of codec.fractions [.., g], radix, scale [.., 1], zero [.., 1] or None, dtype) -> the same values."""


@dataclass(frozen=True)
class Scheme:
    """What codes mean. codecs: those it may have, the smallest first. levels: of a group, None where the codec decides.

    unpack: the formula in as few operations as can be. has_zero: whether a zero table belongs to it.
    """

    name: str
    codecs: tuple[str, ...]
    formula: Formula
    unpack: Unpack
    levels: int | None = None
    has_zero: bool = False

    def values(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Integer codes -> values in `dtype`, both [R, K], or [.., g]; tables [R, K / group], or [..]."""
        tables = (None if table is None else table.unsqueeze(-1) for table in (scale, zero))
        group = codes.shape[-1] if codes.ndim > scale.ndim else codes.shape[-1] // scale.shape[-1]
        return self.formula(codes.reshape(*scale.shape, group), *tables, dtype).view(codes.shape)


def _signed(step: int) -> Formula:
    return lambda codes, scale, _, dtype: (
        torch.rsub(codes.to(torch.int16), 1, alpha=step).to(dtype).mul_(scale.to(dtype))
    )


def _affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(torch.float32).mul_(scale.to(torch.float32)).add_(zero.to(torch.float32)).to(dtype)


def _zero_point(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(torch.float32).sub_(zero.to(torch.float32)).mul_(scale.to(torch.float32)).to(dtype)


def _unpack_binary(
    fractions: torch.Tensor, radix: int, scale: torch.Tensor, zero: None, dtype: torch.dtype
) -> torch.Tensor:
    return (fractions.view(torch.int8) >> 7).bitwise_or_(1).mul(scale.to(dtype))


def _unpack_ternary(
    fractions: torch.Tensor, radix: int, scale: torch.Tensor, zero: None, dtype: torch.dtype
) -> torch.Tensor:
    """The high byte of 511 - radix * fraction is 1 - code."""
    top = torch.full((1,), 511, dtype=torch.int16, device=fractions.device)
    both = torch.sub(top, fractions, alpha=radix).view(torch.int8).unflatten(-1, (-1, 2))
    return both[..., HIGH_BYTE].mul(scale.to(dtype))


def _unpack_affine(
    fractions: torch.Tensor, radix: int, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    values = _codes(fractions, radix).mul(scale.float())
    return torch.add(values, zero.float(), out=_room(values, dtype))


def _unpack_zero_point(
    fractions: torch.Tensor, radix: int, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    values = _codes(fractions, radix).sub(zero.float())
    return torch.mul(values, scale.float(), out=_room(values, dtype))


def _codes(fractions: torch.Tensor, radix: int) -> torch.Tensor:
    """uint8, for a radix that is a power of two."""
    return fractions if radix == 256 else fractions >> (9 - radix.bit_length())


def _room(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where float32 values become those of a dtype as they are written."""
    return values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)


HIGH_BYTE = 1 if sys.byteorder == "little" else 0

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("binary", ("bit",), _signed(2), _unpack_binary, levels=2),
        Scheme("ternary", ("trit5", "crumb"), _signed(1), _unpack_ternary, levels=3),
        Scheme("affine", ("bit", "crumb", "nibble", "byte"), _affine, _unpack_affine, has_zero=True),
        Scheme("zero_point", ("nibble",), _zero_point, _unpack_zero_point, has_zero=True),
    )
}

DENSITIES = {"compact": "trit5", "fast": "crumb"}
"""How a ternary weight lies in memory: density -> codec. Every other scheme has one form."""
TABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of a scale or zero table."""

SCRATCH_BYTES = 24 << 20
"""Bound on the unpacked piece of a weight that `pieces` works on, its integer temporaries included."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in packed form.

    codes: uint8 [byte_rows(N), K]. scale: bf16, fp16 or fp32 [N, K / group_size]. zero: None (binary, ternary) or of
    that shape and one of these dtypes. shape: (N, K). up, down: None, or the low-rank residual in one of these dtypes.
    Raises ValueError when the parts do not fit together.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    scheme: str
    codec: str
    group_size: int
    zero: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None

    def __post_init__(self) -> None:
        scheme = find_scheme(self.scheme, self.codec)
        rows, columns = self.shape
        if self.group_size < 32 or self.group_size % 32 or columns % self.group_size:
            raise ValueError(
                f"group size {self.group_size} does not fit {columns} columns: expected a multiple of 32 "
                "that divides them"
            )
        expected = (codecs.get_codec(self.codec).byte_rows(rows), columns)
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != expected:
            raise ValueError(f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, expected torch.uint8 {expected}")
        table = (rows, columns // self.group_size)
        if (self.zero is not None) != scheme.has_zero:
            raise ValueError(f"scheme {self.scheme} {'has no' if self.zero is not None else 'needs a'} zero table")
        for name, found in (("scale", self.scale), ("zero", self.zero)):
            if found is not None and (tuple(found.shape) != table or found.dtype not in TABLE_DTYPES):
                raise ValueError(
                    f"{name} is {found.dtype} {tuple(found.shape)}, expected bf16, fp16 or fp32 of shape {table}"
                )
        if (self.up, self.down) != (None, None):
            self._check_residual()

    def _check_residual(self) -> None:
        found = [None if m is None else (tuple(m.shape), m.dtype in TABLE_DTYPES) for m in (self.up, self.down)]
        rank = self.rank
        if found != [((self.shape[0], rank), True), ((rank, self.shape[1]), True)]:
            raise ValueError(
                f"residual is {[m if m is None else (m.dtype, tuple(m.shape)) for m in (self.up, self.down)]}, "
                f"expected bf16, fp16 or fp32 of shapes ({self.shape[0]}, r) and (r, {self.shape[1]})"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self.codes.nbytes + sum(table.nbytes for table in self.tables().values())

    def tables(self) -> dict[str, torch.Tensor]:
        """{name of TABLES: tensor} of those it has."""
        return {name: table for name in TABLES if (table := getattr(self, name)) is not None}

    @property
    def rank(self) -> int:
        """r of the low-rank residual, 0 without one."""
        return 0 if self.up is None else self.up.shape[-1]

    def without_residual(self) -> PackedWeight:
        """The codes and tables alone; the weight itself where it has no residual."""
        return self if self.up is None else replace(self, up=None, down=None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on `device`."""
        return replace(
            self, codes=self.codes.to(device), **{name: table.to(device) for name, table in self.tables().items()}
        )

    def pieces(self, dtype: torch.dtype, scratch_bytes: int | None = None) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields (first row, last row + 1, values [rows, K] in `dtype`) until every row was seen once.

        Each piece is valid until the next is asked for; temporaries stay below `scratch_bytes`, by default
        SCRATCH_BYTES.
        """
        rows, columns = self.shape
        n = codecs.get_codec(self.codec).byte_rows(rows)
        scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
        most = scratch_bytes // (_working_bytes(self.codes.device, dtype) * columns)
        whole, step = most // n * n, max(8, most // 8 * 8)
        first = 0
        while first < rows:  # some whole planes at a time, or a part of one
            last = min(first + whole if whole else min(first + step, first // n * n + n), rows)
            yield first, last, self._unpacked(first, last, dtype)
            first = last

    def _unpacked(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The rows first .. last-1, of whole planes or within one."""
        n = codecs.get_codec(self.codec).byte_rows(self.shape[0])
        plane, start = divmod(first, n)
        end = -(-last // n)
        packed = self.codes if end > plane + 1 else self.codes[start : start + last - first]
        rest = codecs.fractions(self.codec, packed, plane, end).flatten(0, 1)[: last - first]
        rows = slice(first, last)
        if self.up is not None:
            return self._with_residual(self.without_residual()._of_fractions(rest, rows, torch.float32), rows, dtype)
        return self._of_fractions(rest, rows, dtype)

    def _of_fractions(self, rest: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        scale = self.scale[rows].unsqueeze(-1)
        zero = None if self.zero is None else self.zero[rows].unsqueeze(-1)
        grouped, radix = rest.view(*scale.shape[:-1], self.group_size), codecs.get_codec(self.codec).radix
        return SCHEMES[self.scheme].unpack(grouped, radix, scale, zero, dtype).view(rest.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All values [N, K] in `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for first, last, values in self.pieces(dtype):
            out[first:last] = values
        return out

    def select_rows(self, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values of the rows in `index` (int64 [T]): [T, K] in `dtype`. For embedding tables."""
        codes = codecs.decode_selected(self.codec, self.codes, self.shape[0], index)
        return self._values(codes, index, dtype)

    def _values(self, codes: torch.Tensor, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Codes [R, K] of the given rows -> values [R, K], those of the residual included."""
        if self.up is not None:
            return self._with_residual(self.without_residual()._values(codes, rows, torch.float32), rows, dtype)
        zero = None if self.zero is None else self.zero[rows]
        return SCHEMES[self.scheme].values(codes, self.scale[rows], zero, dtype)

    def _with_residual(self, values: torch.Tensor, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 values, which are written to, and up down, in `dtype`."""
        return values.addmm_(self.up[rows].float(), self.down.float()).to(dtype)


def _working_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes a weight while it is unpacked. A processor converts operands into memory first, a GPU as it reads them."""
    return (4 if device.type == "cpu" else 0) + max(4, dtype.itemsize) + 4


def find_scheme(name: str, codec: str) -> Scheme:
    """The scheme of that name. Raises ValueError if there is none or it has no such codec."""
    if name not in SCHEMES or codec not in SCHEMES[name].codecs:
        raise ValueError(f"scheme {name!r} with codec {codec!r} is not a packed weight")
    return SCHEMES[name]


def recode(weight: PackedWeight, codec: str) -> PackedWeight:
    """The same weight with its codes in another codec, byte rows at a time; `weight` itself if nothing changes.

    Raises ValueError if the scheme has no such codec or a code does not fit it.
    """
    if codec == weight.codec:
        return weight
    find_scheme(weight.scheme, codec)
    rows, columns = weight.shape
    n = codecs.get_codec(weight.codec).byte_rows(rows)

    def read(lo: int, hi: int) -> torch.Tensor:
        pieces, row = [], lo
        while row < hi:
            plane, first = divmod(row, n)
            last = min(first + hi - row, n)
            pieces.append(codecs.decode_plane(weight.codec, weight.codes[first:last], plane))
            row += last - first
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return replace(weight, codes=codecs.encode_rows(codec, rows, columns, read), codec=codec)


def at_density(weight: PackedWeight, density: str) -> PackedWeight:
    """A ternary weight in the codec of a density of DENSITIES, any other weight as it is."""
    return recode(weight, DENSITIES[density]) if weight.scheme == "ternary" else weight


def narrow_exact(table: torch.Tensor) -> torch.Tensor:
    """`table`, of any float dtype, in the first of bf16, fp16 and fp32 that holds every value exactly.

    fp64 values that none of them holds are rounded to fp32, the precision in which values are computed.
    """
    for dtype in (torch.bfloat16, torch.float16):
        narrow = table.to(dtype)
        if torch.equal(narrow.to(table.dtype), table):
            return narrow.contiguous()
    return table.to(torch.float32).contiguous()


def pack_signs(codes: torch.Tensor, scale: torch.Tensor, group_size: int, scheme: str) -> PackedWeight:
    """A binary or ternary weight from codes uint8 [N, K] as the table above defines them and scale [N, K/group]."""
    codec = SCHEMES[scheme].codecs[0]
    return PackedWeight(
        codecs.encode(codec, codes), narrow_exact(scale), (codes.shape[0], codes.shape[1]), scheme, codec, group_size
    )
