"""Triton kernels of mode a8: activations and packed weights multiplied in int8, exact sums of each group of columns.

    quantize_kernel       x to int8 with a scale for each row and group of 128 columns.
    a8_kernel             acc [TILE_M, BLOCK_N] += x W^T, one plane a program.

The plane's bits go to the top of each byte (four weights a register): there a crumb XOR 0x40 is 64 t and a
bit OR 0x40 is +-64 as int8, without a zero point; the 64 is taken out of the token's scale. A sum over a group is below
2^20, so an int32 accumulator that starts at 0x4B400000 ends as the bits of the float 1.5 2^23 + sum. With the weight's
scale s one fma gives s sum (1.5 2^23 s is exact for s of 16 bits, else off by 2^-25 of it), a second multiplies by the
token's scale and adds: no conversion to float, and fp32 rounds twice a group. wgmma and tcgen05 cannot start from a
constant for free, so sm_90 and sm_100 keep to mma.sync, for which tiles of TILE_M = 32 first are small enough. With
fp8_kernel's tiles (fp8.py) wgmma compiles to 2.6 other instructions per 2048 multiply-adds in int8, 2.1 in e4m3, as
mma.sync has here.

x is rounded at each product. In FLUX.2 that is once an activation: q, k, v are one layer, in single blocks with the
first half of the MLP, and no two packed layers read the same tensor. In models whose q, k and v are apart it could be
kept for the next layer, if that knew that nobody wrote into x since; but ComfyUI samples in inference mode, where
tensors have no version, and to look at x again costs two thirds of rounding it (two bytes a value of three).
The SwiGLU before a layer is no part of it either: it is code of ComfyUI's blocks, and the single ones join its result
with that of the attention before a layer of ours sees it.
"""

# ruff: noqa: N803, N806 (Triton: constants of a kernel are upper case)
from __future__ import annotations

import triton
import triton.language as tl

from .half import _GROUP, _tile

_MAGIC = tl.constexpr(1.5 * 2**23)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def quantize_kernel(
    x_ptr, q_ptr, tokens_ptr, M, K, stride_xm,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> int8 q and fp32 tokens for a8_kernel, each group of 128 columns by its own largest magnitude.

    q [tiles, groups, BLOCK_M, 128] and tokens [tiles, groups, BLOCK_M] hold BLOCK_M rows of x a tile in the order in
    which that kernel reads them, zero beyond M. tokens is scale / 64, NaN for a group with NaN or infinity.
    Grid: BLOCK_M / ROWS programs for each tile and group.
    """
    groups = K // _GROUP
    block = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _GROUP)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (group * _GROUP + columns)[None, :]  # [ROWS, 128]
    x = tl.load(x_ptrs, (rows < M)[:, None], 0.0).to(tl.float32)
    broken = tl.sum(x * 0.0, 1)  # 0, or NaN
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 2.0**-100), tl.full((ROWS,), 127.0, tl.float32))
    levels = x * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    levels = (levels + _MAGIC) - _MAGIC  # to the nearest integer, ties to even
    levels = tl.where(levels == levels, levels, 0.0)
    first = (block * ROWS // BLOCK_M * groups + group).to(tl.int64) * BLOCK_M
    inner = block * ROWS % BLOCK_M + tl.arange(0, ROWS)
    tl.store(q_ptr + first * _GROUP + inner[:, None] * _GROUP + columns[None, :], levels.to(tl.int8))
    tl.store(tokens_ptr + first + inner, scale * 0.015625 + broken)


@triton.jit(do_not_specialize=["M", "n8"])
def a8_kernel(
    q_ptr, codes_ptr, scale_ptr, tokens_ptr, bias_ptr, y_ptr, M, N, K, n8, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, PARTS: tl.constexpr,
    RADIX: tl.constexpr, WEIGHT_FIRST: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T in int8. q, tokens: see quantize_kernel. codes: uint8 [n, K], n = 8 n8, crumb or bit.

    WEIGHT_FIRST: acc [BLOCK_N, TILE_M], else [TILE_M, BLOCK_N]. ASM: the PTX that decodes four bytes, "" for plain
    Triton. The scales are used as they are stored.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    TILES: tl.constexpr = BLOCK_M // TILE_M
    STEPS: tl.constexpr = _GROUP // BLOCK_K
    n = n8 * 8
    pid = tl.program_id(0)
    tile_m, tile_n = _tile(pid // PARTS, tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N))
    plane = pid % PARTS
    groups = K // _GROUP
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = rows_n + plane * n
    k = tl.arange(0, BLOCK_K)
    q_base = q_ptr + (tile_m * BLOCK_M).to(tl.int64) * K
    q_offsets = (tl.arange(0, TILE_M)[:, None] * _GROUP + k[None, :]).to(tl.uint32)  # [TILE_M, BLOCK_K]
    tokens_base = tokens_ptr + (tile_m * BLOCK_M).to(tl.int64) * groups
    tokens_offsets = tl.arange(0, TILE_M).to(tl.uint32)
    c_base = codes_ptr + (tile_n * BLOCK_N).to(tl.int64) * K
    inner = tl.minimum(rows_n, n - 1) - tile_n * BLOCK_N
    c_offsets = (inner[:, None] * K + k[None, :]).to(tl.uint32)  # [BLOCK_N, BLOCK_K]
    s_base = scale_ptr
    s_offsets = (tl.minimum(column, N - 1) * groups).to(tl.uint32)
    acc = ()
    for _t in tl.static_range(TILES):
        acc += (tl.zeros((BLOCK_N, TILE_M) if WEIGHT_FIRST else (TILE_M, BLOCK_N), tl.float32),)
    for _group in range(groups):
        s = tl.load(s_base + s_offsets).to(tl.float32)
        s = s[:, None] if WEIGHT_FIRST else s[None, :]
        codes = ()
        for h in tl.static_range(STEPS):
            codes += (tl.load(c_base + h * BLOCK_K + c_offsets),)
        xs = ()
        tokens = ()
        for t in tl.static_range(TILES):
            for h in tl.static_range(STEPS):
                x = tl.load(q_base + (t * TILE_M * _GROUP + h * BLOCK_K) + q_offsets)
                xs += (tl.trans(x) if WEIGHT_FIRST else x,)
            token = tl.load(tokens_base + t * TILE_M + tokens_offsets)
            tokens += (token[None, :] if WEIGHT_FIRST else token[:, None],)
        sums = ()
        for t in tl.static_range(TILES):
            part = tl.full((BLOCK_N, TILE_M) if WEIGHT_FIRST else (TILE_M, BLOCK_N), _MAGIC_BITS, tl.int32)
            for h in tl.static_range(STEPS):
                if ASM == "":
                    if RADIX == 4:
                        w = (((codes[h] << (2 * plane).to(tl.uint8)) & 0xC0) ^ 0x40).to(tl.int8, bitcast=True)
                    else:
                        w = (((codes[h] << plane.to(tl.uint8)) & 0x80) | 0x40).to(tl.int8, bitcast=True)
                else:
                    # Spaces: a text of its own for each tile keeps Triton from sharing w through shared memory.
                    w = tl.inline_asm_elementwise(ASM + " " * t, "=r,r", [codes[h]], tl.int8, True, 4)
                if WEIGHT_FIRST:
                    part = tl.dot(w, xs[t * STEPS + h], part, out_dtype=tl.int32)
                else:
                    part = tl.dot(xs[t * STEPS + h], tl.trans(w), part, out_dtype=tl.int32)
            found = part.to(tl.float32, bitcast=True)
            sums += (_rescaled(found, s, tokens[t], acc[t]),)
        acc = sums
        q_base += BLOCK_M * _GROUP
        tokens_base += BLOCK_M
        c_base += _GROUP
        s_base += 1
    in_n = (rows_n < n) & (column < N)
    for t in tl.static_range(TILES):
        rows_m = tile_m * BLOCK_M + t * TILE_M + tl.arange(0, TILE_M)
        out = tl.trans(acc[t]) if WEIGHT_FIRST else acc[t]
        if BIAS:
            out += tl.load(bias_ptr + column, in_n, 0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + column[None, :]  # [TILE_M, BLOCK_N]
        tl.store(y_ptrs, out.to(DTYPE), (rows_m < M)[:, None] & in_n[None, :])


@triton.jit
def _rescaled(found, s, token, acc):
    """acc + (found - 1.5 2^23) s token; s [1, n] and token [m, 1], or both transposed."""
    start = tl.broadcast_to(s * -_MAGIC, found.shape)
    scaled = tl.fma(found, tl.broadcast_to(s, found.shape), start)
    return tl.fma(scaled, tl.broadcast_to(token, found.shape), acc)
