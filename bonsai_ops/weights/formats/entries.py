"""What a format reader hands over for each tensor name: where to get it, nothing read yet.

DenseTensor    an ordinary tensor
CodedTensor    codes and affine tables as the file stores them; `weight()` proves what they are and packs them
PackedTensor   already in our native form

A `Pack` is an opened file: its entries and what it says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import codec as codecs
from .. import regroup
from ..errors import PackError
from ..finite import NOT_FINITE, is_finite
from ..packed_weight import PackedWeight, narrow_exact
from ..releases import Census, release_of

DOWNLOAD_AGAIN = "Download the file again and compare its size and sha256 with the repository's."


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of dense weights."""


CHECKED_ROWS = 256
"""Rows of codes that are looked at together."""


class _FourthLevelError(ValueError):
    """A code that a three-level weight cannot have."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet. key: its name there, for messages."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def weight(self) -> PackedWeight | torch.Tensor:
        """The tensor, or the packed weight that has exactly its values. Raises PackError."""
        raise NotImplementedError

    def error(self, found: str, cure: str) -> PackError:
        """The error to raise for this tensor."""
        return PackError(self.path, found, cure, self.key)

    def wrong_shape(self, cure: str) -> PackError:
        """The error to raise for a shape that does not fit."""
        return self.error(f"has shape {list(self.shape)}", cure)

    def kind(self) -> str:
        """What it is, for messages."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenseTensor(Entry):
    """A tensor stored as it is. `load()` -> tensor of `shape` and `dtype`."""

    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    def weight(self) -> torch.Tensor:
        return self.load()

    def kind(self) -> str:
        return f"a dense tensor {list(self.shape)}"

    def require_float(self) -> None:
        """Raises PackError unless it is one of FLOATS."""
        if self.dtype not in FLOATS:
            raise self.error(
                f"is {self.dtype} {list(self.shape)}",
                "Expected bf16, fp16 or fp32 weights, or a Bonsai pack: gemlite, MLX or our native file.",
            )


@dataclass(frozen=True)
class PackedTensor(Entry):
    """A weight stored in native form. `load()` -> PackedWeight of `shape` (N, K)."""

    load: Callable[[], PackedWeight]

    def weight(self) -> PackedWeight:
        return self.load()

    def kind(self) -> str:
        return f"a packed tensor {list(self.shape)}"


@dataclass(frozen=True)
class CodedTensor(Entry):
    """A weight (N, K) stored as codes with two tables, w = code * scale + zero in float32.

    bits: 1, 2 or 4 bits a code. tables(): (scale, zero), each [N, K / group_size] of any float dtype.
    read(lo, hi): uint8 codes [hi - lo, K] of rows lo .. hi-1. zero_point: w = (code - zero) * scale instead.
    reading: for messages, what makes it this shape where the stored bytes allow several. fields(lo, hi): the codes of
    `read` as they are stored, uint8 [hi - lo, K bits / 8], the first in the low bits; None where they lie otherwise.
    """

    bits: int
    group_size: int
    tables: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    read: Callable[[int, int], torch.Tensor]
    zero_point: bool = False
    reading: str = ""
    fields: regroup.Read | None = None

    def weight(self) -> PackedWeight:
        """The canonical weight with exactly the values of the file.

        Binary (zero = -scale/2) and ternary (zero = -scale or -2 scale) tables lose their second table once that
        relation is proved for every group; anything else keeps both. Raises PackError for a fourth level in a tensor
        whose tables say ternary (zero = -scale) and for tables that are not finite.
        """
        if self.zero_point and self.bits < 4:
            return self._with_added_zero().weight()
        scale, zero = self.tables()
        for name, table in (("scale", scale), ("zero", zero)):
            if not is_finite(table):
                raise self.error(f"the {name} table {NOT_FINITE}", DOWNLOAD_AGAIN)
        symmetric = None if self.zero_point or self.bits == 4 else self._symmetric(scale.float(), zero.float())
        if symmetric is not None:
            magnitude, read, fields, scheme, codec = symmetric
            try:
                codes = self._codes(codec, read, fields)
            except _FourthLevelError as found:
                if torch.equal(zero.float(), -scale.float()):
                    raise self.error(
                        f"{found}, a fourth level, in a ternary weight (zero = -scale) whose codes are 0, 1 and 2",
                        DOWNLOAD_AGAIN,
                    ) from None
            else:
                return PackedWeight(codes, narrow_exact(magnitude), self.shape, scheme, codec, self.group_size)
        codec = {1: "bit", 2: "crumb", 4: "nibble"}[self.bits]
        codes = self._codes(codec, self.read, self.fields)
        scheme = "zero_point" if self.zero_point else "affine"
        return PackedWeight(codes, narrow_exact(scale), self.shape, scheme, codec, self.group_size, narrow_exact(zero))

    def _codes(self, codec: str, read: Callable[[int, int], torch.Tensor], fields: regroup.Read | None) -> torch.Tensor:
        """The bytes of a codec, of fields where there are some."""
        if fields is None or not regroup.regroups(codec, self.bits):
            return codecs.encode_rows(codec, *self.shape, read)
        return regroup.regroup_rows(codec, *self.shape, fields, self.bits)

    def wrong_shape(self, cure: str) -> PackError:
        return self.error(f"has shape {list(self.shape)}{self.reading and f', {self.reading}'}", cure)

    def kind(self) -> str:
        return f"{self.bits}-bit codes {list(self.shape)}"

    def _with_added_zero(self) -> CodedTensor:
        """A weight of 1 or 2 bits whose zero is subtracted as one with an added zero, -zero * scale.

        Where a level that it has would not be the same in float32, the codes become 4-bit ones and the zero stays.
        """
        scale, zero = (table.float() for table in self.tables())
        added = -zero * scale
        rows = range(0, self.shape[0], CHECKED_ROWS)
        levels = {code for lo in rows for code in self.read(lo, lo + CHECKED_ROWS).unique().tolist()}
        if all(torch.equal((level - zero) * scale, level * scale + added) for level in levels):
            return replace(self, zero_point=False, tables=lambda: (scale, added))
        return replace(self, bits=4, fields=None)

    def _symmetric(
        self, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[int, int], torch.Tensor], regroup.Read | None, str, str] | None:
        """(magnitude, readers of canonical codes and of their fields, scheme, codec) if every group is {-s, s} or
        {-s, 0, s}, else None."""
        if self.bits == 1:
            high = scale + zero
            if not torch.equal(high, -zero):
                return None
            negative = high < 0
            flip = negative if bool(negative.any()) else None
            fields = None if self.fields is None or flip is not None else self._signs_fields
            return high.abs(), lambda lo, hi: self._signs(lo, hi, flip), fields, "binary", "bit"
        middle_is_one, middle_is_two = zero == -scale, zero == -2 * scale
        if not bool((middle_is_one | middle_is_two).all()):
            return None
        plain = bool((middle_is_one & (scale >= 0)).all())
        tables = None if plain else (torch.where(middle_is_one, 1, 2).to(torch.int8), scale < 0)
        fields = self._trits_fields if self.fields is not None and plain else None
        return scale.abs(), lambda lo, hi: self._trits(lo, hi, tables), fields, "ternary", "trit5"

    def _signs(self, lo: int, hi: int, flip: torch.Tensor | None) -> torch.Tensor:
        """Codes 1 (high level) -> 0 (plus), 0 -> 1 (minus); the other way round where the high level is negative."""
        codes = self.read(lo, hi).bitwise_xor(1)
        return codes if flip is None else codes.bitwise_xor_(self._spread(flip[lo:hi].to(torch.uint8)))

    def _signs_fields(self, lo: int, hi: int) -> torch.Tensor:
        """As `_signs` where no high level is negative, eight codes a byte."""
        return self.fields(lo, hi).bitwise_not()

    def _trits_fields(self, lo: int, hi: int) -> torch.Tensor:
        """As `_trits` where every middle is 1 and no scale negative, four codes a byte."""
        stored = self.fields(lo, hi)
        words = stored.reshape(-1).view(torch.int32)
        if bool((words >> 1).bitwise_and_(words).bitwise_and_(0x55555555).any()):
            self._trits(lo, hi, None)  # says where
        return torch.bitwise_xor(words, -1).sub_(0x55555555).view(torch.uint8).view(stored.shape)

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


@dataclass(frozen=True)
class Pack:
    """An opened file of weights. format: NAME of the module that read it. entries: {name in it: entry}."""

    path: Path
    format: str
    entries: Mapping[str, Entry]
    pack_dense: Callable[[DenseTensor], Entry] | None = None
    """What makes a packed layer of a dense one, for a format whose dense layers are low-bit in truth."""
    source: Mapping[str, str] = field(default_factory=dict)
    """For a native file: {"file": .., "sha256": ..} of what it was made from."""
    architecture: str = "flux2"
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """For a native file of another architecture: ComfyUI's configuration of it."""
    recorded: bool = False
    """Its own record lists the layers: none of them can be missing."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """{last part of the name: whole number} of its metadata, such as block_count."""
    prefix: str | None = None
    """What the names of its transformer begin with, where its own record says so."""
    beside: tuple[str, ...] = ()
    """What else is in the file and is not among the entries: first parts of names, such as vae."""
    census: Census = field(default_factory=Census)

    @property
    def release(self) -> str:
        """Which published file it is, or what else is known of where it comes from: releases.py."""
        return release_of(self.path, self.census, self.source)


def fuse_rows(key: str, parts: Sequence[CodedTensor] | Sequence[DenseTensor]) -> CodedTensor | DenseTensor:
    """One entry whose rows are those of `parts` one after another (q, k, v -> qkv). Exact: groups run along K.

    Raises PackError if the parts differ in kind, K, group size or convention.
    """
    first = parts[0]
    for part in parts[1:]:
        if type(part) is not type(first) or part.shape[1:] != first.shape[1:]:
            raise part.error(
                f"is stored as {part.kind()}, but {first.key} as {first.kind()}",
                "The layers of one attention must be stored alike: use the pack as it was published.",
            )
    rows = sum(p.shape[0] for p in parts)
    shape = (rows, *first.shape[1:])
    if isinstance(first, DenseTensor):
        return DenseTensor(first.path, key, shape, first.dtype, lambda: torch.cat([p.load() for p in parts]))
    if not isinstance(first, CodedTensor):
        raise first.error(f"is {first.kind()} with a name of diffusers", "Expected BFL names in a native file.")
    for part in parts[1:]:
        if part.zero_point != first.zero_point:
            raise part.error(
                f"has a zero that is {'subtracted' if part.zero_point else 'added'}, other than {first.key}",
                "The layers of one attention must be packed alike: use the pack as it was published.",
            )
        if part.group_size != first.group_size:
            raise part.error(
                f"has group size {part.group_size}, but {first.key} has {first.group_size}",
                "The layers of one attention must be packed alike: use the pack as it was published.",
            )
    bits = max(p.bits for p in parts)
    parts = [_widen(p, bits) for p in parts]
    starts = [sum(p.shape[0] for p in parts[:i]) for i in range(len(parts))]

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [p.tables() for p in parts]
        return torch.cat([s.float() for s, _ in pairs]), torch.cat([z.float() for _, z in pairs])

    def rows_of(readers: Sequence[Callable[[int, int], torch.Tensor]], lo: int, hi: int) -> torch.Tensor:
        pieces = [
            read(max(lo - start, 0), min(hi - start, p.shape[0]))
            for p, start, read in zip(parts, starts, readers, strict=True)
            if lo < start + p.shape[0] and hi > start
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    fields = [p.fields for p in parts]
    return CodedTensor(
        first.path,
        key,
        shape,
        bits,
        first.group_size,
        tables,
        partial(rows_of, [p.read for p in parts]),
        first.zero_point,
        fields=None if None in fields else partial(rows_of, fields),
    )


def _widen(part: CodedTensor, bits: int) -> CodedTensor:
    """A part with codes of more bits: twice the code and half the scale, the same values."""
    if part.bits == bits:
        return part

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = part.tables()
        return scale.float() / 2, zero.float() * (2 if part.zero_point else 1)

    return replace(part, bits=bits, tables=tables, read=lambda lo, hi: part.read(lo, hi) * 2, fields=None)
