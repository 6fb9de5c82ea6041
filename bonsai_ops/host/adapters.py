"""What ComfyUI's Train LoRA and our Recover BitLinear put on a weight, as a branch beside the packed product.

They wrap a weight W in an adapter that they train: the layer multiplies by adapter(W). Most adapters are linear
in W and small, so that the product by adapter(W) follows from y = x W^T, and W need never be unpacked:

    LoRA    W + alpha / r * up down     y + alpha / r * (x down^T) up^T
    LoKr    W + kron(w1, w2)            y + w1 X w2^T with x as the matrix X [columns of w1, columns of w2]
    OFT     R W, R orthogonal           R y, with the adapter's own arithmetic on y^T in place of W
    ours    W + up down                 y + (x down^T) up^T

What is of low rank, the first and the last, the packed product can add itself: `low_rank`. LoHa's difference is a
product of all its values and is as large as W: it has no branch here.
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


def low_rank(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(up [N, r], down [r, K]), differentiable, if the function gives W + up down, else None."""
    if not _is_low_rank(wrapper):
        return None
    if isinstance(wrapper, Residual):
        return wrapper.up, wrapper.down
    # up is scaled, which does not begin with zero: fp16 has room for its products, not for those of a small down
    return wrapper.lora_up.weight * (wrapper.alpha / wrapper.rank), wrapper.lora_down.weight


def _is_low_rank(wrapper: Any) -> bool:
    return isinstance(wrapper, Residual) or (isinstance(wrapper, LORA) and wrapper.lora_mid is None)


def _branch(wrapper: Any) -> Branch | None:
    if _is_low_rank(wrapper):
        return functools.partial(_of_low_rank, wrapper)
    if isinstance(wrapper, LOKR) and not wrapper.use_tucker:
        return functools.partial(_lokr, wrapper)
    return functools.partial(_oft, wrapper) if isinstance(wrapper, OFT) else None


def _of_low_rank(wrapper: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    up, down = low_rank(wrapper)
    return y + torch.nn.functional.linear(torch.nn.functional.linear(x, down.to(x)), up.to(x))


def _lokr(adapter: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = adapter.w1.to(x), adapter.w2.to(x)
    inner = torch.nn.functional.linear(x.unflatten(-1, (first.shape[1], second.shape[1])), second)
    return y + (first @ inner).flatten(-2)


def _oft(adapter: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return adapter(y.reshape(-1, y.shape[-1]).t()).t().reshape(y.shape).to(y)
