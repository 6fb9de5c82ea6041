"""Reading a GGUF file, llama.cpp's container: header first, tensors mapped from disk.

"GGUF", u32 version, u64 tensors, u64 pairs; pairs: string key, u32 type, value; tensors: string name, u32 n,
u64 dims[n] (fastest first: a weight [N, K] has K, N), u32 type, u64 offset; then the data, aligned to
general.alignment (32 if absent), offsets counted from its start. Strings: u64 length, UTF-8. All little-endian.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .entries import DOWNLOAD_AGAIN
from .file import PackFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by type; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_COUNTS = {4: "I", 5: "i", 10: "Q", 11: "q"}
"""Whole numbers that may count something."""


@dataclass(frozen=True)
class Info:
    """One tensor of the header. kind: its GGUF type. shape: slowest first. start, end: from the file's beginning."""

    kind: int
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile(PackFile):
    """An open file. `tensors`: {name: Info}; `counts`: {last part of a key: whole number} of its metadata.

    Raises PackError for a file that is not GGUF or is cut off.
    """

    SUFFIXES = (".gguf",)

    def __init__(self, path: Path, mapped: bool = True) -> None:
        super().__init__(path, mapped)
        size = path.stat().st_size
        if size < 24:
            raise self.error(f"is no GGUF file ({size} bytes)", DOWNLOAD_AGAIN)
        self._data = np.memmap(path, dtype=np.uint8, mode="c")
        self._at = 0
        self.counts: dict[str, int] = {}
        self.tensors = self._header()

    def piece(self, name: str, size: int) -> torch.Tensor:
        """The first `size` bytes of a tensor, uint8, mapped where they lie aligned. Raises PackError."""
        start = self.tensors[name].start
        if start + size > len(self._data):
            raise self.error(f"ends at byte {start + size} of {len(self._data)}", DOWNLOAD_AGAIN, name)
        piece = torch.from_numpy(self._data)[start : start + size]
        return piece if start % 8 == 0 and self.mapped else piece.clone()

    def _header(self) -> dict[str, Info]:
        magic, version = self._take(4), self._number("I")
        if magic != MAGIC or version not in VERSIONS:
            found = f"starts with {magic!r} and version {version}"
            raise self.error(found, f"Expected a GGUF file of version {' or '.join(map(str, VERSIONS))}.")
        tensors, pairs = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(pairs):
            key, kind = self._string(), self._number("I")
            if kind in _COUNTS:
                self.counts[key.rpartition(".")[2]] = self._number(_COUNTS[kind])
                if key == _ALIGNMENT:
                    alignment = self.counts["alignment"]
            else:
                self._skip(kind)
        if alignment < 1:
            raise self.error(f"has alignment {alignment}", DOWNLOAD_AGAIN, _ALIGNMENT)
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name, count = self._string(), self._number("I")
            if count > MAX_DIMENSIONS:
                raise self.error(f"has {count} dimensions", DOWNLOAD_AGAIN, name)
            shape = tuple(self._number("Q") for _ in range(count))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            found[name] = (kind, shape, offset)
        start = -(-self._at // alignment) * alignment
        ends = sorted({offset for _, _, offset in found.values()} | {max(len(self._data) - start, 0)})
        following = dict(itertools.pairwise(ends))
        return {
            name: Info(kind, shape, start + offset, start + following.get(offset, offset))
            for name, (kind, shape, offset) in found.items()
        }

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise self.error(f"ends inside its header (byte {len(self._data)})", DOWNLOAD_AGAIN)
        self._at += size
        return self._data[self._at - size : self._at].tobytes()

    def _number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _skip(self, kind: int, depth: int = 0) -> None:
        """Passes over a value of a metadata type."""
        if kind == _STRING:
            self._take(self._number("Q"))
        elif kind == _ARRAY and depth < MAX_DIMENSIONS:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._take(_SIZES[inner] * count)
            else:
                for _ in range(count):
                    self._skip(inner, depth + 1)
        elif kind in _SIZES:
            self._take(_SIZES[kind])
        else:
            raise self.error(f"has metadata of the unknown type {kind}", DOWNLOAD_AGAIN)
