"""y = x W^T, and x = y W, through W's values: a kernel writes them into a scratch, the vendor's library multiplies.

The scratch comes from torch's allocator at each call and goes back to it when the product is enqueued. So the layers of
a stream share one piece of memory in the order of the stream, a CUDA graph that is recorded gets its own, and what
empties torch's cache frees it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from ...weights.codec import encode, get_codec
from ...weights.device_errors import is_the_devices
from ...weights.packed_weight import SCHEMES, PackedWeight
from .. import eager, machine
from ..call import refuse_residual
from ..failure import BackendError
from ..rows import chunks, readable

SCRATCH_BYTES = 128 << 20
"""Bound on the scratch. The largest layers of FLUX.2 Klein 4B take it in two halves, all others whole."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CODECS = {scheme.name: scheme.codecs for scheme in SCHEMES.values()}
"""What is unpacked in one launch: every weight, for a product in one of these dtypes."""

PROBE_ROWS = {"cuda": 643, "cpu": 83}
"""Rows of the weight that a kernel is tried with, by type of device: ragged, on a GPU several tiles."""

Write = Callable[[PackedWeight, int, int, torch.Tensor], None]
"""(weight, first, last, out): out [last - first, K] = rows first .. last-1 of W in the dtype of out."""


def multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    write: Write,
    verified: set[tuple],
    explained: Callable[[Exception], BackendError],
) -> torch.Tensor:
    """y = x W^T + bias: x [.., K] bf16, fp16 or fp32 -> [.., N] in x's dtype; W's values are those of `dequantize`.

    `verified` holds the kinds of weights that `write` was compared for. One that was not is compared first, or, as that
    waits, left to the reference while a CUDA graph is recorded. Raises ValueError for a weight with a residual, and
    BackendError for wrong values or what `explained` makes of an error of `write`; errors of the device are raised as
    they are.
    """
    by_kernel = functools.partial(_product, x, weight, bias, write)
    reference = functools.partial(eager.multiply, x, weight, bias)
    return _checked(x, weight, write, verified, explained, by_kernel, reference)


def multiply_transposed(
    grad: torch.Tensor,
    weight: PackedWeight,
    write: Write,
    verified: set[tuple],
    explained: Callable[[Exception], BackendError],
) -> torch.Tensor:
    """x = y W: y [.., N] bf16, fp16 or fp32 -> [.., K] in y's dtype; the parts of a large weight are summed in fp32.

    Arguments, and what is raised, as for `multiply`.
    """
    by_kernel = functools.partial(_transposed, grad, weight, write)
    reference = functools.partial(eager.multiply_transposed, grad, weight)
    return _checked(grad, weight, write, verified, explained, by_kernel, reference)


def _checked(
    x: torch.Tensor,
    weight: PackedWeight,
    write: Write,
    verified: set[tuple],
    explained: Callable[[Exception], BackendError],
    by_kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """`by_kernel`, with what `write` writes compared once before; or `reference`, where that cannot be."""
    refuse_residual(weight)
    tables = [table.dtype for table in weight.tables().values()]
    # Triton compiles a kernel of its own for columns that 16 divides
    kind = (x.device, x.dtype, weight.scheme, weight.codec, weight.group_size, weight.shape[1] % 16 == 0, *tables)
    try:
        if kind not in verified:
            if machine.capturing():
                return reference()
            _compare(write, weight, x.dtype)
            verified.add(kind)
        return by_kernel()
    except Exception as error:  # what a broken compiler raises at a first launch has no common class
        if isinstance(error, BackendError) or is_the_devices(error):
            raise
        raise explained(error) from error


def operands(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, zero) as kernels read them; the scale again where a scheme has no zero."""
    scale = readable(weight.scale)
    return readable(weight.codes), scale, scale if weight.zero is None else readable(weight.zero)


def byte_rows(n: int, first: int, last: int) -> tuple[int, int]:
    """(first, last + 1) of the byte rows, of n, that hold the rows first .. last-1: a run of them within one plane."""
    return (first % n, (last - 1) % n + 1) if first // n == (last - 1) // n else (0, n)


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the block kernels are started on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, write: Write) -> torch.Tensor:
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    parts, scratch = _scratch(x, weight)
    shift = None if bias is None else bias.to(x.dtype)
    if len(parts) == 1:
        write(weight, 0, rows, scratch)
        return torch.nn.functional.linear(flat, scratch, shift).to(x.dtype).view(*x.shape[:-1], rows)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    for first, last in parts:
        values = scratch[: last - first]
        write(weight, first, last, values)
        if shift is None:
            torch.mm(flat, values.t(), out=out[:, first:last])
        else:
            torch.addmm(shift[first:last], flat, values.t(), out=out[:, first:last])
    return out.view(*x.shape[:-1], rows)


def _transposed(grad: torch.Tensor, weight: PackedWeight, write: Write) -> torch.Tensor:
    rows, columns = weight.shape
    flat = grad.reshape(-1, rows)
    parts, scratch = _scratch(grad, weight)
    if len(parts) == 1:
        write(weight, 0, rows, scratch)
        return torch.mm(flat, scratch).to(grad.dtype).view(*grad.shape[:-1], columns)
    out = torch.zeros(flat.shape[0], columns, dtype=torch.float32, device=grad.device)
    for first, last in parts:
        values = scratch[: last - first]
        write(weight, first, last, values)
        out += torch.mm(flat[:, first:last], values)
    return out.to(grad.dtype).view(*grad.shape[:-1], columns)


def _scratch(x: torch.Tensor, weight: PackedWeight) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """(the parts that W's rows come in, a scratch in x's dtype for the longest of them)."""
    rows, columns = weight.shape
    parts = chunks(rows, SCRATCH_BYTES // (columns * x.dtype.itemsize))
    return parts, torch.empty(parts[0][1], columns, dtype=x.dtype, device=x.device)


def _compare(write: Write, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Has a small weight of this kind written in two parts and compares the values with the reference's.

    All of them are exact in float32 and rounded once. Raises BackendError if they differ, if one is left out or if
    something is written beside them: a compiler or GPU nobody has tried must not change pictures silently.
    """
    device, group = weight.codes.device, weight.group_size
    rows, columns = PROBE_ROWS[device.type], max(2 * group, 256 // group * group)
    columns += group if weight.shape[1] % 16 and columns % 16 == 0 else 0
    middle = rows // 3
    levels = SCHEMES[weight.scheme].levels or get_codec(weight.codec).radix
    codes = (torch.arange(rows * columns, device=device) * 37 % 257 % levels).to(torch.uint8).view(rows, columns)
    table = torch.arange(rows * (columns // group), device=device).view(rows, -1)
    scale = ((table % 7 - 3).float() / 4 + 0.125).to(weight.scale.dtype)
    zero = None if weight.zero is None else (table % 5 - 2).to(weight.zero.dtype)
    packed = encode(weight.codec, codes)
    probe = PackedWeight(packed, scale, (rows, columns), weight.scheme, weight.codec, group, zero)
    expected = probe.dequantize(dtype)
    for first, last in ((0, middle), (middle, rows)):
        found = torch.full((last - first + 2, columns), float("nan"), dtype=dtype, device=device)
        write(probe, first, last, found[1:-1])
        beside = torch.stack((found[0], found[-1]))
        if not (torch.equal(found[1:-1], expected[first:last]) and bool(beside.isnan().all())):
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            raise BackendError(
                f"the kernel that unpacks {weight.scheme} weights stored as {weight.codec} wrote wrong values "
                f"on {device}",
                f"update this plugin and report {weight.scheme}, {weight.codec} on {name}",
            )
