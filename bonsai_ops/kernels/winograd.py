"""Convolutions of 3 x 3 in fp32 on a CPU with a quarter of the products: Winograd's F(4 x 4, 3 x 3).

A tile d of 6 x 6 inputs gives 4 x 4 outputs y = A^T [(G g G^T) * (B^T d B)] A, * value by value, summed over the
channels by 36 matrix products: A, B and G as in Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015
(arXiv:1509.09308). All sums are fp32; their order, and so the last digits, are not those of torch's convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d, linear

from .cpu import reuse
from .custom_op import is_watched

LEAST_CHANNELS = 128
"""Of input and output: with fewer the transforms take longer than the products they spare."""
BAND_BYTES = 8 << 20
"""Transformed inputs or outputs that are worked on at a time, to stay in the cache."""
G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
"""24 times the matrix."""


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """conv2d(x, weight, bias, padding=1) for x [N, C, H, W] and weight [O, C, 3, 3]; on a CPU channels last.

    By torch's own convolution where this one is not for: other devices and dtypes, few channels, a single image
    [C, H, W], autocast, and whoever wants to see operators of torch, such as gradients (`is_watched`).
    """
    if _is_torchs(x, weight, bias):
        return conv2d(x, weight, bias, padding=1)
    if x.dtype != torch.float32 or min(weight.shape[:2]) < LEAST_CHANNELS:
        return conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return _convolve(x, weight, bias)


def mix(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """conv2d(x, weight, bias) for x [N, C, H, W] and weight [O, C, 1, 1]; on a CPU channels last, as one product.

    By torch's own where `convolve` is by torch's, but for dtypes and few channels.
    """
    if _is_torchs(x, weight, bias):
        return conv2d(x, weight, bias)
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _is_torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True for what neither of the two is for, whatever its dtype and channels."""
    return x.device.type != "cpu" or x.ndim != 4 or is_watched(x, weight, bias) or torch.is_autocast_enabled("cpu")


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    (images, channels, height, width), rows = x.shape, weight.shape[0]
    matrix = torch.tensor(G, dtype=torch.float64) / 24
    matrix = torch.einsum("ai,bj->baij", matrix, matrix).reshape(36, 9).to(x.dtype)
    points = torch.mm(matrix, weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, channels, rows)
    down, across = -(-height // 4), -(-width // 4)
    channels_last = x.permute(0, 2, 3, 1)
    step = max(1, BAND_BYTES // (36 * x.itemsize * across * max(channels, rows)))
    step = -(-down // -(-down // step))
    reuse.next_turn()
    out = reuse.empty(images * 16 * down * across, rows, x.dtype).view(images, down, 4, across, 4, rows)

    @functools.cache
    def scratch(count: int) -> tuple[torch.Tensor, ...]:
        """For a band of so many rows of tiles; the last two of each transform are what it keeps to itself."""
        tall = x.new_empty(8, count, 4 * across + 2, channels)
        whole = x.new_empty(8, 6, count, across, channels)
        products, halves = x.new_empty(36, count * across, rows), x.new_empty(8, 6, count, across, rows)
        padded = x.new_zeros(4 * count + 2, 4 * across + 2, channels)
        return padded, tall, whole, products, halves, x.new_empty(4, 4, count, across, rows)

    for image in range(images):
        for first in range(0, down, step):
            count = min(step, down - first)
            band, tall, whole, products, halves, kept = scratch(count)
            _fill(band, channels_last[image], 4 * first - 1)
            _transform([band[i : i + 4 * count - 3 : 4] for i in range(6)], tall)
            _transform([tall[:6, :, j : j + 4 * across - 3 : 4] for j in range(6)], whole)
            torch.bmm(whole[:6].view(36, count * across, channels), points, out=products)
            _gather(products.view(6, 6, count, across, rows), halves[:4], halves[4:])
            tiles = out[image, first : first + count].permute(1, 3, 0, 2, 4)
            _gather(halves[:4].transpose(0, 1), tiles, kept)
            if bias is not None:
                tiles += bias
    return out.view(images, 4 * down, 4 * across, rows)[:, :height, :width].permute(0, 3, 1, 2)


def _fill(band: torch.Tensor, x: torch.Tensor, top: int) -> None:
    """band [n, w, C] = rows top .. top+n-1 of x [H, W, C] from its second column on; zeros outside of x."""
    lo, hi = max(top, 0), min(top + len(band), len(x))
    band[: lo - top] = 0
    band[lo - top : hi - top, 1 : x.shape[1] + 1] = x[lo:hi]
    band[hi - top :] = 0


def _transform(d: Sequence[torch.Tensor], v: torch.Tensor) -> None:
    """v[:6] = B^T d; v[6] and v[7] are written too."""
    even, odd = v[6], v[7]
    torch.add(d[4], d[0], alpha=4, out=v[0]).sub_(d[2], alpha=5)
    torch.add(d[5], d[1], alpha=4, out=v[5]).sub_(d[3], alpha=5)
    torch.sub(d[4], d[2], alpha=4, out=even)
    torch.sub(d[3], d[1], alpha=4, out=odd)
    torch.add(even, odd, out=v[1])
    torch.sub(even, odd, out=v[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=v[3])
    torch.sub(even, odd, alpha=2, out=v[4])


def _gather(m: Sequence[torch.Tensor], y: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> None:
    """y = A^T m; the four of `kept` are written too."""
    near, far = torch.add(m[1], m[2], out=kept[0]), torch.add(m[3], m[4], out=kept[1])
    torch.add(m[0], near, out=y[0]).add_(far)
    torch.add(near, far, alpha=4, out=y[2])
    near, far = torch.sub(m[1], m[2], out=kept[2]), torch.sub(m[3], m[4], out=kept[3])
    torch.add(near, far, alpha=2, out=y[1])
    torch.add(m[5], near, out=y[3]).add_(far, alpha=8)
