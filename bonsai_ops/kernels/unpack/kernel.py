"""The Triton kernel that writes a weight's values: rows of W [N, K] in bf16, fp16 or fp32 from codes of any scheme.

A program owns BLOCK_N byte rows and STEPS times BLOCK_K columns of one group. It reads each byte once and writes one
tile of W for each plane. Nothing passes through shared memory.

Binary and ternary weights in 16 bits are made two at a time in the lanes of a register, without a conversion: with s
the bits of the scale in both lanes, a code 1 of binary flips the sign, and of a ternary code d the bit 1 is the sign
and bit 0 clears the lane. All else is computed in float32 as packed_weight.py has it and rounded once; both products
and sums round (no fused multiply-add), so that values are those of the reference to the bit.
"""

# ruff: noqa: N803, N806, SIM300 (Triton: constants of a kernel are upper case)
from __future__ import annotations

import triton
import triton.language as tl

_LANES = tl.constexpr(0x00FF00FF)
_ONES = tl.constexpr(0x00010001)
_SIGNS = tl.constexpr(0x80008000)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 -> DTYPE, to nearest even; Triton's interpreter alone would cut bf16 off."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _signed_lanes(y, s, p: tl.constexpr, RADIX: tl.constexpr):
    """Plane p of the bytes in the 16-bit lanes of y (radix 3: already multiplied by 3), times s: pairs of weights."""
    if RADIX == 2:
        return s ^ ((y << (8 + p)) & _SIGNS)
    elif RADIX == 4:
        keep = ((y >> (6 - 2 * p)) & _ONES ^ _ONES) * 0xFFFF
        return (s & keep) ^ ((y << (8 + 2 * p)) & _SIGNS)
    else:
        keep = ((y >> 8) & _ONES ^ _ONES) * 0xFFFF
        return (s & keep) ^ ((y << 6) & _SIGNS)


@triton.jit
def _value(y, s, z, p: tl.constexpr, RADIX: tl.constexpr, SCHEME: tl.constexpr):
    """Plane p of the bytes y (radix 3: already multiplied by 3) as float32 values."""
    if RADIX == 256:
        code = y
    elif RADIX == 3:
        code = y >> 8
    else:
        BITS: tl.constexpr = 1 if RADIX == 2 else (2 if RADIX == 4 else 4)
        code = (y >> (8 - BITS - BITS * p)) & (RADIX - 1)
    if SCHEME == "binary":
        return (1 - 2 * code).to(tl.float32) * s
    elif SCHEME == "ternary":
        return (1 - code).to(tl.float32) * s
    elif SCHEME == "affine":
        return code.to(tl.float32) * s + z
    else:
        return (code.to(tl.float32) - z) * s


@triton.jit
def _lanes_of_scale(s):
    """Scales [n, 1] in 16 bits -> their bits in both lanes of a register."""
    bits = s.to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits | bits << 16


@triton.jit(do_not_specialize=["n8", "first", "last", "start"])
def unpack_kernel(
    codes_ptr, scale_ptr, zero_ptr, w_ptr, K, n8, first, last, start,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr,
    RADIX: tl.constexpr, SCHEME: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """w [last - first, K] = rows first .. last-1 of W, made of byte rows from `start` on.

    codes: uint8 [n, K], n = 8 n8. scale, zero: [N, K / GROUP] of any float dtype; zero is not read where the scheme has
    none. w: DTYPE. PAIRS (binary and ternary in 16 bits): codes as int16 [n, K / 2], w as int32 [.., K / 2].
    Grid: tiles of byte rows times K / (BLOCK_K STEPS), which divides GROUP; (last - first) K and N K / GROUP are below
    2^31.
    """
    WIDTH: tl.constexpr = BLOCK_K // 2 if PAIRS else BLOCK_K
    # As many columns a thread as one store takes: a longer run a load would put shared memory between the two.
    RUN: tl.constexpr = 8 if w_ptr.dtype.element_ty.primitive_bitwidth == 16 else 4
    n = n8 * 8
    tiles_k = K // (BLOCK_K * STEPS)
    tile_k = tl.program_id(0) % tiles_k
    rows = start + tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    width = K // 2 if PAIRS else K
    columns = tile_k * (WIDTH * STEPS) + tl.arange(0, WIDTH)
    inside = rows < n
    c_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * width + tl.max_contiguous(columns, RUN)[None, :]  # [n, K]
    ys = ()
    for h in tl.static_range(STEPS):
        y = tl.load(c_ptrs + h * WIDTH, inside[:, None], 0)
        if PAIRS:
            y = y.to(tl.uint16, bitcast=True).to(tl.uint32)
            ys += ((y | y << 8) & _LANES,)
        else:
            ys += (y.to(tl.int32),)
    groups = K // GROUP
    group = tile_k * (BLOCK_K * STEPS) // GROUP
    scales = ()
    zeros = ()
    for p in tl.static_range(PLANES):
        row = rows + p * n
        wanted = inside & (row >= first) & (row < last)
        offsets = row * groups + group  # [N, K / GROUP]
        s = tl.load(scale_ptr + offsets, wanted, 0.0)[:, None]
        if SCHEME == "binary" or SCHEME == "ternary":
            s = _rounded(s.to(tl.float32), DTYPE, INTERPRET)
            scales += (_lanes_of_scale(s) if PAIRS else s.to(tl.float32),)
            zeros += (0,)
        else:
            scales += (s.to(tl.float32),)
            zeros += (tl.load(zero_ptr + offsets, wanted, 0.0).to(tl.float32)[:, None],)
    for p in tl.static_range(PLANES):
        row = rows + p * n
        wanted = (inside & (row >= first) & (row < last))[:, None]
        w_ptrs = w_ptr + ((row - first)[:, None] * width + columns[None, :])  # [last - first, K]
        rest = ()
        for h in tl.static_range(STEPS):
            y = ys[h]
            if RADIX == 3:
                y = y * 3
            if PAIRS:
                pairs = _signed_lanes(y, scales[p], p, RADIX)
                tl.store(w_ptrs + h * WIDTH, pairs.to(tl.int32, bitcast=True), wanted)
            else:
                value = _value(y, scales[p], zeros[p], p, RADIX, SCHEME)
                tl.store(w_ptrs + h * WIDTH, _rounded(value, DTYPE, INTERPRET), wanted)
            if RADIX == 3:
                y = y & (_LANES if PAIRS else 255)
            rest += (y,)
        ys = rest
