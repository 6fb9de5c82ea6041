"""y W, the gradient of a packed product with respect to its input, on the processor, against float64.

What GPUs do, test_unpack.py and its sisters look at.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from random_weights import random_weight
from torch.utils._python_dispatch import TorchDispatchMode

from bonsai_ops import kernels
from bonsai_ops.kernels import cpu, eager
from bonsai_ops.kernels.call import call_of
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
SHAPES = [(1, 128, 128), (83, 384, 128), (39, 160, 32), (136, 256, 256), (384, 512, 64)]
each = pytest.mark.parametrize("backend", (cpu, eager), ids=lambda backend: backend.NAME)


def taken(backend: Any, weight: PackedWeight, dtype: torch.dtype) -> bool:
    """True if a backend has kernels for it; how fast the processor is does not matter."""
    return backend is eager or cpu.LIMITS.unmet(call_of(torch.device("cpu"), dtype, weight)) is None


def error(found: torch.Tensor, grad: torch.Tensor, weight: PackedWeight) -> float:
    exact = grad.double() @ weight.dequantize(grad.dtype).double()
    assert (found.shape, found.dtype) == (exact.shape, grad.dtype)
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("scheme", "codec"), PAIRS)
def test_values(backend: Any, scheme: str, codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part, parts of some groups, and parts of a group; each dtype of scales."""
    for number, shape in enumerate(SHAPES):
        table = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        weight = random_weight(scheme, codec, *shape, table)
        if not taken(backend, weight, dtype):
            return
        grad = torch.randn(3, 2, shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        for columns in (10_000, 128, 40):
            monkeypatch.setattr(cpu, "VALUE_BYTES", columns * shape[0] * dtype.itemsize)
            assert error(backend.multiply_transposed(grad, weight), grad, weight) < TOLERANCE[dtype], (shape, columns)


@each
def test_gradients_of_any_form(backend: Any) -> None:
    """One token, none, strides, and the same value everywhere, as `sum` gives it."""
    weight = random_weight("ternary", "trit5", 83, 384)
    whole = torch.randn(4, 5, 100, generator=torch.Generator().manual_seed(2))
    for grad in (whole[0, 0, :83], whole[:0, :, :83], whole[::2, 1:3, 17:], torch.ones(()).expand(3, 83)):
        before = grad.clone()
        assert error(backend.multiply_transposed(grad, weight), grad, weight) < 5e-6
        assert torch.equal(grad, before)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.nbytes = max(self.nbytes, made.numel() * made.element_size())
        return made


@each
@pytest.mark.parametrize("group_size", [128, 3072])
def test_the_weight_never_lies_unpacked(backend: Any, group_size: int) -> None:
    """A layer of 4B, also with one scale a row: never more than the bound of the backend at a time."""
    weight = random_weight("ternary", "trit5", 3072, 3072, group_size)
    with Largest() as largest:
        backend.multiply_transposed(torch.ones(1, 3072), weight)
    assert largest.nbytes <= cpu.SCRATCH_BYTES < 4 * weight.shape[0] * weight.shape[1]


def test_a_residual_is_refused_where_it_would_be_left_out() -> None:
    weight = random_weight("ternary", "trit5", 136, 256)
    weight = PackedWeight(**{**vars(weight), "up": torch.ones(136, 2), "down": torch.ones(2, 256)})
    with pytest.raises(ValueError, match="residual"):
        cpu.multiply_transposed(torch.ones(1, 136), weight)


def test_a_backend_that_breaks_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The gradient of a product comes from the CPU's own code, and where that breaks from the reference."""

    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of order")

    weight, x = random_weight("binary", "bit", 136, 256), torch.randn(3, 256, requires_grad=True)
    monkeypatch.setattr(cpu, "multiply_transposed", broken)
    with caplog.at_level(logging.WARNING):
        kernels.linear(x, weight).sum().backward()
    kernels.forget_failures()
    assert error(x.grad, torch.ones(3, 136), weight) < 5e-6
    assert [r.getMessage() for r in caplog.records if "out of order" in r.getMessage()]
