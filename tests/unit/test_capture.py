"""No product waits for the GPU, so that a CUDA graph may record it; what must wait is left for later while one does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_weights import random_weight
from waits import Waits, recording

from bonsai_ops import kernels
from bonsai_ops.kernels import cpu, dispatch, eager, machine, triton
from bonsai_ops.kernels.call import call_of
from bonsai_ops.kernels.triton import backend
from bonsai_ops.weights.packed_weight import SCHEMES

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
needs_triton = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`on` says whether a CUDA graph is recorded."""
    return recording(monkeypatch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of the weights that Triton's kernels were started for; they give the right product."""
    rows: list[int] = []

    def launch(x: torch.Tensor, weight: Any, bias: Any, out: torch.Tensor, chosen: object, mode: str) -> None:
        rows.append(weight.shape[0])
        out.copy_(eager.multiply(x, weight, bias))

    monkeypatch.setattr(backend, "launch", launch)
    backend.forget_verified()
    yield rows
    backend.forget_verified()


def test_the_mode_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Waits() as waits:
        assert int(x[1]) == 1 and bool(x.sum() > 2) and x.tolist() == [0, 1, 2, 3]
        x[x > 1], torch.nonzero(x), torch.tensor([1, 2]), torch.equal(x, x)
    assert set(waits.found) == {"_local_scalar_dense", "index", "nonzero", "lift_fresh", "equal"}


def test_no_graph_is_recorded_here() -> None:
    assert machine.capturing() is False and kernels.capturing is machine.capturing
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(("scheme", "codec"), PAIRS)
def test_no_product_waits(scheme: str, codec: str) -> None:
    """Neither the first nor any other, of each backend and mode; nor do rows of an embedding and the gradient."""
    weight = random_weight(scheme, codec, 136, 256)
    index = torch.tensor([0, 135, 7, 7])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.ones(3, 256, dtype=dtype), torch.ones(136, dtype=dtype)
        with Waits() as waits:
            for name in (cpu, eager):
                for mode in name.MODES:
                    if name is eager or name.declines(call_of(x.device, dtype, weight, mode)) is None:
                        name.multiply(x, weight, bias, mode)
            dispatch.multiply_transposed(torch.ones(3, 136, dtype=dtype), weight)
            eager.multiply_transposed(torch.ones(3, 136, dtype=dtype), weight)
            for _ in range(2):
                dispatch.multiply(x, weight, bias)
            weight.select_rows(index, dtype)
            weight.dequantize(dtype)
        assert waits.found == []


@pytest.mark.parametrize(("scheme", "codec"), PAIRS)
def test_rows_are_those_of_the_whole(scheme: str, codec: str) -> None:
    """The powers of a codec's radix come from the device."""
    weight = random_weight(scheme, codec, 333, 128)
    index = torch.randint(0, 333, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight.select_rows(index), weight.dequantize()[index])


@needs_triton
@pytest.mark.parametrize(
    ("codec", "mode"), [("trit5", "exact"), ("crumb", "a8"), ("bit", "a8_fp8"), ("bit", "fp16_accumulate")]
)
def test_a_recorded_kernel_is_compared_later(
    codec: str, mode: str, capturing: SimpleNamespace, launches: list[int]
) -> None:
    """What a graph records comes from the reference until a call outside has compared the kernel; then the kernel's."""
    weight = random_weight("binary" if codec == "bit" else "ternary", codec, 40, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).half()
    truth = eager.multiply(x, weight)
    for count, waiting in ((0, False), (2, True), (1, False)):
        capturing.on = not waiting
        with Waits() as waits:
            y = backend.multiply(x, weight, mode=mode)
        assert torch.equal(y, truth) and len(launches) == count and bool(waits.found) == waiting
        assert launches[-1:] == ([40] if count else [])
        launches.clear()


@needs_triton
def test_what_fails_while_a_graph_is_recorded_is_not_out(
    capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses much then that it does otherwise: the backend stays in the choice, the caller gets the error."""

    def multiply(*args: Any) -> torch.Tensor:
        if capturing.on:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.full((3, 40), 7.0)

    fast = SimpleNamespace(NAME="triton", MODES=triton.MODES, declines=eager.declines, multiply=multiply)
    monkeypatch.setattr(dispatch, "BACKENDS", (fast, *dispatch.BACKENDS[1:]))
    weight, x = random_weight("ternary", "trit5", 40, 128), torch.ones(3, 128)
    kernels.forget_failures()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        kernels.linear(x, weight)
    capturing.on = False
    assert kernels.linear(x, weight).unique().tolist() == [7.0]
