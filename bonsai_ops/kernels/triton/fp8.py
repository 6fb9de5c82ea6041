"""Triton kernels of mode a8_fp8: activations and packed weights multiplied in e4m3, fp32 sums of each group of columns.

    fp8_quantize_kernel   x to e4m3 with a scale for each row and group of 128 columns.
    fp8_kernel            acc [BLOCK_N, BLOCK_M] += W x^T, one plane a program.

Signs are exact in e4m3: the bytes that a8 multiplies as +-64 and 0 (int8.py) are +-2.0 and 0.0 here, and the 2 is taken
out of the token's scale. Weights go from bytes to registers, which wgmma takes as its first operand. A sum over a group
is taken in fp32 by the tensor cores, as exactly as they sum fp8, then scaled and added by fp32 arithmetic.
"""

# ruff: noqa: N803, N806 (Triton: constants of a kernel are upper case)
from __future__ import annotations

import triton
import triton.language as tl

from .half import _GROUP, _tile

_LARGEST = tl.constexpr(448.0)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_TO_SUBNORMAL = tl.constexpr(1.5 * 2**14)


@triton.jit
def _to_e4m3(value, INTERPRET: tl.constexpr):
    """float32 of at most 448 -> e4m3, to nearest even; float32 of that value for the interpreter, which would cut."""
    if INTERPRET:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        subnormal = (value + _TO_SUBNORMAL) - _TO_SUBNORMAL
        return tl.where(tl.abs(value) < _SMALLEST_NORMAL, subnormal, bits.to(tl.float32, bitcast=True))
    return value.to(tl.float8e4nv)


@triton.jit
def fp8_quantize_kernel(
    x_ptr, q_ptr, tokens_ptr, M, K, stride_xm,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> e4m3 q and fp32 tokens for fp8_kernel, laid out as by int8.quantize_kernel.

    The largest magnitude of a group of 128 columns becomes 448, e4m3's own. tokens is scale / 2, NaN for a group with
    NaN or infinity. INTERPRET: q is float32, of the same values. Grid: BLOCK_M / ROWS programs for each tile and group.
    """
    groups = K // _GROUP
    block = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _GROUP)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (group * _GROUP + columns)[None, :]  # [ROWS, 128]
    x = tl.load(x_ptrs, (rows < M)[:, None], 0.0).to(tl.float32)
    broken = tl.sum(x * 0.0, 1)  # 0, or NaN
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 2.0**-100), tl.full((ROWS,), _LARGEST, tl.float32))
    values = x * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    values = tl.minimum(tl.maximum(tl.where(values == values, values, 0.0), -_LARGEST), _LARGEST)
    first = (block * ROWS // BLOCK_M * groups + group).to(tl.int64) * BLOCK_M
    inner = block * ROWS % BLOCK_M + tl.arange(0, ROWS)
    tl.store(q_ptr + first * _GROUP + inner[:, None] * _GROUP + columns[None, :], _to_e4m3(values, INTERPRET))
    tl.store(tokens_ptr + first + inner, scale * 0.5 + broken)


@triton.jit(do_not_specialize=["M", "n8"])
def fp8_kernel(
    q_ptr, codes_ptr, scale_ptr, tokens_ptr, bias_ptr, y_ptr, M, N, K, n8, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, RADIX: tl.constexpr,
    ASM: tl.constexpr, BIAS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T in e4m3. q, tokens: see fp8_quantize_kernel. codes: uint8 [n, K], n = 8 n8, crumb or bit.

    PARTS: the planes of a byte. ASM: the PTX that decodes four bytes. The scales are used as they are stored.
    INTERPRET: q is float32, bytes are decoded by plain Triton and become float32 too.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    STEPS: tl.constexpr = _GROUP // BLOCK_K
    n = n8 * 8
    pid = tl.program_id(0)
    tile_m, tile_n = _tile(pid // PARTS, tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N))
    plane = pid % PARTS
    groups = K // _GROUP
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = rows_n + plane * n
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    q_base = q_ptr + (tile_m * BLOCK_M).to(tl.int64) * K
    q_offsets = (m[:, None] * _GROUP + k[None, :]).to(tl.uint32)  # [BLOCK_M, BLOCK_K]
    tokens_base = tokens_ptr + (tile_m * BLOCK_M).to(tl.int64) * groups
    c_base = codes_ptr + (tile_n * BLOCK_N).to(tl.int64) * K
    inner = tl.minimum(rows_n, n - 1) - tile_n * BLOCK_N
    c_offsets = (inner[:, None] * K + k[None, :]).to(tl.uint32)  # [BLOCK_N, BLOCK_K]
    s_base = scale_ptr
    s_offsets = (tl.minimum(column, N - 1) * groups).to(tl.uint32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _group in range(groups):
        s = tl.load(s_base + s_offsets).to(tl.float32)
        token = tl.load(tokens_base + m.to(tl.uint32))
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for h in tl.static_range(STEPS):
            codes = tl.load(c_base + h * BLOCK_K + c_offsets)
            x = tl.load(q_base + h * BLOCK_K + q_offsets)
            if INTERPRET:
                if RADIX == 4:
                    w = ((codes << (2 * plane).to(tl.uint8)) & 0xC0) ^ 0x40
                else:
                    w = ((codes << plane.to(tl.uint8)) & 0x80) | 0x40
                w = w.to(tl.int8, bitcast=True).to(tl.float32) * 0.03125
            else:
                w = tl.inline_asm_elementwise(ASM, "=r,r", [codes], tl.float8e4nv, True, 4)
            part = tl.dot(w, tl.trans(x), part)
        acc += part * s[:, None] * token[None, :]
        q_base += BLOCK_M * _GROUP
        tokens_base += BLOCK_M
        c_base += _GROUP
        s_base += 1
    in_n = (rows_n < n) & (column < N)
    rows_m = tile_m * BLOCK_M + m
    out = tl.trans(acc)
    if BIAS:
        out += tl.load(bias_ptr + column, in_n, 0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + column[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptrs, out.to(DTYPE), (rows_m < M)[:, None] & in_n[None, :])
