"""What the Triton kernel that unpacks writes, in Triton's interpreter: in the child of test_triton.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from interpreted import interpreter
from random_weights import random_weight, truth

from bonsai_ops.kernels.unpack import by_triton, product
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [
    # rows, columns, group size, dtype of tables: steps of one group, odd groups, narrow groups and tiles of rows
    (83, 256, 128, torch.float32),
    (39, 192, 96, torch.bfloat16),
    (200, 64, 32, torch.float16),
]


def write_poisoned(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """What the kernel writes into the middle of a buffer of NaN, which stays what it is around it."""
    buffer = torch.full((last - first + 2, weight.shape[1]), float("nan"), dtype=dtype)
    by_triton.write(weight, first, last, buffer[1:-1])
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), "the kernel wrote outside of its output"
    return buffer[1:-1]


@interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}-{shape[2]}")
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_values(pair: tuple[str, str], shape: tuple) -> None:
    """Those of the reference to the bit, and of float64; the whole weight, and runs across planes and within one."""
    weight = random_weight(*pair, *shape)
    weight = dataclasses.replace(weight, scale=weight.scale * torch.tensor([1, -1])[torch.arange(shape[0]) % 2, None])
    dtype = DTYPES[(PAIRS.index(pair) + SHAPES.index(shape)) % 3]
    plane = min(codecs.get_codec(pair[1]).byte_rows(shape[0]), shape[0])
    expected, reference = truth(weight, dtype), weight.dequantize(dtype)
    for first, last in ((0, shape[0]), (5, shape[0] - 3), (plane - 7, plane - 2))[: 3 if shape is SHAPES[0] else 1]:
        found = write_poisoned(weight, first, last, dtype)
        assert torch.equal(found, reference[first:last])
        limit = torch.finfo(dtype).eps * expected.abs().amax()
        assert (found.double() - expected[first:last]).abs().max() <= limit


@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "table"), [("affine", torch.bfloat16), ("zero_point", torch.float16)])
def test_text_encoders(scheme: str, table: torch.dtype, dtype: torch.dtype) -> None:
    """In 4 bits and groups of 64 columns, as MLX and HQQ have them."""
    weight = random_weight(scheme, "nibble", 40, 192, 64, table)
    assert torch.equal(write_poisoned(weight, 0, 40, dtype), weight.dequantize(dtype))


@interpreter
@pytest.mark.parametrize(("pair", "dtype"), zip(PAIRS[::3], DTYPES, strict=True), ids=str)
def test_gradient(pair: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """y W against float64, of the whole weight and of its parts in turns."""
    weight = random_weight(*pair, *SHAPES[2])
    grad = torch.randn(2, SHAPES[2][0], generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = grad.double() @ truth(weight, dtype).double()
    for scratch in (1 << 20, 128 * SHAPES[2][1] * dtype.itemsize):
        monkeypatch.setattr(product, "SCRATCH_BYTES", scratch)
        found = by_triton.multiply_transposed(grad, weight)
        assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@interpreter
def test_codes_and_tables_anywhere_in_memory() -> None:
    """At odd addresses, with strides, and as views of something larger."""
    weight = random_weight("affine", "nibble", 39, 128, 32)
    codes = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8)[1:].view(weight.codes.shape).copy_(weight.codes)
    scale = torch.zeros(39, 9, dtype=torch.bfloat16)[:, 1::2].copy_(weight.scale)
    zero = weight.zero.t().contiguous().t()
    moved = dataclasses.replace(weight, codes=codes, scale=scale, zero=zero)
    turned = dataclasses.replace(weight, codes=weight.codes.t().contiguous().t())
    assert codes.data_ptr() % 16 and not scale.is_contiguous() and not turned.codes.is_contiguous()
    for other in (moved, turned):
        assert torch.equal(write_poisoned(other, 0, 39, torch.float16), weight.dequantize(torch.float16))


@interpreter
def test_the_kernel_is_compared_with_the_reference() -> None:
    """The comparison passes with what the kernel writes, for a group that is the whole row too."""
    weight = random_weight("ternary", "trit5", 9, 192, 192)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    by_triton.forget_verified()
    assert torch.equal(by_triton.multiply(x, weight), torch.nn.functional.linear(x, weight.dequantize(x.dtype)))
