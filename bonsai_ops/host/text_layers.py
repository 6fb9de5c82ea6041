"""A text encoder's layers on a CPU: what ComfyUI computes there, in memory that stays in the cache.

The scores of all heads of 512 tokens take 34 MB and what lies within a gated product 20 MB, several times a layer, in
memory that the system has to clear first. And a short prompt is mostly padding, which no token sees: of 512 columns of
scores all but the first few are masked.

Attention stays ComfyUI's, called for some queries and the keys that one of them sees: what is masked adds nothing to
any sum. The gated product is the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

ATTENTION = "optimized_attention"
"""What ComfyUI's layers get their attention as: f(query, key, value, heads, mask=.., skip_reshape=.., ..)."""
QUERIES = 128
"""Of a part: fewer see fewer keys of a long prompt, more are fewer calls."""
BLOCK_VALUES = 1 << 18
"""Values of a gated product that one operation works on: 1 MB."""


def work_in_parts(layers: Iterable[torch.nn.Module], dtype: Callable[[torch.device], torch.dtype]) -> None:
    """Has ComfyUI's layers of a language model attend to what is seen only, and multiply by the gate in parts.

    dtype: what their linear layers multiply fp32 in on a device.
    """
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(_seeing_what_is_seen, with_kwargs=True)
        layer.mlp = GatedProduct(layer.mlp, dtype)


class GatedProduct(torch.nn.Module):
    """y = down(activation(gate(x)) up(x)) with the layers of ComfyUI's module, under their names."""

    def __init__(self, whole: torch.nn.Module, dtype: Callable[[torch.device], torch.dtype]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = whole.gate_proj, whole.up_proj, whole.down_proj
        self.activation, self.dtype = whole.activation, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [.., channels] -> y of its shape and dtype; in parts on a CPU, but for fp16 and with gradients."""
        dtype = self.dtype(x.device) if x.dtype == torch.float32 else x.dtype
        if x.device.type != "cpu" or dtype == torch.float16 or _watched(x):
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        narrow = x.to(dtype)
        gate, up = self.gate_proj(narrow), self.up_proj(narrow)
        rows, factors = gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])
        step = max(1, BLOCK_VALUES // rows.shape[1])
        for lo in range(0, len(rows), step):
            part = rows[lo : lo + step]
            part.copy_(self.activation(part.float()).mul_(factors[lo : lo + step].float()))
        return self.down_proj(gate).to(x.dtype)


def _watched(x: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)


def _seeing_what_is_seen(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if kwargs.get(ATTENTION) is not None:
        kwargs = kwargs | {ATTENTION: functools.partial(attend_to_the_seen, kwargs[ATTENTION])}
    return args, kwargs


def attend_to_the_seen(
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    skip_reshape: bool = False,
    **options: Any,
) -> torch.Tensor:
    """attention(query, key, value, heads, mask=mask, ..), QUERIES queries and the keys up to the last seen at a time.

    Query [B, heads, S, D], key and value [B, heads, K, D] with skip_reshape, mask [B or 1, .., S, K] a number that is
    added to the scores; result [B, S, heads D]. On another device than a CPU, without such a mask, where a query sees
    nothing, with other options than grouped heads and where gradients are wanted it is called once, for all.
    """
    whole = functools.partial(attention, query, key, value, heads, mask=mask, skip_reshape=skip_reshape, **options)
    tokens = query.shape[-2]
    if query.device.type != "cpu" or not skip_reshape or options.keys() - {"enable_gqa"} or _watched(query):
        return whole()
    if mask is None or mask.ndim < 3 or not mask.dtype.is_floating_point or mask.shape[-2] != tokens:
        return whole()
    ends = _last_seen(mask)
    if ends is None:
        return whole()
    parts = []
    for first in range(0, tokens, QUERIES):
        rows = slice(first, first + QUERIES)
        keys = slice(max(ends[rows]))
        seen = mask[..., rows, keys]
        parts.append(
            attention(
                query[:, :, rows], key[:, :, keys], value[:, :, keys], heads, mask=seen, skip_reshape=True, **options
            )
        )
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _last_seen(mask: torch.Tensor) -> list[int] | None:
    """The number of keys up to the last that a query sees in any batch and head; None if one sees none somewhere."""
    seen = mask > torch.finfo(mask.dtype).min / 8  # ComfyUI hides with a quarter of it, and with -inf
    if not bool(seen.any(-1).all()):
        return None
    order = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return (seen.flatten(0, -3).any(0) * order).amax(-1).tolist()
