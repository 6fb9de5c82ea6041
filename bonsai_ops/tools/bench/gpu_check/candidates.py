"""Kernels that are not in the project yet, to be measured beside it.

unpack      the signs of W [N, K] in int8 (or its values) from the packed bytes in one launch
planes      y = x W^T on Hopper: W is decoded into registers, the first operand of wgmma; one plane a program, so
            that a tile is 128 rows of W times 256 tokens and wgmma runs while the next tile is decoded
"""

# ruff: noqa: N803, N806, SIM108 (Triton: constants of a kernel are upper case; a branch on one is taken at compile time)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....weights.packed_weight import PackedWeight

GROUP = 128
FIELDS = {"trit5": (5, 3), "crumb": (4, 4), "bit": (8, 2)}
_GROUP = tl.constexpr(GROUP)


@triton.jit
def unpack_kernel(
    codes_ptr,
    scale_ptr,
    w_ptr,
    N,
    K,
    n8,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLANES: tl.constexpr,
    RADIX: tl.constexpr,
    SIGNS: tl.constexpr,
):
    n = n8 * 8
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < n)[:, None] & (k < K)[None, :]
    y = tl.load(codes_ptr + row.to(tl.int64)[:, None] * K + k[None, :], inside, 0).to(tl.int32)
    groups = K // _GROUP
    for p in tl.static_range(PLANES):
        y = y * RADIX
        code = y >> 8
        y = y & 255
        out = row + p * n
        ok = inside & (out < N)[:, None]
        if RADIX == 2:
            t = 1 - code * 2
        else:
            t = 1 - code
        if SIGNS:
            value = t.to(w_ptr.dtype.element_ty)
        else:
            s = tl.load(scale_ptr + out[:, None] * groups + (k // _GROUP)[None, :], ok, 0.0).to(tl.float32)
            value = (t.to(tl.float32) * s).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + out.to(tl.int64)[:, None] * K + k[None, :], value, ok)


def unpack(
    weight: PackedWeight, out: torch.Tensor, signs: bool = False, block_n: int = 16, block_k: int = 256, warps: int = 4
) -> torch.Tensor:
    """out [N, K] = the values of a PackedWeight (its signs -1, 0, 1 with signs=True)."""
    rows, columns = weight.shape
    planes, radix = FIELDS[weight.codec]
    n = weight.codes.shape[0]
    grid = (triton.cdiv(columns, block_k), triton.cdiv(n, block_n))
    unpack_kernel[grid](
        weight.codes,
        weight.scale,
        out,
        rows,
        columns,
        n // 8,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PLANES=planes,
        RADIX=radix,
        SIGNS=signs,
        num_warps=warps,
    )
    return out


@triton.jit
def _lanes(codes, mult, RADIX: tl.constexpr):
    wide = codes.to(tl.int16)
    if RADIX == 3:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, t; and.b32 m, $2, 0xFFFF; mul.lo.u32 t, $1, m; and.b32 t, t, 0x00FF00FF; "
            "mul.lo.u32 t, t, 192; lop3.b32 $0, t, 0xC000C000, 0x40004000, 0x6A; }",
            "=r,r,r",
            [wide, mult],
            tl.int16,
            True,
            2,
        )
    elif RADIX == 4:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, t; and.b32 m, $2, 0xFFFF; mul.lo.u32 t, $1, m; "
            "lop3.b32 $0, t, 0xC000C000, 0x40004000, 0x6A; }",
            "=r,r,r",
            [wide, mult],
            tl.int16,
            True,
            2,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, t; and.b32 m, $2, 0xFFFF; mul.lo.u32 t, $1, m; and.b32 $0, t, 0x80008000; }",
            "=r,r,r",
            [wide, mult],
            tl.int16,
            True,
            2,
        )


@triton.jit
def _weights(u, s, RADIX: tl.constexpr):
    if RADIX == 2:
        if s.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [u, s], tl.bfloat16, True, 2)
        else:
            return tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [u, s], tl.float16, True, 2)
    elif s.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.b32 t, 0x80008000; fma.rn.bf16x2 $0, $1, $2, t; }",
            "=r,r,r",
            [u, s],
            tl.bfloat16,
            True,
            2,
        )
    else:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [u, s], tl.float16, True, 2)


@triton.jit(do_not_specialize=["M", "n8"])
def plane_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    y_ptr,
    M,
    N,
    K,
    n8,
    stride_xm,
    stride_ym,
    stride_s,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIELDS: tl.constexpr,
    RADIX: tl.constexpr,
    BAND: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = n8 * 8
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(n, BLOCK_N) * FIELDS
    band = BAND * tiles_n
    first = pid // band * BAND
    size = tl.minimum(tiles_m - first, BAND)
    tile_m = first + (pid % band) % size
    rest = (pid % band) // size
    tile_n, plane = rest // FIELDS, rest % FIELDS
    mult = 1
    for _ in range(plane):
        mult *= RADIX
    if RADIX != 3:
        mult = mult * 256
    mult16 = mult.to(tl.int16)
    rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    x_base = x_ptr + (tile_m * BLOCK_M).to(tl.int64) * stride_xm
    inner_m = tl.minimum(rows_m, M - 1) - tile_m * BLOCK_M
    x_offsets = (inner_m[:, None] * stride_xm + columns[None, :]).to(tl.uint32)
    c_base = codes_ptr + (tile_n * BLOCK_N).to(tl.int64) * K
    inner_n = tl.minimum(rows_n, n - 1) - tile_n * BLOCK_N
    c_offsets = (inner_n[:, None] * K + columns[None, :]).to(tl.uint32)
    row = rows_n + plane * n
    s_ptrs = scale_ptr + tl.minimum(row, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_base + x_offsets)
        codes = tl.load(c_base + c_offsets)
        s = tl.load(s_ptrs + (k // _GROUP) * stride_s).to(DTYPE)
        w = _weights(_lanes(codes, mult16, RADIX), s[:, None], RADIX)
        acc = tl.dot(w, tl.trans(x), acc)
        x_base += BLOCK_K
        c_base += BLOCK_K
    in_m = rows_m < M
    in_n = (rows_n < n) & (row < N)
    out = tl.trans(acc)
    if RADIX != 2:
        out = out * 0.5
    y_ptrs = y_ptr + rows_m.to(tl.int64)[:, None] * stride_ym + row[None, :]
    tl.store(y_ptrs, out.to(DTYPE), in_m[:, None] & in_n[None, :])


PLANE_CONFIGS = {
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, band
    "p256x128k64s4": (256, 128, 64, 8, 4, 8),
    "p256x128k64s3b16": (256, 128, 64, 8, 3, 16),
    "p256x128k128s2": (256, 128, 128, 8, 2, 8),
    "p128x128k64s4": (128, 128, 64, 8, 4, 8),
    "p128x256k64s3": (128, 256, 64, 8, 3, 8),
}


def turned(weight: PackedWeight) -> torch.Tensor:
    """The scales as plane_kernel wants them: [K / 128, N]."""
    return weight.scale.t().contiguous()


def planes_linear(x: torch.Tensor, weight: PackedWeight, scale: torch.Tensor, config: str) -> torch.Tensor:
    """y = x W^T, x [M, K] contiguous."""
    rows, columns = weight.shape
    fields, radix = FIELDS[weight.codec]
    block_m, block_n, block_k, warps, stages, band = PLANE_CONFIGS[config]
    n = weight.codes.shape[0]
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.shape[0], block_m) * triton.cdiv(n, block_n) * fields,)
    plane_kernel[grid](
        x,
        weight.codes,
        scale,
        out,
        x.shape[0],
        rows,
        columns,
        n // 8,
        x.stride(0),
        out.stride(0),
        scale.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        FIELDS=fields,
        RADIX=radix,
        BAND=band,
        num_warps=warps,
        num_stages=stages,
    )
    return out
