"""GGUF files of FLUX.2 transformers with 1-bit or ternary blocks.

Types, a block of g consecutive weights of a row each; d is fp16:

    0 F32, 1 F16, 30 BF16   dense
    8   Q8_0    g 32    d, 32 int8 q                       w = d q, handed over dense
    41  Q1_0    g 128   d, 16 bytes of bits                bit 1: d, bit 0: -d; least significant bit first
    42  Q2_0    g 64    d, 16 bytes of 2-bit codes c       w = (c - 1) d, first code in the low bits; c = 3 is no
                                                           ternary weight. An older fork wrote g 128 under this number
    142 PQ2_0   g 128   d, 32 bytes                        as Q2_0
    34  TQ1_0   g 256   48 and 4 bytes of base 3, d        w = (c - 1) d; code n of byte b is ((3^n b mod 256) 3) >> 8;
                                                           n major: 5 x 32 weights, 5 x 16, then 4 x 4 of the last 4
    143 PTQ1_0  g 128   24 and 2 bytes of base 3, d        as TQ1_0; n major: 5 x 16 weights, 5 x 8, then 4 x 2
    35  TQ2_0   g 256   64 bytes of 2-bit codes, d         w = (c - 1) d; 2 x 32 bytes, codes n major: 4 x 32 weights

A byte of base 3 is ceil(256 q / 243), q the number whose five digits are the codes, the first one leading; beside four
codes the fifth digit is 0. Any other byte was never written. 142 and 143 are PrismML's own numbers: their description
is second-hand, from those who read the fork's source and its files of language models; no file of them was at hand.

Names are BFL's or diffusers'. Everything else is refused: it cannot be kept exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..codec import spread_fields
from ..errors import PackError
from .entries import DOWNLOAD_AGAIN, CodedTensor, DenseTensor, Entry, Pack
from .gguf_file import GgufFile, Info

NAME = "gguf"
FILE = GgufFile
PLACES = {"transformer": ()}
DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
Q8_0, TQ1_0, TQ2_0, Q1_0, Q2_0, PQ2_0, PTQ1_0 = 8, 34, 35, 41, 42, 142, 143
OTHERS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
OTHERS |= {14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
OTHERS |= {22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 39: "MXFP4"}
OTHERS |= {40: "NVFP4 or, in PrismML's first fork, Q1_0 in groups of 32"}
"""{type that is not read: what ggml calls it}."""
SLACK = 64
"""Bytes between two tensors that may be padding, whatever the file says of its alignment."""
Runs = tuple[tuple[int, int, int], ...]
"""(first byte, the one behind the last, codes a byte) of the bytes of base 3 in a block."""


@dataclass(frozen=True)
class Block:
    """How a coded type lies in memory. scale_at: where the fp16 is; codes(bytes uint8 [.., B]) -> codes [.., g].

    runs: where its bytes are numbers of base 3.
    """

    name: str
    size: int
    nbytes: int
    scale_at: int
    bits: int
    codes: Callable[[torch.Tensor], torch.Tensor]
    runs: Runs = ()


def _trits(data: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Bytes of a block -> its codes, the levels of each run one after another."""
    found = []
    for start, stop, levels in runs:
        wide = data[..., start:stop].to(torch.int32)
        found += [(((wide * 3**n) & 255) * 3 >> 8).to(torch.uint8) for n in range(levels)]
    return torch.cat(found, dim=-1)


def _never_written(data: torch.Tensor, runs: Runs) -> tuple[int, int] | None:
    """(row, byte) of the first byte of blocks [rows, groups, B] that is no number of so many base 3 digits."""
    for start, stop, levels in runs:
        written = torch.zeros(256, dtype=torch.bool)
        written[[-(-256 * 3 ** (5 - levels) * q // 243) for q in range(3**levels)]] = True
        run = data[..., start:stop]
        wrong = ~written[run.to(torch.int32)]
        if bool(wrong.any()):
            row, group, byte = wrong.nonzero()[0].tolist()
            return row, int(run[row, group, byte])
    return None


def _crumbs(data: torch.Tensor) -> torch.Tensor:
    """2 x 32 bytes -> 256 codes, the four codes of a byte 32 weights apart."""
    halves = [data[..., :32], data[..., 32:64]]
    return torch.cat([(half >> shift) & 3 for half in halves for shift in (0, 2, 4, 6)], dim=-1)


_TQ1_0 = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
_PTQ1_0 = ((0, 16, 5), (16, 24, 5), (24, 26, 4))
_BIT = Block("Q1_0", 128, 18, 0, 1, lambda data: spread_fields(data[..., 2:], 1))
BLOCKS = {
    Q1_0: _BIT,
    Q2_0: Block("Q2_0", 64, 18, 0, 2, lambda data: spread_fields(data[..., 2:], 2)),
    PQ2_0: Block("PQ2_0", 128, 34, 0, 2, lambda data: spread_fields(data[..., 2:], 2)),
    TQ1_0: Block("TQ1_0", 256, 54, 52, 2, lambda data: _trits(data, _TQ1_0), _TQ1_0),
    PTQ1_0: Block("PTQ1_0", 128, 28, 26, 2, lambda data: _trits(data, _PTQ1_0), _PTQ1_0),
    TQ2_0: Block("TQ2_0", 256, 66, 64, 2, lambda data: _crumbs(data[..., :64])),
}
_EIGHT = Block("Q8_0", 32, 34, 0, 8, lambda data: data[..., 2:].view(torch.int8))


def claims(file: GgufFile) -> bool:
    """Any GGUF file: its tensors tell whether they can be kept exactly."""
    return True


def read(file: GgufFile) -> Pack:
    """Every tensor, mapped from the file."""
    wide = _old_groups(file)
    entries = {name: _entry(file, name, info, wide) for name, info in file.tensors.items()}
    return Pack(file.path, NAME, entries, counts=file.counts)


def _entry(file: GgufFile, name: str, info: Info, wide: bool) -> Entry:
    if info.kind in DENSE:
        dtype = DENSE[info.kind]
        size = math.prod(info.shape) * dtype.itemsize
        file.require_room(name, size)
        return DenseTensor(
            file.path, name, info.shape, dtype, lambda: file.piece(name, size).view(dtype).view(info.shape)
        )
    block = _EIGHT if info.kind == Q8_0 else BLOCKS.get(PQ2_0 if wide and info.kind == Q2_0 else info.kind)
    if block is None:
        raise _other_type(file, name, info.kind)
    if len(info.shape) != 2 or info.shape[1] % block.size:
        raise file.error(
            f"is a {block.name} tensor {list(info.shape)}",
            f"Expected [N, K], K a multiple of {block.size}. {DOWNLOAD_AGAIN}",
            name,
        )
    rows, groups = info.shape[0], info.shape[1] // block.size
    size = rows * groups * block.nbytes
    file.require_room(name, size)
    if not _fits(file, info, size):
        raise file.error(
            f"is a {block.name} tensor {list(info.shape)} with room for {info.end - info.start} bytes",
            f"Expected {size}, {block.nbytes} for each {block.size} weights: another program's blocks under the "
            f"number {info.kind} are not read. {DOWNLOAD_AGAIN}",
            name,
        )

    @cache  # an unaligned tensor is copied once, when it is loaded
    def raw() -> torch.Tensor:
        return file.piece(name, size).view(rows, groups, block.nbytes)

    def scale(lo: int, hi: int) -> torch.Tensor:
        halves = raw()[lo:hi, :, block.scale_at : block.scale_at + 2].contiguous()
        return halves.view(torch.float16).squeeze(-1).float()

    if block is _EIGHT:

        def load() -> torch.Tensor:
            return (block.codes(raw().contiguous()).float() * scale(0, rows).unsqueeze(-1)).view(info.shape)

        return DenseTensor(file.path, name, info.shape, torch.float32, load)

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        found = scale(0, rows)
        return (2 * found if block.bits == 1 else found), -found

    def read(lo: int, hi: int) -> torch.Tensor:
        data = raw()[lo:hi].contiguous()
        if (wrong := _never_written(data, block.runs)) is not None:
            row, byte = wrong
            raise file.error(
                f"row {lo + row} has the byte {byte}, which no encoder of {block.name} writes", DOWNLOAD_AGAIN, name
            )
        return block.codes(data).reshape(hi - lo, -1)

    return CodedTensor(file.path, name, (rows, info.shape[1]), block.bits, block.size, tables, read)


def _other_type(file: GgufFile, name: str, kind: int) -> PackError:
    """The error for a tensor of a type that is not read, with its name where ggml has one."""
    known = ", ".join(block.name for block in BLOCKS.values())
    return file.error(
        f"is stored as GGUF type {kind} ({OTHERS.get(kind, 'unknown: of a newer ggml or another fork')})",
        f"Expected {known} or a dense tensor: other types are no 1-bit or ternary weights. Use the MLX release.",
        name,
    )


def _fits(file: GgufFile, info: Info, size: int) -> bool:
    """Whether the room up to the next tensor is that of `size` bytes and padding."""
    return 0 <= info.end - info.start - size < max(SLACK, file.alignment)


def _old_groups(file: GgufFile) -> bool:
    """True if the tensors of type 42 have the older blocks of 128: the room between offsets tells.

    A file where both fit is taken for the current form.
    """
    coded = [info for info in file.tensors.values() if info.kind == Q2_0 and len(info.shape) == 2]
    fits = {}
    for block in (BLOCKS[Q2_0], BLOCKS[PQ2_0]):
        sizes = [(info.shape[0] * (info.shape[1] // block.size) * block.nbytes, info) for info in coded]
        fits[block.name] = all(info.shape[1] % block.size == 0 and _fits(file, info, size) for size, info in sizes)
    return bool(coded) and fits["PQ2_0"] and not fits["Q2_0"]
