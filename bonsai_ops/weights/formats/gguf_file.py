"""Reading a GGUF file, llama.cpp's container: header first, tensors mapped from disk.

"GGUF", u32 version, u64 tensors, u64 pairs; pairs: string key, u32 type, value; tensors: string name, u32 n,
u64 dims[n] (fastest first: a weight [N, K] has K, N), u32 type, u64 offset; then the data, aligned to
general.alignment (32 if absent), offsets counted from its start. Strings: u64 length, UTF-8. All little-endian.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import PackError
from .entries import DOWNLOAD_AGAIN
from .file import PackFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_HEADER = 16 << 20
"""Bytes; a vocabulary of 151,936 tokens with its merges takes 6 MB."""
MAX_VALUES = 1 << 19
"""Texts and lists in arrays, all together."""
MAX_ALIGNMENT = 1 << 16
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How a number lies in memory by type; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_COUNTS = (4, 5, 10, 11)
"""Whole numbers that may count something."""


@dataclass(frozen=True)
class Info:
    """One tensor of the header. kind: its GGUF type. shape: slowest first. start, end: from the file's beginning."""

    kind: int
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile(PackFile):
    """An open file. `tensors`: {name: Info}; `metadata`: {key: number, text, or how many values an array has};
    `counts`: {last part of a key: whole number} of it. alignment: of the data, bytes.

    Raises PackError for a file that is not GGUF or is cut off.
    """

    SUFFIXES = (".gguf",)

    def __init__(self, path: Path, mapped: bool = True) -> None:
        super().__init__(path, mapped)
        if self.size < 24:
            raise self.error(f"is no GGUF file ({self.size} bytes)", DOWNLOAD_AGAIN)
        try:
            self._stream = path.open("rb", buffering=0)
            self._data = np.memmap(path, dtype=np.uint8, mode="c") if mapped else None
            self._view = memoryview(self._stream.read(MAX_HEADER))
        except (OSError, ValueError) as error:  # it went away or shrank to nothing
            raise self.unopened(error, f"cannot be mapped ({error})", DOWNLOAD_AGAIN) from error
        self._at, self._values = 0, 0
        self.metadata: dict[str, float | str] = {}
        self.counts: dict[str, int] = {}
        self.alignment = 32
        self.tensors = self._header()

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def said(self) -> Mapping[str, float | str]:
        return self.metadata

    def piece(self, name: str, size: int) -> torch.Tensor:
        """The first `size` bytes of a tensor, uint8, mapped where they lie aligned. Raises PackError."""
        start = self.tensors[name].start
        self.require_room(name, size)
        if self._data is None:
            return self.read_bytes(self._stream, start, size, name)
        piece = torch.from_numpy(self._data)[start : start + size]
        return piece if start % 8 == 0 else piece.clone()

    def require_room(self, name: str, size: int) -> None:
        """Raises PackError for a tensor whose `size` bytes are not all in the file."""
        end = self.tensors[name].start + size
        if end > self.size:
            raise self.error(f"ends at byte {end} of {self.size}", DOWNLOAD_AGAIN, name)

    def _header(self) -> dict[str, Info]:
        magic, version = bytes(self._take(4)), self._number("I")
        if magic != MAGIC or version not in VERSIONS:
            found = f"starts with {magic!r} and version {version}"
            raise self.error(found, f"Expected a GGUF file of version {' or '.join(map(str, VERSIONS))}.")
        tensors, pairs = self._number("Q"), self._number("Q")
        self.require_few(tensors)
        self.require_few_words(pairs)
        for _ in range(pairs):
            key, kind = self._string(), self._number("I")
            value = self.metadata[key] = self._value(kind)
            if kind in _COUNTS:
                self.counts[key.rpartition(".")[2]] = value
                if key == _ALIGNMENT:
                    self.alignment = value
        if not 1 <= self.alignment <= MAX_ALIGNMENT:
            raise self.error(f"has alignment {self.alignment}", DOWNLOAD_AGAIN, _ALIGNMENT)
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name, count = self._string(), self._number("I")
            if count > MAX_DIMENSIONS:
                raise self.error(f"has {count} dimensions", DOWNLOAD_AGAIN, name)
            shape = tuple(self._number("Q") for _ in range(count))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            if name in found:
                raise self.error("stands in the header twice", DOWNLOAD_AGAIN, name)
            found[name] = (kind, shape, offset)
        start = -(-self._at // self.alignment) * self.alignment
        ends = sorted({offset for _, _, offset in found.values()} | {max(self.size - start, 0)})
        following = dict(itertools.pairwise(ends))
        return {
            name: Info(kind, shape, start + offset, start + following.get(offset, offset))
            for name, (kind, shape, offset) in found.items()
        }

    def _take(self, size: int) -> memoryview:
        self._at += size
        if self._at > len(self._view):
            raise self._ends()
        return self._view[self._at - size : self._at]

    def _ends(self) -> PackError:
        if self.size > len(self._view):
            return self.error(f"has a header of more than {MAX_HEADER} bytes", DOWNLOAD_AGAIN)
        return self.error(f"ends inside its header (byte {len(self._view)})", DOWNLOAD_AGAIN)

    def _count(self, values: int) -> None:
        """Raises PackError for a header that has more than MAX_VALUES one by one."""
        self._values += values
        if self._values > MAX_VALUES:
            raise self.error(f"has {self._values} values in its header", f"Expected at most {MAX_VALUES}.")

    def _number(self, form: str) -> int:
        form = f"<{form}"
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return str(self._take(self._number("Q")), "utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> float | str:
        """A value of a metadata type; of an array how many there are."""
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY or depth == MAX_DIMENSIONS:
            raise self.error(f"has metadata of the unknown type {kind}", DOWNLOAD_AGAIN)
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            self._take(struct.calcsize(f"<{_NUMBERS[inner]}") * count)
        else:
            self._count(count)
            if inner == _STRING:
                self._skip_strings(count)
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        return count

    def _skip_strings(self, count: int) -> None:
        view, at = self._view, self._at
        for _ in range(count):
            at += 8 + int.from_bytes(view[at : at + 8], "little")
            if at > len(view):
                raise self._ends()
        self._at = at
