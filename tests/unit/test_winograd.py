"""Convolutions with a quarter of the products: torch's own in float64 is the truth."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from bonsai_ops.kernels import winograd
from bonsai_ops.kernels.cpu import reuse

TOLERANCE = 1e-5
"""Relative (L2), fp32. Found: 2e-6; torch's own convolution 3e-7."""
WIDE = winograd.LEAST_CHANNELS


def parts(images: int, height: int, width: int, channels: int = WIDE, rows: int = WIDE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height + width)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(rows, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight, torch.randn(rows, generator=generator)


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    truth = conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("form", [(1, 8, 8), (2, 13, 22), (1, 1, 1), (1, 4, 3), (1, 40, 5)], ids=str)
def test_every_size(form: tuple[int, int, int], with_bias: bool) -> None:
    x, weight, bias = parts(*form)
    bias = bias if with_bias else None
    found = winograd.convolve(x, weight, bias)
    assert found.dtype == torch.float32 and error(found, x, weight, bias) < TOLERANCE
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd.convolve(last, weight, bias), found)
    assert not torch.equal(conv2d(x, weight, bias, padding=1), found)  # so the question was the right one


def test_bands_of_several_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = parts(2, 28, 16, WIDE, WIDE + 64)
    whole = winograd.convolve(x, weight, bias)
    monkeypatch.setattr(winograd, "BAND_BYTES", 3 * 36 * 4 * 4 * (WIDE + 64))
    assert error(winograd.convolve(x, weight, bias), x, weight, bias) < TOLERANCE > error(whole, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_is_not_for_is_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in parts(1, 8, 8, WIDE if dtype == torch.bfloat16 else WIDE - 1))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd.convolve(x, weight, bias), conv2d(last, weight, bias, padding=1))


def test_gradients_are_torchs() -> None:
    x, weight, bias = parts(1, 8, 8)
    x.requires_grad_()
    winograd.convolve(x, weight, bias).square().sum().backward()
    (truth,) = torch.autograd.grad(conv2d(x, weight, bias, padding=1).square().sum(), x)
    torch.testing.assert_close(x.grad, truth)


def test_one_image_and_none() -> None:
    x, weight, bias = parts(1, 8, 8)
    assert torch.equal(winograd.convolve(x[0], weight, bias), conv2d(x[0], weight, bias, padding=1))
    assert winograd.convolve(x[:0], weight, bias).shape == x[:0].shape


def test_autocast_is_torchs() -> None:
    x, weight, bias = parts(1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = winograd.convolve(x, weight, bias), conv2d(x, weight, bias, padding=1)
    assert found.dtype == torch.bfloat16 and torch.equal(found, truth)


def test_transformed_functions_are_torchs() -> None:
    x, weight, bias = parts(2, 8, 8)
    found = torch.func.vmap(lambda one: winograd.convolve(one[None], weight, bias)[0])(x)
    torch.testing.assert_close(found, conv2d(x, weight, bias, padding=1))


@pytest.mark.parametrize("form", [(1, 8, 8), (2, 13, 22)], ids=str)
def test_one_value_a_channel(form: tuple[int, int, int]) -> None:
    x, weight, bias = parts(*form)
    weight = weight[:, :, 1:2, 1:2]
    for kernel_bias in (bias, None):
        found = winograd.mix(x, weight, kernel_bias)
        truth = conv2d(x.double(), weight.double(), None if kernel_bias is None else kernel_bias.double())
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


def test_memory_that_held_something_else() -> None:
    """Results on memory that is used again, and the zeros around a picture, whatever lay there."""
    x, weight, bias = parts(1, 37, 41)
    with reuse.opened():
        first = winograd.convolve(x, weight, bias)
        kept = first.clone()
        del first
        for _ in range(2):
            assert torch.equal(winograd.convolve(x, weight, bias), kept)
            winograd.convolve(torch.full_like(x, torch.nan), weight, bias)
    assert error(kept, x, weight, bias) < TOLERANCE
