"""A Triton kernel for GPUs that multiply while their warps go on: Hopper (wgmma), Blackwell in data centers (tcgen05).

    plane_kernel   acc [BLOCK_N, BLOCK_M] += W x^T, one plane of a byte tile a program, one product an iteration.

W comes from the bytes to registers and is the first operand from there (Blackwell: through tensor memory), up to 256
tokens are the second, in shared memory. Where one loop has a single product, Triton waits for no product but an
earlier one: bytes are decoded while the last product runs. The kernels of half.py multiply plane after plane and wait
for each. Five programs (trit5) decode the same bytes, which lie in the L2 cache.

Decoding, in 16-bit lanes (two weights a register). A program's plane is %ctaid.y; a scalar of Triton's would take the
bytes through shared memory once more.

    bit       the byte in the upper half of a lane, shifted by the plane: w = s ^ (bit << 15).
    crumb     likewise by two bits a plane; XORed with 0x4000 they are a float: 2.0 for +1, 0 for 0, -2.0 for -1.
    trit5     f = 3^plane b mod 256 is the byte without the digits before, 192 f has the digit in bits 14, 15.

The accumulators of ternary weights hold twice the result; the last step halves them, which is exact. The scale
multiplies the weight, which is lossless, and sums are fp32. Scales are read row by row as they are stored: a thread
needs those of two rows, and a sector of the L1 cache has them for 16 groups.
"""

# ruff: noqa: N803, N806 (Triton: constants of a kernel are upper case)
from __future__ import annotations

import triton
import triton.language as tl

from .half import _GROUP, _plane, _scale, _scaled, _signed, _tile


@triton.jit
def _decoded(codes, DECODER: tl.constexpr, PLACES: tl.constexpr):
    """uint8 [n, k] -> 16-bit lanes of this program's plane."""
    if PLACES == 2:
        return tl.inline_asm_elementwise(DECODER, "=r,r", [codes], tl.int16, True, 2)
    else:
        return tl.inline_asm_elementwise(DECODER, "=&r,=&r,r", [codes], tl.int16, True, 4)


@triton.jit(do_not_specialize=["M", "n8"])
def plane_kernel(
    x_ptr, codes_ptr, scale_ptr, y_ptr, M, N, K, n8, stride_xm, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RADIX: tl.constexpr, DECODER: tl.constexpr,
    PLACES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T. codes: uint8 [n, K], n = 8 n8. Grid: (tiles, planes).

    DECODER: PTX of configs.ASM_PLANE that takes PLACES bytes, "" for plain Triton.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = n8 * 8
    plane = tl.program_id(1)
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N))
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
    column = rows_n + plane * n
    s_offsets = (tl.minimum(column, N - 1) * (K // _GROUP)).to(tl.uint32)
    skipped = 1
    if DECODER == "":
        for _ in range(plane):
            skipped *= RADIX
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_base + x_offsets)
        codes = tl.load(c_base + c_offsets)
        s = _scale(scale_ptr + k // _GROUP, s_offsets, DTYPE, True, INTERPRET)
        if DECODER == "":
            w, _ = _plane(codes.to(tl.int32) * skipped & 255, s, 0, RADIX, True, False)
        elif RADIX == 2:
            w = _signed(_decoded(codes, DECODER, PLACES), s)
        else:
            w = _scaled(_decoded(codes, DECODER, PLACES), s)
        if INTERPRET:
            x = x.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc)
        x_base += BLOCK_K
        c_base += BLOCK_K
    if RADIX != 2 and DECODER != "":
        acc = acc * 0.5
    in_n = (rows_n < n) & (column < N)
    y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + column[None, :]  # [M, N]
    tl.store(y_ptrs, tl.trans(acc).to(DTYPE), (rows_m < M)[:, None] & in_n[None, :])
