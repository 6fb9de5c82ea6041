"""The CPU: unpack some rows of the weight into a buffer, multiply them, go on; for y W, some columns.

Codes of signs become t = -1, 0 or 1 by integer operations on 16 bits, a run of byte rows of one plane at a time. With b
the byte (trit5: b 3^plane modulo 256), 0x7FFF minus the code in the two top bits and whatever follows it, shifted right
by 14, is 1 - code. Then, by mode and dtype of x:

    exact, bf16   the bits of s, made odd, times t & 0x8001 are s, 0 or -s but for the lowest bit, which a mask
                  restores: several times as fast as a product in bf16, and right for every s. A codec of one bit
                  needs less: the bit is the sign of s
    exact, fp32   t s
    a8            t m in int8, m = round(s / r), r = max |s| of the row / 127; x = q h, h = max |x| of the token / 127;
                  y = h r (q . t m), the product in int32

Codes of a weight with zeros become c s + z or (c - z) s in fp32, step by step as the formula has it, and are rounded
once to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..weights import codec as codecs
from ..weights.packed_weight import SCHEMES, PackedWeight
from . import machine
from .call import EXACT, Call, Limits, refuse_residual
from .reuse import Reuse
from .rows import chunks, runs

NAME = "cpu"
MODES = (EXACT, "a8")
LIMITS = Limits(("cpu",), (torch.bfloat16, torch.float32), {scheme.name: scheme.codecs for scheme in SCHEMES.values()})
SIGNS = Limits(LIMITS.devices, LIMITS.dtypes, {"binary": ("bit",), "ternary": ("trit5", "crumb")})
"""What a8 takes: three levels and a scale make one of int8, sixteen do not."""

NO_BF16 = "this CPU has no AVX-512 BF16, AMX or ARM bf16"

SCRATCH_BYTES = 32_000_000
"""Bound on what a call allocates beside its result."""
VALUE_BYTES = 28_400_000
"""Of that, the buffer of values: few large products are faster than many small ones."""
PIECE_BYTES = 2 << 20
"""Bound on what unpacking takes beside it. Smaller pieces would stay in the fastest cache, but have more operations."""
ZERO_PIECE = 1 << 19
"""Values with zeros that one operation works on: four of them a value, so that memory matters more than their count."""
ZERO_ROWS = 384
"""Rows of values with zeros in one product of few tokens, while they are in the processor's cache."""
COLUMN_STEP = 32
"""Granularity of the columns of y W within a group, the smallest group that a packed weight has."""

LEVELS = 127
INPUT_BYTES = 18 << 20
"""a8: bound on the int8 copy of the input; more tokens than that take turns."""
A8_TOKENS, A8_ROWS, A8_VALUE_BYTES = 2048, 1536, 8 << 19
"""a8: bounds on one product, whose int32 sums take 12 MB at most."""
A8_PIECE, A8_BLOCK = 1 << 20, 1 << 18
"""a8: values of the weight that one operation works on; values that are rounded, or sums that are scaled, at a time."""

HIGHEST = torch.tensor(0x7FFF, dtype=torch.int16, device="cpu")

reuse = Reuse()
"""Memory of results and buffers, open while ComfyUI samples one of our models."""


def declines(call: Call) -> str | None:
    """Why this backend cannot take a call, None if it can."""
    if (unmet := (SIGNS if call.mode == "a8" else LIMITS).unmet(call)) is not None:
        return unmet
    if call.mode == "a8" and not machine.cpu_has_fast_int8():
        return "this CPU has no AVX-512 VNNI or AMX"
    if call.mode == EXACT and call.dtype == torch.bfloat16 and not machine.cpu_has_fast_bf16():
        return f"{NO_BF16}; compute_dtype fp32 is faster"
    return None


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for x [.., K] bf16 or fp32; y [.., N] in x's dtype.

    exact: the values of W in x's dtype, fp32 sums. a8: both factors rounded to int8, as above. Raises ValueError for a
    weight with a residual.
    """
    refuse_residual(weight)
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    reuse.next_turn()
    out = reuse.empty(flat.shape[0], rows, x.dtype)
    if mode == "a8":
        _a8(flat, weight, out)
    else:
        _exact(flat, weight, out)
    if bias is not None:
        out += bias.to(x.dtype)
    return out.view(*x.shape[:-1], rows)


def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x = y W for y [.., N] bf16 or fp32; x [.., K] in y's dtype: the values of W in that dtype, fp32 sums.

    Raises ValueError for a weight with a residual.
    """
    refuse_residual(weight)
    rows, columns = weight.shape
    flat = grad.reshape(-1, rows)
    out = torch.empty(flat.shape[0], columns, dtype=grad.dtype, device="cpu")
    parts = list(_by_columns(weight, VALUE_BYTES // (grad.dtype.itemsize * rows)))
    reuse.next_turn()
    buffer = reuse.empty(rows, max(part.shape[1] for _, part in parts), grad.dtype).view(-1)
    write = _writer(weight, grad.dtype)
    for first, part in parts:
        values = buffer[: rows * part.shape[1]].view(part.shape)
        write(part, 0, rows, values)
        torch.mm(flat, values, out=out[:, first : first + part.shape[1]])
    return out.view(*grad.shape[:-1], columns)


def _by_columns(weight: PackedWeight, most: int) -> Iterator[tuple[int, PackedWeight]]:
    """Yields (first column, the weight of that and the following) of about `most` columns, of whole groups if it can.

    A part of a group is a group too.
    """
    group, whole = weight.group_size, most >= weight.group_size
    step = most // group * group if whole else max(COLUMN_STEP, most // COLUMN_STEP * COLUMN_STEP)
    for start in range(0, weight.shape[1], weight.shape[1] if whole else group):
        end = weight.shape[1] if whole else start + group
        for lo in range(start, end, step):
            hi = min(lo + step, end)
            groups = slice(lo // group, -(-hi // group))
            shape, zero = (weight.shape[0], hi - lo), None if weight.zero is None else weight.zero[:, groups]
            form = (shape, weight.scheme, weight.codec, group if whole else hi - lo)
            yield lo, PackedWeight(weight.codes[:, lo:hi], weight.scale[:, groups], *form, zero)


def _exact(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor) -> None:
    """out [M, N] = x [M, K] W^T."""
    rows, columns = weight.shape
    parts = chunks(rows, _rows_together(len(x), weight, x.dtype))
    values = reuse.empty(parts[0][1], columns, x.dtype)
    write = _writer(weight, x.dtype)
    for first, last in parts:
        write(weight, first, last, values)
        torch.mm(x, values[: last - first].t(), out=out[:, first:last])


def _rows_together(tokens: int, weight: PackedWeight, dtype: torch.dtype) -> int:
    """Rows of W in one product, about."""
    row = dtype.itemsize * weight.shape[1]
    if weight.zero is None:
        return VALUE_BYTES // row
    return min((VALUE_BYTES - 8 * ZERO_PIECE) // row, max(ZERO_ROWS, tokens // 2))


def _writer(weight: PackedWeight, dtype: torch.dtype) -> Callable[[PackedWeight, int, int, torch.Tensor], None]:
    """What writes rows first .. last-1 of a weight of this kind to the first rows of values [.., K] in `dtype`."""
    if weight.zero is not None:
        return _write_with_zeros
    return _write_bf16 if dtype == torch.bfloat16 else _write_fp32


def _write_bf16(weight: PackedWeight, first: int, last: int, values: torch.Tensor) -> None:
    """The first rows of values, bf16 [.., K] = rows first .. last-1 of W, PIECE_BYTES at a time."""
    scale = weight.scale[first:last].to(torch.bfloat16).view(torch.int16).unsqueeze(-1)
    if weight.codec != "bit":
        odd, keep = scale | 1, scale | -2
    for rows, plane, packed in runs(weight, first, last, PIECE_BYTES):
        bits = values[rows].view(torch.int16)
        grouped = bits.view(len(bits), -1, weight.group_size)
        if weight.codec == "bit":
            bits.copy_(packed).bitwise_left_shift_(8 + plane).bitwise_and_(-0x8000)
            grouped.bitwise_xor_(scale[rows])
        else:
            _signs(weight.codec, packed, plane, bits)
            grouped.bitwise_and_(-0x7FFF).mul_(odd[rows]).bitwise_and_(keep[rows])


def _write_fp32(weight: PackedWeight, first: int, last: int, values: torch.Tensor) -> None:
    """The first rows of values, fp32 [.., K] = rows first .. last-1 of W, PIECE_BYTES at a time."""
    scale = weight.scale[first:last].float().unsqueeze(-1)
    for rows, plane, packed in runs(weight, first, last, PIECE_BYTES // 4):
        signs = _signs(weight.codec, packed, plane, torch.empty(packed.shape, dtype=torch.int16))
        grouped = (len(packed), -1, weight.group_size)
        values[rows].view(grouped).copy_(signs.view(grouped)).mul_(scale[rows])


def _write_with_zeros(weight: PackedWeight, first: int, last: int, values: torch.Tensor) -> None:
    """The first rows of values [.., K] = rows first .. last-1 of a weight with zeros, ZERO_PIECE at a time."""
    scale, zero = (table[first:last].float().unsqueeze(-1) for table in (weight.scale, weight.zero))
    most = max(ZERO_PIECE, weight.shape[1])
    wide = values if values.dtype == torch.float32 else torch.empty(most, dtype=torch.float32, device="cpu")
    for rows, plane, packed in runs(weight, first, last, ZERO_PIECE):
        part = wide[rows] if wide is values else wide[: packed.numel()].view(packed.shape)
        part.copy_(_levels(weight.codec, packed, plane))
        grouped = part.view(len(packed), -1, weight.group_size)
        if weight.scheme == "affine":
            grouped.mul_(scale[rows]).add_(zero[rows])
        else:
            grouped.sub_(zero[rows]).mul_(scale[rows])
        if part.dtype != values.dtype:
            values[rows].copy_(part)


def _levels(codec: str, packed: torch.Tensor, plane: int) -> torch.Tensor:
    """The codes of one plane of the bytes, uint8 [R, K], of a codec whose radix is a power of two."""
    radix, fields = codecs.get_codec(codec).radix, codecs.get_codec(codec).fields
    above = 8 // fields * (fields - 1 - plane)
    shifted = packed >> above if above else packed
    return shifted & (radix - 1) if plane else shifted


def _a8(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor) -> None:
    """out [M, N] = x [M, K] W^T with both factors in int8."""
    tokens, (rows, columns) = x.shape[0], weight.shape
    scale = weight.scale.to(torch.float32, copy=True)
    row_scale = scale.abs().amax(1).div_(LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    levels = scale.div_(row_scale.unsqueeze(1)).round_().to(torch.int16).unsqueeze(-1)
    del scale
    parts = chunks(rows, min(A8_ROWS, A8_VALUE_BYTES // columns))
    turns = -(-tokens // max(1, min(A8_TOKENS, INPUT_BYTES // columns)))
    step = -(-tokens // max(turns, 1))
    codes = reuse.empty(parts[0][1], columns, torch.int8)
    sums = reuse.empty(step, parts[0][1], torch.int32).view(-1)
    for start in range(0, tokens, max(step, 1)):
        part = out[start : start + step]
        rounded, token_scale = _rounded(x[start : start + step])
        for first, last in parts:
            for rows, plane, packed in runs(weight, first, last, A8_PIECE):
                signs = _signs(weight.codec, packed, plane, torch.empty(packed.shape, dtype=torch.int16))
                signs.view(len(packed), -1, weight.group_size).mul_(levels[first:last][rows])
                codes[rows].copy_(signs)
            found = sums[: len(part) * (last - first)].view(len(part), last - first)
            torch._int_mm(rounded, codes[: last - first].t(), out=found)
            block = max(1, A8_BLOCK // (last - first))
            for lo in range(0, len(part), block):
                scaled = found[lo : lo + block].float().mul_(row_scale[first:last])
                part[lo : lo + block, first:last] = scaled.mul_(token_scale[lo : lo + block])


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as (int8 [M, K], fp32 [M, 1]), whose product is x but for the rounding."""
    rounded = reuse.empty(*x.shape, torch.int8)
    scale = torch.empty(x.shape[0], 1)
    block = max(1, A8_BLOCK // x.shape[1])
    for lo in range(0, x.shape[0], block):
        part = x[lo : lo + block].to(torch.float32, copy=True)
        largest = torch.maximum(part.amax(1, True), part.amin(1, True).neg_()).clamp_(min=1e-30)
        scale[lo : lo + block] = largest / LEVELS
        rounded[lo : lo + block].copy_(part.mul_(LEVELS / largest).round_())
    return rounded, scale


def _signs(codec: str, packed: torch.Tensor, plane: int, out: torch.Tensor) -> torch.Tensor:
    """out, int16 [R, K] = t of one plane of the bytes, uint8 [R, K]."""
    if codec == "trit5":
        if plane:
            packed = torch.mul(packed, 3**plane % 256)
        return torch.add(HIGHEST, out.copy_(packed), alpha=-3 << 6, out=out).bitwise_right_shift_(14)
    if codec == "crumb":
        return torch.add(HIGHEST, out.copy_(packed), alpha=-1 << (8 + 2 * plane), out=out).bitwise_right_shift_(14)
    return out.copy_(packed).bitwise_left_shift_(8 + plane).bitwise_right_shift_(15).bitwise_or_(1)
