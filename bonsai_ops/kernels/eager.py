"""The reference for every backend: unpack a piece, multiply it, go on. Plain torch, any device."""

from __future__ import annotations

import torch

from ..weights.packed_weight import SCRATCH_BYTES, PackedWeight
from .call import EXACT, Call

NAME = "eager"
MODES = (EXACT,)

GPU_SCRATCH_BYTES = 128 << 20
"""Bound on the unpacked piece on a GPU: a few launches a layer instead of dozens."""


def declines(call: Call) -> str | None:
    """None: it takes every weight, dtype and device."""
    return None


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for x [.., K] in bf16, fp16 or fp32; y [.., N] in x's dtype, accumulated in fp32.

    W in x's dtype is exact (float32 formula, one rounding), the residual of the weight included; at most one piece
    of it exists at a time.
    """
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    for first, last, values in weight.pieces(x.dtype, _scratch(x)):
        torch.mm(flat, values.t(), out=out[:, first:last])
    if bias is not None:
        out += bias.to(x.dtype)
    return out.view(*x.shape[:-1], rows)


def _scratch(x: torch.Tensor) -> int:
    return SCRATCH_BYTES if x.device.type == "cpu" else GPU_SCRATCH_BYTES


def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x = y W for y [.., N]; x [.., K] in y's dtype: the gradient of `multiply` with respect to its input.

    The products of the pieces are summed in fp32.
    """
    rows, columns = weight.shape
    flat = grad.reshape(-1, rows)
    out = torch.zeros(flat.shape[0], columns, dtype=torch.float32, device=grad.device)
    for first, last, values in weight.pieces(grad.dtype, _scratch(grad)):
        out += torch.mm(flat[:, first:last], values)
    return out.to(grad.dtype).view(*grad.shape[:-1], columns)
