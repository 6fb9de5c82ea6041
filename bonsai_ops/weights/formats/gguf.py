"""GGUF files of FLUX.2 transformers with 1-bit or ternary blocks: llama.cpp's container.

    "GGUF", u32 version, u64 tensors, u64 pairs; pairs: string key, u32 type, value; tensors: string name, u32 n,
    u64 dims[n] (fastest first: a weight [N, K] has K, N), u32 type, u64 offset; then the data, aligned to
    general.alignment (32 if absent), offsets counted from its start. Strings: u64 length, UTF-8. All little-endian.

Types, a block of g consecutive weights of a row each; d is fp16:

    0 F32, 1 F16, 30 BF16   dense
    8   Q8_0    g 32    d, 32 int8 q                       w = d q, handed over dense
    41  Q1_0    g 128   d, 16 bytes of bits                bit 1: d, bit 0: -d; least significant bit first
    42  Q2_0    g 64    d, 16 bytes of 2-bit codes c       w = (c - 1) d, first code in the low bits; c = 3 is no
                                                           ternary weight. An older fork wrote g 128 under this number
    142 PQ2_0   g 128   d, 32 bytes                        as Q2_0
    34  TQ1_0   g 256   48 and 4 bytes of base 3, d        w = (c - 1) d; code n of byte b is ((3^n b mod 256) 3) >> 8;
                                                           n major: 5 x 32 weights, 5 x 16, then 4 x 4 of the last 4
    35  TQ2_0   g 256   64 bytes of 2-bit codes, d         w = (c - 1) d; 2 x 32 bytes, codes n major: 4 x 32 weights

Names are BFL's or diffusers'. Everything else is refused: it cannot be kept exactly.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..codec import spread_fields
from ..errors import PackError
from .entries import DOWNLOAD_AGAIN, CodedTensor, DenseTensor, Entry

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
Q8_0, TQ1_0, TQ2_0, Q1_0, Q2_0, PQ2_0 = 8, 34, 35, 41, 42, 142
MAX_DIMENSIONS = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by type; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Block:
    """How a coded type lies in memory. scale_at: where the fp16 is; codes(bytes uint8 [.., B]) -> codes [.., g]."""

    name: str
    size: int
    nbytes: int
    scale_at: int
    bits: int
    codes: Callable[[torch.Tensor], torch.Tensor]


def _trits(data: torch.Tensor) -> torch.Tensor:
    """48 + 4 bytes -> 256 codes, the levels of each run one after another."""
    runs = []
    for run, levels in ((data[..., :32], 5), (data[..., 32:48], 5), (data[..., 48:52], 4)):
        wide = run.to(torch.int32)
        runs += [(((wide * 3**n) & 255) * 3 >> 8).to(torch.uint8) for n in range(levels)]
    return torch.cat(runs, dim=-1)


def _crumbs(data: torch.Tensor) -> torch.Tensor:
    """2 x 32 bytes -> 256 codes, the four codes of a byte 32 weights apart."""
    halves = [data[..., :32], data[..., 32:64]]
    return torch.cat([(half >> shift) & 3 for half in halves for shift in (0, 2, 4, 6)], dim=-1)


_BIT = Block("Q1_0", 128, 18, 0, 1, lambda data: spread_fields(data[..., 2:], 1))
BLOCKS = {
    Q1_0: _BIT,
    Q2_0: Block("Q2_0", 64, 18, 0, 2, lambda data: spread_fields(data[..., 2:], 2)),
    PQ2_0: Block("PQ2_0", 128, 34, 0, 2, lambda data: spread_fields(data[..., 2:], 2)),
    TQ1_0: Block("TQ1_0", 256, 54, 52, 2, lambda data: _trits(data[..., :52])),
    TQ2_0: Block("TQ2_0", 256, 66, 64, 2, lambda data: _crumbs(data[..., :64])),
}
_EIGHT = Block("Q8_0", 32, 34, 0, 8, lambda data: data[..., 2:].view(torch.int8))


@dataclass(frozen=True)
class _Info:
    """One tensor of the header. shape: slowest first. start: from the beginning of the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """{name: entry} of a GGUF file; the header is read, tensors are mapped. Raises PackError."""
    infos = _header(path)
    wide = _old_groups(infos)
    data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    return {name: _entry(path, name, info, data, wide) for name, info in infos.items()}


def _entry(path: Path, name: str, info: _Info, data: torch.Tensor, wide: bool) -> Entry:
    if info.kind in DENSE:
        dtype = DENSE[info.kind]
        size = math.prod(info.shape) * dtype.itemsize
        piece = _slice(path, name, data, info, size)
        return DenseTensor(path, name, info.shape, dtype, lambda: piece.view(dtype).view(info.shape))
    block = _EIGHT if info.kind == Q8_0 else BLOCKS.get(PQ2_0 if wide and info.kind == Q2_0 else info.kind)
    if block is None:
        known = ", ".join(b.name for b in BLOCKS.values())
        raise PackError(
            path,
            f"is stored as GGUF type {info.kind}",
            f"Expected {known} or a dense tensor: other types are no 1-bit or ternary weights. Use the MLX release.",
            name,
        )
    if len(info.shape) != 2 or info.shape[1] % block.size:
        raise PackError(
            path,
            f"is a {block.name} tensor {list(info.shape)}",
            f"Expected [N, K], K a multiple of {block.size}. {DOWNLOAD_AGAIN}",
            name,
        )
    rows, groups = info.shape[0], info.shape[1] // block.size
    raw = _slice(path, name, data, info, rows * groups * block.nbytes).view(rows, groups, block.nbytes)

    def scale(lo: int, hi: int) -> torch.Tensor:
        halves = raw[lo:hi, :, block.scale_at : block.scale_at + 2].contiguous()
        return halves.view(torch.float16).squeeze(-1).float()

    if block is _EIGHT:

        def load() -> torch.Tensor:
            return (block.codes(raw.contiguous()).float() * scale(0, rows).unsqueeze(-1)).view(info.shape)

        return DenseTensor(path, name, info.shape, torch.float32, load)

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        found = scale(0, rows)
        return (2 * found if block.bits == 1 else found), -found

    def read(lo: int, hi: int) -> torch.Tensor:
        return block.codes(raw[lo:hi].contiguous()).reshape(hi - lo, -1)

    return CodedTensor(path, name, (rows, info.shape[1]), block.bits, block.size, tables, read)


def _slice(path: Path, name: str, data: torch.Tensor, info: _Info, size: int) -> torch.Tensor:
    if info.start + size > data.numel():
        raise PackError(path, f"ends at byte {info.start + size} of {data.numel()}", DOWNLOAD_AGAIN, name)
    piece = data[info.start : info.start + size]
    return piece if info.start % 8 == 0 else piece.clone()


def _old_groups(infos: Mapping[str, _Info]) -> bool:
    """True if the tensors of type 42 have the older blocks of 128: the room between offsets tells.

    A file where both fit is taken for the current form.
    """
    coded = [info for info in infos.values() if info.kind == Q2_0 and len(info.shape) == 2]
    fits = {}
    for block in (BLOCKS[Q2_0], BLOCKS[PQ2_0]):
        sizes = [(info.shape[0] * (info.shape[1] // block.size) * block.nbytes, info) for info in coded]
        fits[block.name] = all(
            info.shape[1] % block.size == 0 and 0 <= info.end - info.start - size < 64 for size, info in sizes
        )
    return bool(coded) and fits["PQ2_0"] and not fits["Q2_0"]


class _Reader:
    """Reads little-endian values one after another. Raises PackError at the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise PackError(self.path, f"ends inside its header (byte {len(self.data)})", DOWNLOAD_AGAIN)
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0) -> None:
        """Passes over a value of a metadata type."""
        if kind == _STRING:
            self.take(self.number("Q"))
        elif kind == _ARRAY and depth < MAX_DIMENSIONS:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.take(_SIZES[inner] * count)
            else:
                for _ in range(count):
                    self.skip(inner, depth + 1)
        elif kind in _SIZES:
            self.take(_SIZES[kind])
        else:
            raise PackError(self.path, f"has metadata of the unknown type {kind}", DOWNLOAD_AGAIN)


def _header(path: Path) -> dict[str, _Info]:
    size = path.stat().st_size
    if size < 24:
        raise PackError(path, f"is no GGUF file ({size} bytes)", DOWNLOAD_AGAIN)
    reader = _Reader(path, np.memmap(path, dtype=np.uint8, mode="r"))
    magic, version = reader.take(4), reader.number("I")
    if magic != MAGIC or version not in VERSIONS:
        found = f"starts with {magic!r} and version {version}"
        raise PackError(path, found, f"Expected a GGUF file of version {' or '.join(map(str, VERSIONS))}.")
    tensors, pairs = reader.number("Q"), reader.number("Q")
    alignment = 32
    for _ in range(pairs):
        key, kind = reader.string(), reader.number("I")
        if key == _ALIGNMENT and kind == 4:
            alignment = reader.number("I")
        else:
            reader.skip(kind)
    if alignment < 1:
        raise PackError(path, f"has alignment {alignment}", DOWNLOAD_AGAIN, _ALIGNMENT)
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name, count = reader.string(), reader.number("I")
        if count > MAX_DIMENSIONS:
            raise PackError(path, f"has {count} dimensions", DOWNLOAD_AGAIN, name)
        shape = tuple(reader.number("Q") for _ in range(count))[::-1]
        kind, offset = reader.number("I"), reader.number("Q")
        found[name] = (kind, shape, offset)
    start = -(-reader.at // alignment) * alignment
    ends = sorted({offset for _, _, offset in found.values()} | {max(size - start, 0)})
    following = dict(itertools.pairwise(ends))
    return {
        name: _Info(kind, shape, start + offset, start + following.get(offset, offset))
        for name, (kind, shape, offset) in found.items()
    }
