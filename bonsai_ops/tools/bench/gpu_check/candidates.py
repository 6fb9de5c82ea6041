"""Kernels that are not in the project yet, and other tiles of those that are, to be measured beside it.

unpack      the signs of W [N, K] in int8 (or its values) from the packed bytes in one launch
planes      plane_kernel (kernels/triton/plane.py) with each tile, chosen or not
"""

# ruff: noqa: N803, SIM108 (Triton: constants of a kernel are upper case; a branch on one is taken at compile time)
from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ....kernels.triton import assembler, backend, configs, probe
from ....kernels.triton.configs import Config
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


PLANE_TILES = {
    # tiles of plane_kernel: the two that are shipped, and another depth of copies
    "plane wide": Config(256, 128, 64, 8, 4),
    "plane narrow": Config(128, 128, 64, 8, 4),
    "plane wide s3": Config(256, 128, 64, 8, 3),
}

_compiled: set[tuple] = set()


def plane_tiles(device: torch.device | str) -> dict[str, Config]:
    """PLANE_TILES as the GPU runs them; empty for one that has no plane_kernel."""
    shipped = configs.PLANE_TILES.get(configs.family(backend._target(torch.device(device))))
    return {} if shipped is None else {name: replace(t, plane=shipped[0].plane) for name, t in PLANE_TILES.items()}


def plane_linear(x: torch.Tensor, weight: PackedWeight, tile: Config) -> torch.Tensor:
    """y = x W^T by plane_kernel, x [M, K] contiguous."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    kind = (*probe.kind_of(x, weight, None, "exact"), tile)
    with contextlib.nullcontext() if kind in _compiled else assembler.of(tile):
        backend.launch(x, weight, None, out, tile, "exact")
    _compiled.add(kind)
    return out
