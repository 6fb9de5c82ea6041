"""The fixed configurations of the Triton kernels: which tile sizes a target runs, by codec and mode.

Needs no Triton, so that a machine without it can be told what it would run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ...weights.codec import get_codec

GROUP = 128
"""Columns a scale covers; the only group size these kernels know."""

ASM_INT8 = {
    # (radix, programs that share a byte tile): bytes -> 64 times the weights of this program's plane
    (radix, parts): "{ .reg .b32 s, t; mov.u32 s, %ctaid.x; "
    f"and.b32 s, s, {parts - 1}; mul.lo.u32 s, s, {8 // parts}; shl.b32 t, $1, s; {pick} }}"
    for radix, parts, pick in (
        (4, 4, "lop3.b32 $0, t, 0xC0C0C0C0, 0x40404040, 0x6A;"),
        (2, 8, "lop3.b32 $0, t, 0x80808080, 0x40404040, 0xEA;"),
    )
}


def _lanes(radix: int, target: str, source: str, low: bool) -> str:
    """PTX: two bytes of `source`, the low or the high ones -> a register of two 16-bit lanes, as plane.py has them."""
    if radix == 3:
        return (
            f"prmt.b32 t, {source}, 0, {'0x4140' if low else '0x4342'}; mul.lo.u32 t, t, p; and.b32 t, t, 0x00FF00FF; "
            f"mul.lo.u32 t, t, 192; lop3.b32 {target}, t, 0xC000C000, 0x40004000, 0x6A; "
        )
    spread = f"prmt.b32 t, {source}, 0, {'0x1404' if low else '0x3424'}; "
    if radix == 2:
        return f"{spread}shl.b32 {target}, t, p; "
    return f"{spread}shl.b32 t, t, p; lop3.b32 {target}, t, 0xC000C000, 0x40004000, 0x6A; "


_PLANE = {
    # radix: PTX that sets p to the bits before the plane, or to 3^plane
    2: ".reg .b32 t, p; mov.u32 p, %ctaid.y; ",
    4: ".reg .b32 t, p; mov.u32 p, %ctaid.y; shl.b32 p, p, 1; ",
    3: ".reg .b32 t, p; .reg .b64 l; mov.u32 p, %ctaid.y; shl.b32 p, p, 3; mov.b64 l, 0x511B090301; "
    "shr.u64 l, l, p; cvt.u32.u64 p, l; and.b32 p, p, 255; ",
}
ASM_PLANE = {
    # (radix, bytes at once): bytes -> lanes of this program's plane
    **{(radix, 2): f"{{ {_PLANE[radix]}{_lanes(radix, '$0', '$1', True)}}}" for radix in _PLANE},
    **{
        (radix, 4): f"{{ {_PLANE[radix]}{_lanes(radix, '$0', '$2', True)}{_lanes(radix, '$1', '$2', False)}}}"
        for radix in _PLANE
    },
}


@dataclass(frozen=True)
class Config:
    """One way to run a kernel. Block sizes in x rows, byte rows and columns; `parts`: programs that share the planes
    of a byte tile; `weight_first`: which kernel; `asm`: PTX decoding, else plain Triton; `tile_m`: x rows of one
    multiplication, in a8 mode; `plane`: bytes that plane_kernel decodes at once, 0 for the others."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1
    weight_first: bool = True
    asm: bool = True
    tile_m: int = 0
    plane: int = 0


CONFIGS = {
    # (family, codec, mode): block_m, block_n, block_k, warps, stages, parts
    ("registers", "trit5", "exact"): Config(64, 128, 32, 8, 3),
    ("registers", "crumb", "exact"): Config(64, 128, 32, 8, 3),
    ("registers", "bit", "exact"): Config(32, 128, 64, 8, 2),
    ("registers", "trit5", "fp16_accumulate"): Config(32, 128, 64, 8, 2),
    ("registers", "crumb", "fp16_accumulate"): Config(32, 128, 64, 8, 2),
    ("registers", "bit", "fp16_accumulate"): Config(16, 128, 128, 8, 2),
    ("sm_90", "trit5", "exact"): Config(128, 64, 128, 8, 2, weight_first=False),
    ("sm_90", "crumb", "exact"): Config(128, 64, 128, 8, 2, weight_first=False),
    ("sm_90", "bit", "exact"): Config(128, 64, 128, 8, 2, parts=2, weight_first=False),
    ("sm_100", "trit5", "exact"): Config(64, 64, 64, 4, 3, weight_first=False),
    ("sm_100", "crumb", "exact"): Config(64, 64, 64, 4, 3, weight_first=False),
    ("sm_100", "bit", "exact"): Config(128, 64, 64, 8, 2, parts=2, weight_first=False),
    ("amd", "trit5", "exact"): Config(64, 32, 32, 4, 2, weight_first=False, asm=False),
    ("amd", "crumb", "exact"): Config(64, 32, 32, 4, 2, weight_first=False, asm=False),
    ("amd", "bit", "exact"): Config(64, 32, 32, 4, 2, parts=2, weight_first=False, asm=False),
    ("registers", "crumb", "a8"): Config(96, 256, 32, 8, 2, 4, tile_m=32),
    ("registers", "bit", "a8"): Config(96, 256, 32, 8, 2, 8, tile_m=32),
    ("sm_90", "crumb", "a8"): Config(96, 256, 32, 8, 2, 4, weight_first=False, tile_m=32),
    ("sm_90", "bit", "a8"): Config(96, 256, 32, 8, 2, 8, weight_first=False, tile_m=32),
    ("sm_100", "crumb", "a8"): Config(96, 256, 32, 8, 2, 4, weight_first=False, tile_m=32),
    ("sm_100", "bit", "a8"): Config(96, 256, 32, 8, 2, 8, weight_first=False, tile_m=32),
    ("registers", "crumb", "a8_fp8"): Config(128, 128, 64, 8, 2, 4),
    ("registers", "bit", "a8_fp8"): Config(128, 128, 64, 8, 2, 8),
    ("sm_90", "crumb", "a8_fp8"): Config(128, 128, 128, 8, 3, 4),
    ("sm_90", "bit", "a8_fp8"): Config(128, 128, 128, 8, 3, 8),
    ("sm_100", "crumb", "a8_fp8"): Config(128, 128, 128, 8, 3, 4),
    ("sm_100", "bit", "a8_fp8"): Config(128, 128, 128, 8, 3, 8),
    ("amd", "crumb", "a8"): Config(64, 32, 64, 4, 2, 4, weight_first=False, asm=False, tile_m=64),
    ("amd", "bit", "a8"): Config(64, 32, 64, 4, 2, 8, weight_first=False, asm=False, tile_m=64),
}
"""Chosen from compiled instruction counts, registers and shared memory; never tuned on the user's machine."""


PLANE_TILES = {
    # family: those of plane_kernel in mode exact, for every codec: the wide one, the narrow one
    "sm_90": (Config(256, 128, 64, 8, 4, plane=2), Config(128, 128, 64, 8, 4, plane=2)),
    "sm_100": (Config(256, 128, 64, 8, 4, plane=4), Config(128, 128, 64, 8, 4, plane=4)),
}
NARROW_COST = 1.15
"""What the narrow tile is taken to cost a token beside the wide one: it decodes each weight twice as often. Chosen, not
measured."""


@functools.lru_cache(1024)
def plane_tile(target: int, codec: str, tokens: int, rows: int, processors: int) -> Config:
    """The tile of plane_kernel for `tokens` by a weight of `rows` on a GPU with so many multiprocessors.

    A processor that has nothing to do in the last round costs as much as one that has: fewest rounds first.
    """
    n, planes = get_codec(codec).byte_rows(rows), get_codec(codec).fields
    wide, narrow = PLANE_TILES[family(target)]

    def cost(tile: Config) -> float:
        tiles = -(-tokens // tile.block_m) * -(-n // tile.block_n) * planes
        return -(-tiles // processors) * tile.block_m

    return narrow if cost(narrow) * NARROW_COST < cost(wide) else wide


ROUNDED = ("a8", "a8_fp8")
"""The modes that round x before the product."""
QUANTIZED_ROWS = 16
"""Rows of x that one program rounds; divides every block_m of those modes."""

LEAST_FP8 = (8, 9)
"""Compute capability from which on tensor cores multiply e4m3."""

DATA_CENTER = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities that multiply no faster with fp16 sums."""


def modes(target: int | str) -> tuple[str, ...]:
    """The modes that kernels are compiled for on a target, as `family` takes it."""
    if family(target) == "amd":
        return ("exact", "a8")
    capability = divmod(int(target), 10)
    half = ("fp16_accumulate",) if family(target) == "registers" and capability not in DATA_CENTER else ()
    return ("exact", *half, "a8", *(("a8_fp8",) if capability >= LEAST_FP8 else ()))


def family(target: int | str) -> str:
    """Which rows of CONFIGS a target uses: compute capability as 86, or an AMD architecture such as "gfx1100"."""
    if isinstance(target, str):
        return "amd"
    return {9: "sm_90", 10: "sm_100"}.get(target // 10, "registers")


def constants(config: Config, codec: str, mode: str, bias: bool, interpret: bool = False) -> dict[str, Any]:
    """The constexpr arguments of a kernel, the same for a launch and for the static report. bias: a8 and a8_fp8."""
    coder = get_codec(codec)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "RADIX": coder.radix}
    asm = config.asm and not interpret
    if config.plane:
        decoder = ASM_PLANE[coder.radix, config.plane] if asm else ""
        return {**blocks, "DECODER": decoder, "PLACES": config.plane, "INTERPRET": interpret}
    shared = {**blocks, "PARTS": config.parts}
    if mode in ROUNDED:
        decode = ASM_INT8[coder.radix, config.parts] if asm else ""
    if mode == "a8_fp8":
        return {**shared, "ASM": decode, "BIAS": bias, "INTERPRET": interpret}
    if mode == "a8":
        return {**shared, "TILE_M": config.tile_m, "WEIGHT_FIRST": config.weight_first, "ASM": decode, "BIAS": bias}
    planes = {"PLANES": coder.fields // config.parts, "HALF_SUMS": mode == "fp16_accumulate"}
    return {**shared, **planes, "ASM": asm, "INTERPRET": interpret}
