"""What a format reader hands over for each tensor name: where to get it, nothing read yet.

DenseTensor    an ordinary tensor
CodedTensor    codes and affine tables as the file stores them; `pack()` proves what they are and packs them
PackedTensor   already in our native form
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import codec as codecs
from ..errors import PackError
from ..packed_weight import PackedWeight, narrow_exact

DOWNLOAD_AGAIN = "Download the file again and compare its size and sha256 with the repository's."


class _FourthLevelError(ValueError):
    """A code that a three-level weight cannot have."""


@dataclass(frozen=True)
class DenseTensor:
    """A tensor stored as it is. `load()` -> tensor of `shape` and `dtype`."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class PackedTensor:
    """A weight stored in native form. `load()` -> PackedWeight of `shape` (N, K)."""

    path: Path
    key: str
    shape: tuple[int, int]
    load: Callable[[], PackedWeight]


@dataclass(frozen=True)
class CodedTensor:
    """A weight (N, K) stored as codes with two tables, w = code * scale + zero in float32.

    bits: 1, 2 or 4 bits a code. tables(): (scale, zero), each [N, K / group_size] of any float dtype.
    read(lo, hi): uint8 codes [hi - lo, K] of rows lo .. hi-1. zero_point: w = (code - zero) * scale instead (4 bit).
    reading: for messages, what makes it this shape where the stored bytes allow several.
    """

    path: Path
    key: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    tables: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    read: Callable[[int, int], torch.Tensor]
    zero_point: bool = False
    reading: str = ""

    def pack(self) -> PackedWeight:
        """The canonical weight with exactly the values of the file.

        Binary (zero = -scale/2) and ternary (zero = -scale or -2 scale) tables lose their second table once that
        relation is proved for every group; anything else keeps both. Raises PackError for a fourth level in a tensor
        whose tables say ternary (zero = -scale) and for tables that are not finite.
        """
        scale, zero = self.tables()
        for name, table in (("scale", scale), ("zero", zero)):
            if not bool(torch.isfinite(table).all()):
                raise PackError(
                    self.path, f"the {name} table holds a value that is not finite", DOWNLOAD_AGAIN, self.key
                )
        symmetric = None if self.zero_point or self.bits == 4 else self._symmetric(scale.float(), zero.float())
        if symmetric is not None:
            magnitude, read, scheme, codec = symmetric
            try:
                codes = codecs.encode_rows(codec, *self.shape, read)
            except _FourthLevelError as found:
                if torch.equal(zero.float(), -scale.float()):
                    raise PackError(
                        self.path,
                        f"{found}, a fourth level, in a ternary weight (zero = -scale) whose codes are 0, 1 and 2",
                        DOWNLOAD_AGAIN,
                        self.key,
                    ) from None
            else:
                return PackedWeight(codes, narrow_exact(magnitude), self.shape, scheme, codec, self.group_size)
        codec = {1: "bit", 2: "crumb", 4: "nibble"}[self.bits]
        codes = codecs.encode_rows(codec, *self.shape, self.read)
        scheme = "zero_point" if self.zero_point else "affine"
        return PackedWeight(codes, narrow_exact(scale), self.shape, scheme, codec, self.group_size, narrow_exact(zero))

    def _symmetric(
        self, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[int, int], torch.Tensor], str, str] | None:
        """(magnitude, reader of canonical codes, scheme, codec) if every group is {-s, s} or {-s, 0, s}, else None."""
        if self.bits == 1:
            high = scale + zero
            if not torch.equal(high, -zero):
                return None
            negative = high < 0
            flip = negative if bool(negative.any()) else None
            return high.abs(), lambda lo, hi: self._signs(lo, hi, flip), "binary", "bit"
        middle_is_one, middle_is_two = zero == -scale, zero == -2 * scale
        if not bool((middle_is_one | middle_is_two).all()):
            return None
        plain = bool((middle_is_one & (scale >= 0)).all())
        tables = None if plain else (torch.where(middle_is_one, 1, 2).to(torch.int8), scale < 0)
        return scale.abs(), lambda lo, hi: self._trits(lo, hi, tables), "ternary", "trit5"

    def _signs(self, lo: int, hi: int, flip: torch.Tensor | None) -> torch.Tensor:
        """Codes 1 (high level) -> 0 (plus), 0 -> 1 (minus); the other way round where the high level is negative."""
        codes = self.read(lo, hi).bitwise_xor(1)
        return codes if flip is None else codes.bitwise_xor_(self._spread(flip[lo:hi].to(torch.uint8)))

    def _trits(self, lo: int, hi: int, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Codes -> 0 (plus), 1 (zero), 2 (minus)."""
        codes = self.read(lo, hi)
        if tables is None:
            trits = 2 - codes
        else:
            middle, negative = (self._spread(t[lo:hi]) for t in tables)
            trits = codes.to(torch.int8) - middle
            trits = torch.where(negative, 1 + trits, 1 - trits).to(torch.uint8)
        if int(trits.max()) > 2:
            row, column = (trits > 2).nonzero()[0].tolist()
            raise _FourthLevelError(f"row {lo + row}, column {column} has code {int(codes[row, column])}")
        return trits

    def _spread(self, table: torch.Tensor) -> torch.Tensor:
        """[n, K / group] -> [n, K]."""
        return table.repeat_interleave(self.group_size, dim=1)


Entry = DenseTensor | CodedTensor | PackedTensor


def fuse_rows(key: str, parts: Sequence[CodedTensor] | Sequence[DenseTensor]) -> CodedTensor | DenseTensor:
    """One entry whose rows are those of `parts` one after another (q, k, v -> qkv). Exact: groups run along K.

    Raises PackError if the parts differ in kind, K, group size or convention.
    """
    first = parts[0]
    for part in parts[1:]:
        if type(part) is not type(first) or part.shape[1:] != first.shape[1:]:
            raise PackError(
                part.path,
                f"is stored as {_kind(part)}, but {first.key} as {_kind(first)}",
                "The layers of one attention must be stored alike: use the pack as it was published.",
                part.key,
            )
    rows = sum(p.shape[0] for p in parts)
    shape = (rows, *first.shape[1:])
    if isinstance(first, DenseTensor):
        return DenseTensor(first.path, key, shape, first.dtype, lambda: torch.cat([p.load() for p in parts]))
    for part in parts[1:]:
        if (part.group_size, part.zero_point) != (first.group_size, first.zero_point):
            raise PackError(
                part.path,
                f"has group size {part.group_size}, but {first.key} has {first.group_size}",
                "The layers of one attention must be packed alike: use the pack as it was published.",
                part.key,
            )
    bits = max(p.bits for p in parts)
    parts = [_widen(p, bits) for p in parts]
    starts = [sum(p.shape[0] for p in parts[:i]) for i in range(len(parts))]

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [p.tables() for p in parts]
        return torch.cat([s.float() for s, _ in pairs]), torch.cat([z.float() for _, z in pairs])

    def read(lo: int, hi: int) -> torch.Tensor:
        pieces = [
            p.read(max(lo - start, 0), min(hi - start, p.shape[0]))
            for p, start in zip(parts, starts, strict=True)
            if lo < start + p.shape[0] and hi > start
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return CodedTensor(first.path, key, shape, bits, first.group_size, tables, read, first.zero_point)


def _widen(part: CodedTensor, bits: int) -> CodedTensor:
    """A 1-bit part as 2-bit codes {0, 2} of half the scale: the same values."""
    if part.bits == bits:
        return part

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = part.tables()
        return scale.float() / 2, zero.float()

    return CodedTensor(
        part.path,
        part.key,
        part.shape,
        bits,
        part.group_size,
        tables,
        lambda lo, hi: part.read(lo, hi) * 2,
        part.zero_point,
    )


def describe_shape(entry: Entry) -> str:
    """The beginning of a message about an entry of a wrong shape."""
    reading = entry.reading if isinstance(entry, CodedTensor) else ""
    return f"has shape {list(entry.shape)}{reading and f', {reading}'}"


def _kind(entry: Entry) -> str:
    if isinstance(entry, CodedTensor):
        return f"{entry.bits}-bit codes {list(entry.shape)}"
    return f"a {'packed' if isinstance(entry, PackedTensor) else 'dense'} tensor {list(entry.shape)}"
