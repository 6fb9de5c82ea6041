"""The backend "unpack": a Triton kernel writes W's values in one launch, the vendor's library multiplies them.

It takes what the fused kernels leave: other schemes, groups and dtypes, and GPUs on which Triton has no code for tensor
cores. Importing this never fails and costs nothing; Triton is imported for a call that fits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...weights.codec import get_codec
from ...weights.packed_weight import PackedWeight
from ..call import EXACT, Call, Limits
from ..triton import DEVICES
from . import product

NAME = "unpack"
MODES = (EXACT,)
LIMITS = Limits(DEVICES, product.DTYPES, product.CODECS)
LEAST_CAPABILITY = (7, 5)

TILE = 4096
"""Bytes that a program reads."""
LONGEST = 128
"""Most columns that a program owns."""
WARPS = 4

_verified: set[tuple] = set()


def forget_verified() -> None:
    """Every kernel is compared with the reference again before its next product."""
    _verified.clear()


def declines(call: Call) -> str | None:
    """Why this kernel does not unpack a weight, None if it does. What no installation cures comes first."""
    if (unmet := LIMITS.unmet(call)) is not None:
        return unmet
    if call.rows * (call.columns // call.group_size) >= 2**31:
        return f"a weight of {call.rows} rows is too large for Triton's 32-bit scale index"
    known = call.device.type != "cuda" or torch.version.hip is not None
    if not known and (call.capability is None or call.capability < LEAST_CAPABILITY):
        shown = "unknown" if call.capability is None else f"{call.capability[0]}.{call.capability[1]}"
        return f"Triton has no code for compute capability {shown}, only for 7.5 and newer"
    from ..triton import backend  # takes seconds

    return backend.unavailable()


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for a call that was not declined, as product.multiply computes and raises."""
    from ..triton import backend

    return product.multiply(x, weight, bias, write, _verified, backend.explained)


def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x = y W for a call that was not declined, as product.multiply_transposed computes and raises."""
    from ..triton import backend

    return product.multiply_transposed(grad, weight, write, _verified, backend.explained)


def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
    """out [last - first, K], contiguous = rows first .. last-1 of W in out's dtype, in one launch."""
    from ..triton import backend
    from .kernel import unpack_kernel

    columns = weight.shape[1]
    interpret = backend.interpreting()
    given = constants(weight.scheme, weight.codec, weight.group_size, out.dtype, interpret)
    codes, scale, zero = product.operands(weight)
    if given["PAIRS"]:
        codes, out = codes.view(torch.int16), out.view(torch.int32)
    n = len(codes)
    start, end = product.byte_rows(n, first, last)
    grid = (-(-(end - start) // given["BLOCK_N"]) * (columns // (given["BLOCK_K"] * given["STEPS"])),)
    options = {} if interpret else {"num_warps": WARPS, "enable_fp_fusion": False}
    with product.current(codes.device):
        unpack_kernel[grid](codes, scale, zero, out, columns, n // 8, first, last, start, **given, **options)


@functools.cache
def constants(scheme: str, codec: str, group_size: int, dtype: torch.dtype, interpret: bool = False) -> dict[str, Any]:
    """The constexpr arguments of the kernel, the same for a launch and for the static report. Not to be written to."""
    import triton.language as tl

    coder = get_codec(codec)
    block_k = min(group_size & -group_size, 64)
    steps = next(s for s in range(LONGEST // block_k, 0, -1) if group_size // block_k % s == 0)
    return {
        "BLOCK_N": TILE >> (block_k * steps - 1).bit_length(),
        "BLOCK_K": block_k,
        "STEPS": steps,
        "GROUP": group_size,
        "PLANES": coder.fields,
        "RADIX": coder.radix,
        "SCHEME": scheme,
        "DTYPE": {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype],
        "PAIRS": scheme in ("binary", "ternary") and dtype != torch.float32,
        "INTERPRET": interpret,
    }
