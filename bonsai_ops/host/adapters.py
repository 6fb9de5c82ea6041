"""What ComfyUI's Train LoRA and our Recover BitLinear put on a weight, as a branch beside the packed product.

They wrap a weight W in an adapter that they train: the layer multiplies by adapter(W). Most adapters are linear
in W and small, so that the product by adapter(W) follows from y = x W^T, and W need never be unpacked:

    LoRA    W + alpha / r * up down     y + alpha / r * (x down^T) up^T
    LoKr    W + kron(w1, w2)            y + w1 X w2^T with x as the matrix X [columns of w1, columns of w2]
    OFT     R W, R orthogonal           R y, with the adapter's own arithmetic on y^T in place of W
    ours    W + up down                 y + (x down^T) up^T

LoHa's difference is a product of all its values and is as large as W: it has no branch here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..quantize.recover import Residual
from . import comfyui

Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [.., K], y [.., N] = x W^T) -> x adapter(W)^T, both in one dtype on one device. Differentiable."""

LORA = comfyui.optional("comfy.weight_adapter.lora.LoraDiff") or ()
LOKR = comfyui.optional("comfy.weight_adapter.lokr.LokrDiff") or ()
OFT = comfyui.optional("comfy.weight_adapter.oft.OFTDiff") or ()
"""Classes for isinstance, () where this ComfyUI has none."""


def branches(wrappers: Sequence[Callable]) -> list[Branch] | None:
    """Each of these functions of a weight as a branch, in their order; None if one of them has none."""
    found = [_branch(wrapper) for wrapper in wrappers]
    return None if None in found else found


def values_of(wrappers: Sequence[Callable]) -> int | None:
    """How many values the matrices of these branches have, as they are multiplied; None as for `branches`."""
    return None if branches(wrappers) is None else sum(_values(wrapper) for wrapper in wrappers)


@torch.no_grad()
def _values(wrapper: Any) -> int:
    if isinstance(wrapper, LOKR):
        return wrapper.w1.numel() + wrapper.w2.numel()
    return sum(parameter.numel() for parameter in wrapper.parameters())


def _branch(wrapper: Any) -> Branch | None:
    if isinstance(wrapper, Residual):
        return wrapper.beside
    if isinstance(wrapper, LORA) and wrapper.lora_mid is None:
        return functools.partial(_lora, wrapper)
    if isinstance(wrapper, LOKR) and not wrapper.use_tucker:
        return functools.partial(_lokr, wrapper)
    return functools.partial(_oft, wrapper) if isinstance(wrapper, OFT) else None


def _lora(adapter: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    down, up = adapter.lora_down.weight.to(x), adapter.lora_up.weight.to(x)
    inner = torch.nn.functional.linear(x, down) * (adapter.alpha / adapter.rank).to(x)
    return y + torch.nn.functional.linear(inner, up)


def _lokr(adapter: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = adapter.w1.to(x), adapter.w2.to(x)
    inner = torch.nn.functional.linear(x.unflatten(-1, (first.shape[1], second.shape[1])), second)
    return y + (first @ inner).flatten(-2)


def _oft(adapter: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return adapter(y.reshape(-1, y.shape[-1]).t()).t().reshape(y.shape).to(y)
