"""Triton kernels that multiply by packed weights without unpacking them to memory, with 16-bit activations.

All read the codes as codec.py stores them ("N-planar"), so disk, CPU and GPU share one form. A program
owns BLOCK_M rows of x and BLOCK_N byte rows, which are PLANES * BLOCK_N outputs: it loads a byte tile and an x tile
once, takes plane after plane off the bytes and multiplies each with the same x tile.

    weight_first_kernel   acc [BLOCK_N, BLOCK_M] += W x^T: every warp decodes rows of its own into its MMA registers.
                          Where MMA takes both operands from registers: sm_80 .. 89, sm_120.
    input_first_kernel    acc [BLOCK_M, BLOCK_N] += x W^T: the block decodes each weight once, into shared memory.
                          Where MMA reads the second operand from shared memory (sm_90, sm_100), and AMD.

Decoding, in 16-bit lanes (two weights a register, three instructions a register of trit5, two of bit, three of crumb):

    bit       the byte sits in the upper half of a lane, plane p's code in bit 15 - p: w = s ^ (bit << 15).
    crumb     likewise with two bits; XORed with 0x4000 they are a float: 2.0 for +1, 0 for 0, -2.0 for -1.
    trit5     y = 192 b + 4 has the first digit in bits 14, 15 and the fraction below. With u the digit's lane, XORed
              as DIGIT_XOR says, u is a float: 2.0 for +1, +-0.0 for 0, -2.0 for -1; w = s u. Modulo 2^16,
              3 y -+ u is three times the fraction plus a known multiple of 2^14, which the next XOR undoes.
              The accumulators hold twice the result; the last step halves them, which is exact.
              Carries between lanes and the 4 stay below the next digit for every byte that codec.py writes.

In exact mode the scale multiplies the weight, which is lossless, and sums are fp32. In fp16_accumulate mode the
weight is +-1 (+-2), BLOCK_K products (64 or 128) are summed in fp16, and that sum times its scale is added in fp32;
the caller bounds |x| so that no sum overflows.
"""

# ruff: noqa: N803, N806 (Triton: constants of a kernel are upper case)
from __future__ import annotations

import triton
import triton.language as tl

from .configs import GROUP

DIGIT_XOR = (0x4000, 0x8000, 0xC000, 0x0000)
"""What plane p (modulo 4) XORs into the top two bits; even planes then subtract the result, odd ones add it."""

ASM_WORD_TERNARY = tuple(
    f"{{ .reg .b32 t; prmt.b32 t, $1, 0, {pick}; mad.lo.u32 $0, t, 192, 0x00040004; }}" for pick in ("0x4140", "0x4342")
)
ASM_WORD_BINARY = tuple(f"prmt.b32 $0, $1, 0, {pick};" for pick in ("0x1404", "0x3424"))
ASM_BYTES_TERNARY = (
    "{ .reg .b32 t, u; prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342; "
    "mad.lo.u32 $0, t, 192, 0x00040004; mad.lo.u32 $1, u, 192, 0x00040004; }"
)
ASM_BYTES_BINARY = "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;"
ASM_DIGIT = tuple(f"lop3.b32 $0, $1, 0xC000C000, 0x{x:04X}{x:04X}, 0x6A;" for x in DIGIT_XOR)
ASM_NEXT_TERNARY = (
    "{ .reg .b32 t; neg.s32 t, $2; mad.lo.u32 $0, $1, 3, t; }",
    "mad.lo.u32 $0, $1, 3, $2;",
)
ASM_NEXT_BINARY = "shl.b32 $0, $1, 1;"
ASM_NEXT_CRUMB = "shl.b32 $0, $1, 2;"
ASM_SIGN = "lop3.b32 $0, $1, 0x80008000, $2, 0x6A;"
ASM_SKIP = "{ .reg .b32 t; and.b32 t, $2, 31; shl.b32 $0, $1, t; }"
ASM_SCALE_FP16 = "mul.rn.f16x2 $0, $1, $2;"
ASM_SCALE_BF16 = "{ .reg .b32 t; mov.b32 t, 0x80008000; fma.rn.bf16x2 $0, $1, $2, t; }"

_WORD_TERNARY_0 = tl.constexpr(ASM_WORD_TERNARY[0])
_WORD_TERNARY_1 = tl.constexpr(ASM_WORD_TERNARY[1])
_WORD_BINARY_0 = tl.constexpr(ASM_WORD_BINARY[0])
_WORD_BINARY_1 = tl.constexpr(ASM_WORD_BINARY[1])
_BYTES_TERNARY = tl.constexpr(ASM_BYTES_TERNARY)
_BYTES_BINARY = tl.constexpr(ASM_BYTES_BINARY)
_DIGIT_0 = tl.constexpr(ASM_DIGIT[0])
_DIGIT_1 = tl.constexpr(ASM_DIGIT[1])
_DIGIT_2 = tl.constexpr(ASM_DIGIT[2])
_DIGIT_3 = tl.constexpr(ASM_DIGIT[3])
_NEXT_TERNARY_0 = tl.constexpr(ASM_NEXT_TERNARY[0])
_NEXT_TERNARY_1 = tl.constexpr(ASM_NEXT_TERNARY[1])
_NEXT_BINARY = tl.constexpr(ASM_NEXT_BINARY)
_NEXT_CRUMB = tl.constexpr(ASM_NEXT_CRUMB)
_SIGN = tl.constexpr(ASM_SIGN)
_SKIP = tl.constexpr(ASM_SKIP)
_SCALE_FP16 = tl.constexpr(ASM_SCALE_FP16)
_SCALE_BF16 = tl.constexpr(ASM_SCALE_BF16)
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _tile(pid, tiles_m, tiles_n):
    """Program number -> (tile of x rows, tile of byte rows), in bands of 8 so that neighbours share both in cache."""
    band = 8 * tiles_n
    first = pid // band * 8
    size = tl.minimum(tiles_m - first, 8)
    return first + (pid % band) % size, (pid % band) // size


@triton.jit
def _from_words(words, RADIX: tl.constexpr, HALF: tl.constexpr):
    """int16 [n, k / 2], pairs of bytes -> 16-bit lanes of bytes 0, 1 (HALF 0) or 2, 3 (HALF 1) of each four."""
    if RADIX == 3 and HALF == 0:
        return tl.inline_asm_elementwise(_WORD_TERNARY_0, "=r,r", [words], tl.int16, True, 2)
    elif RADIX == 3:
        return tl.inline_asm_elementwise(_WORD_TERNARY_1, "=r,r", [words], tl.int16, True, 2)
    elif HALF == 0:
        return tl.inline_asm_elementwise(_WORD_BINARY_0, "=r,r", [words], tl.int16, True, 2)
    else:
        return tl.inline_asm_elementwise(_WORD_BINARY_1, "=r,r", [words], tl.int16, True, 2)


@triton.jit
def _from_bytes(codes, RADIX: tl.constexpr):
    """uint8 [n, k] -> 16-bit lanes of the same shape."""
    if RADIX == 3:
        return tl.inline_asm_elementwise(_BYTES_TERNARY, "=&r,=&r,r", [codes], tl.int16, True, 4)
    else:
        return tl.inline_asm_elementwise(_BYTES_BINARY, "=&r,=&r,r", [codes], tl.int16, True, 4)


@triton.jit
def _digit(y, p: tl.constexpr):
    if p % 4 == 0:
        return tl.inline_asm_elementwise(_DIGIT_0, "=r,r", [y], tl.int16, True, 2)
    elif p % 4 == 1:
        return tl.inline_asm_elementwise(_DIGIT_1, "=r,r", [y], tl.int16, True, 2)
    elif p % 4 == 2:
        return tl.inline_asm_elementwise(_DIGIT_2, "=r,r", [y], tl.int16, True, 2)
    else:
        return tl.inline_asm_elementwise(_DIGIT_3, "=r,r", [y], tl.int16, True, 2)


@triton.jit
def _after_digit(y, u, p: tl.constexpr):
    if p % 2 == 0:
        return tl.inline_asm_elementwise(_NEXT_TERNARY_0, "=r,r,r", [y, u], tl.int16, True, 2)
    else:
        return tl.inline_asm_elementwise(_NEXT_TERNARY_1, "=r,r,r", [y, u], tl.int16, True, 2)


@triton.jit
def _signed(y, s):
    if s.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_SIGN, "=r,r,r", [y, s], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(_SIGN, "=r,r,r", [y, s], tl.float16, True, 2)


@triton.jit
def _scaled(u, s):
    if s.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_SCALE_BF16, "=r,r,r", [u, s], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(_SCALE_FP16, "=r,r,r", [u, s], tl.float16, True, 2)


@triton.jit
def _plane(y, s, p: tl.constexpr, RADIX: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr):
    """Takes plane p off the lanes: (weight tile in s's dtype, lanes of the next plane). s is [n, 1]."""
    if ASM and RADIX == 2:
        return _signed(y, s), tl.inline_asm_elementwise(_NEXT_BINARY, "=r,r", [y], tl.int16, True, 2)
    elif ASM and RADIX == 3:
        u = _digit(y, p)
        if SCALED:
            return _scaled(u, s), _after_digit(y, u, p)
        else:
            return u.to(tl.float16, bitcast=True), _after_digit(y, u, p)
    elif ASM:
        u = _digit(y, 0)
        rest = tl.inline_asm_elementwise(_NEXT_CRUMB, "=r,r", [y], tl.int16, True, 2)
        if SCALED:
            return _scaled(u, s), rest
        else:
            return u.to(tl.float16, bitcast=True), rest
    else:
        y = y * RADIX
        if RADIX == 2:
            return (1 - (y >> 8) * 2).to(s.dtype) * s, y & 255
        else:
            return (1 - (y >> 8)).to(s.dtype) * s, y & 255


@triton.jit
def _scale(s_ptr, offsets, DTYPE: tl.constexpr, SCALED: tl.constexpr, INTERPRET: tl.constexpr):
    """Scales of one plane and group as [n, 1] in DTYPE (float32 when interpreting); ones when SCALED is off."""
    if SCALED:
        s = tl.load(s_ptr + offsets)[:, None].to(DTYPE)
        if INTERPRET:
            s = s.to(tl.float32)
    else:
        s = tl.full((offsets.shape[0], 1), 1.0, DTYPE)
    return s


@triton.jit(do_not_specialize=["M", "n8"])
def weight_first_kernel(
    x_ptr, codes_ptr, scale_ptr, tokens_ptr, y_ptr, M, N, K, n8, stride_xm, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
    RADIX: tl.constexpr, HALF_SUMS: tl.constexpr, ASM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T. codes: [n, K] bytes, n = 8 n8, given as int16 [n, K / 2] when ASM, else as uint8.

    Words of two bytes keep the registers of both operands in MMA's order; a word pair's bytes 0, 1 and 2, 3 are
    separate tiles, and x is loaded in the same order. tokens: fp32 [M] that multiplies the sums, read when HALF_SUMS.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = n8 * 8
    pid = tl.program_id(0)
    tile_m, tile_n = _tile(pid // PARTS, tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first = pid % PARTS * PLANES
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_K // 2)
    columns = half // 2 * 4 + half % 2  # 0, 1, 4, 5, 8, ..
    x_ptrs = x_ptr + tl.minimum(rows_m, M - 1).to(tl.int64)[:, None] * stride_xm + columns[None, :]  # [M, K / 2]
    byte_rows = tl.minimum(rows_n, n - 1).to(tl.int64)[:, None]
    c_ptrs = codes_ptr + (
        byte_rows * (K // 2) + half[None, :] if ASM else byte_rows * K + columns[None, :]
    )  # [n, K / 2]
    groups = K // _GROUP
    acc = ()
    offsets = ()
    for p in tl.static_range(PLANES):
        acc += (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
        offsets += (tl.minimum(rows_n + (first + p) * n, N - 1) * groups,)
    for k in range(0, K, BLOCK_K):
        x0 = tl.trans(tl.load(x_ptrs))
        x1 = tl.trans(tl.load(x_ptrs + 2))
        if ASM:
            words = tl.load(c_ptrs)
            y0 = _from_words(words, RADIX, 0)
            y1 = _from_words(words, RADIX, 1)
            c_ptrs += BLOCK_K // 2
        else:
            y0 = tl.load(c_ptrs).to(tl.int32)
            y1 = tl.load(c_ptrs + 2).to(tl.int32)
            c_ptrs += BLOCK_K
        if PARTS > 1:
            skipped = first * (RADIX // 2)
            tl.static_assert(RADIX != 3)
            if ASM:
                y0 = tl.inline_asm_elementwise(_SKIP, "=r,r,r", [y0, skipped.to(tl.int16)], tl.int16, True, 2)
                y1 = tl.inline_asm_elementwise(_SKIP, "=r,r,r", [y1, skipped.to(tl.int16)], tl.int16, True, 2)
            else:
                y0 = y0 << skipped & 255
                y1 = y1 << skipped & 255
        if INTERPRET and not HALF_SUMS:
            x0 = x0.to(tl.float32)
            x1 = x1.to(tl.float32)
        sums = ()
        for p in tl.static_range(PLANES):
            s = _scale(scale_ptr, offsets[p] + k // _GROUP, DTYPE, not HALF_SUMS, INTERPRET)
            w0, y0 = _plane(y0, s, p, RADIX, not HALF_SUMS, ASM)
            w1, y1 = _plane(y1, s, p, RADIX, not HALF_SUMS, ASM)
            if HALF_SUMS:
                part = tl.dot(w0, x0, out_dtype=tl.float16)
                part = tl.dot(w1, x1, part, out_dtype=tl.float16).to(tl.float32)
                group_scale = tl.load(scale_ptr + offsets[p] + k // _GROUP)[:, None].to(DTYPE).to(tl.float32)
                sums += (acc[p] + part * group_scale,)
            else:
                sums += (tl.dot(w1, x1, tl.dot(w0, x0, acc[p])),)
        acc = sums
        x_ptrs += BLOCK_K
    in_m = rows_m < M
    for p in tl.static_range(PLANES):
        column = rows_n + (first + p) * n
        in_n = (rows_n < n) & (column < N)
        out = tl.trans(acc[p])
        if RADIX != 2 and ASM:
            out = out * 0.5
        if HALF_SUMS:
            out = out * tl.load(tokens_ptr + rows_m, in_m, 0.0)[:, None]
        y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + column[None, :]  # [M, N]
        tl.store(y_ptrs, out.to(DTYPE), in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["M", "n8"])
def input_first_kernel(
    x_ptr, codes_ptr, scale_ptr, tokens_ptr, y_ptr, M, N, K, n8, stride_xm, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
    RADIX: tl.constexpr, HALF_SUMS: tl.constexpr, ASM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T. codes: uint8 [n, K], n = 8 n8. HALF_SUMS is not supported."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = n8 * 8
    tl.static_assert(not HALF_SUMS)
    pid = tl.program_id(0)
    tile_m, tile_n = _tile(pid // PARTS, tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first = pid % PARTS * PLANES
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    # Unsigned 32-bit offsets to moving scalar pointers need the fewest instructions in the loop.
    x_base = x_ptr + (tile_m * BLOCK_M).to(tl.int64) * stride_xm
    inner_m = tl.minimum(rows_m, M - 1) - tile_m * BLOCK_M
    x_offsets = (inner_m[:, None] * stride_xm + columns[None, :]).to(tl.uint32)  # [M, K]
    c_base = codes_ptr + (tile_n * BLOCK_N).to(tl.int64) * K
    inner_n = tl.minimum(rows_n, n - 1) - tile_n * BLOCK_N
    c_offsets = (inner_n[:, None] * K + columns[None, :]).to(tl.uint32)  # [n, K]
    groups = K // _GROUP
    acc = ()
    offsets = ()
    for p in tl.static_range(PLANES):
        acc += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        offsets += ((tl.minimum(rows_n + (first + p) * n, N - 1) * groups).to(tl.uint32),)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_base + x_offsets)
        codes = tl.load(c_base + c_offsets)
        y = _from_bytes(codes, RADIX) if ASM else codes.to(tl.int32)
        if PARTS > 1:
            skipped = first * (RADIX // 2)
            tl.static_assert(RADIX != 3)
            if ASM:
                y = tl.inline_asm_elementwise(_SKIP, "=r,r,r", [y, skipped.to(tl.int16)], tl.int16, True, 2)
            else:
                y = y << skipped & 255
        if INTERPRET:
            x = x.to(tl.float32)
        sums = ()
        for p in tl.static_range(PLANES):
            s = _scale(scale_ptr + k // _GROUP, offsets[p], DTYPE, True, INTERPRET)
            w, y = _plane(y, s, p, RADIX, True, ASM)
            sums += (tl.dot(x, tl.trans(w), acc[p]),)
        acc = sums
        x_base += BLOCK_K
        c_base += BLOCK_K
    in_m = rows_m < M
    for p in tl.static_range(PLANES):
        column = rows_n + (first + p) * n
        in_n = (rows_n < n) & (column < N)
        out = acc[p]
        if RADIX != 2 and ASM:
            out = out * 0.5
        y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + column[None, :]  # [M, N]
        tl.store(y_ptrs, out.to(DTYPE), in_m[:, None] & in_n[None, :])
