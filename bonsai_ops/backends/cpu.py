"""bf16 on processors that multiply it in hardware: unpack a plane into a small buffer, multiply it, go on.

A code becomes a number without any conversion: in bf16 the bit patterns 0x4000, 0x8000 and 0xC000 are 2, -0 and -2.
For trit5 with q = B << 6 (14 bits), y = 3 q + 0x4000 carries the next code into the two top bits: 01, 10, 11 for
codes 0, 1, 2, that is 2, 0, -2 = 2 (1 - c); the rest is y & 0x3FFF. For bit the code is the top bit of B << 8: (q &
0x8000) | 0x4000 is 2 (1 - 2 c). The factor 2 goes into the scale, whose half is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import codec as codecs
from ..packed_weight import PackedWeight

SCRATCH_BYTES = 30 << 20
"""Bound on the two buffers, one of codes and one of values."""
SCHEMES = ("binary", "ternary")
MODES = ("exact",)


def declines(
    device: torch.device, dtype: torch.dtype, scheme: str, fast_bf16: bool, mode: str, fast_int8: bool
) -> str | None:
    """Why this backend cannot take a call, None if it can."""
    if device.type != "cpu":
        return f"the weight is on {device.type}"
    if scheme not in SCHEMES:
        return f"scheme {scheme} keeps a second table"
    if mode not in MODES:
        return f"it has no mode {mode}"
    if not fast_bf16:
        return "this CPU has no AVX-512 BF16 or AMX"
    if dtype != torch.bfloat16:
        return f"it computes in {str(dtype).removeprefix('torch.')}; this backend is for bf16"
    return None


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = "exact"
) -> torch.Tensor:
    """y = x W^T + bias for x [.., K] bf16; y [.., N] bf16, accumulated in fp32. The values of W are exact."""
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype)
    n = codecs.get_codec(weight.codec).byte_rows(rows)
    step = min(n, max(8, SCRATCH_BYTES // (4 * columns) // 8 * 8))
    half = weight.scale.to(torch.bfloat16) / 2
    extract = {"trit5": _trits, "crumb": _crumbs, "bit": _signs}[weight.codec]
    rest, values = (torch.empty(step, columns, dtype=torch.int16) for _ in range(2))
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        planes = extract(weight.codes[lo:hi], rest[: hi - lo], values[: hi - lo])
        for plane in range(codecs.get_codec(weight.codec).fields):
            first, last = min(plane * n + lo, rows), min(plane * n + hi, rows)
            if first == last:
                break
            doubled = planes()[: last - first].view(torch.bfloat16)
            grouped = doubled.view(last - first, -1, weight.group_size)
            grouped.mul_(half[first:last].unsqueeze(-1))
            torch.mm(flat, doubled.t(), out=out[:, first:last])
    if bias is not None:
        out += bias.to(x.dtype)
    return out.view(*x.shape[:-1], rows)


def _trits(packed: torch.Tensor, rest: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function whose calls give the planes of trit5 bytes [n, K] in turn: int16 patterns of 2 t in `values`."""
    rest.copy_(packed).bitwise_left_shift_(6)
    carry = torch.tensor(0x4000, dtype=torch.int16)

    def plane() -> torch.Tensor:
        torch.add(carry, rest, alpha=3, out=rest)
        torch.bitwise_and(rest, -0x4000, out=values)
        rest.bitwise_and_(0x3FFF)
        return values

    return plane


def _crumbs(packed: torch.Tensor, rest: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same for ternary codes in crumb: 1 added to each field makes it the two top bits of the value."""
    rest.copy_(packed).add_(0x55).bitwise_left_shift_(8)

    def plane() -> torch.Tensor:
        torch.bitwise_and(rest, -0x4000, out=values)
        rest.bitwise_left_shift_(2)
        return values

    return plane


def _signs(packed: torch.Tensor, rest: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same for bit: int16 patterns of 2 (1 - 2 c)."""
    rest.copy_(packed).bitwise_left_shift_(8)

    def plane() -> torch.Tensor:
        torch.bitwise_and(rest, -0x8000, out=values)
        values.bitwise_or_(0x4000)
        rest.bitwise_left_shift_(1)
        return values

    return plane
