"""ComfyUI's attention on a CPU, a few heads and queries at a time.

What ComfyUI computes with there, `attention_sub_quad`, writes the scores of all heads and their softmax before it goes
on: 113 MB each for the 4B model at 512x512, 1 GB at 1024x1024, in each of its 25 layers, in memory that the system has
to clear first. Part after part, each by the same function, the scores stay in the cache, in memory that the C library
keeps. Rows of scores do not depend on each other: the result is the same to the bit.

Where gradients are wanted the same function keeps the scores of all heads for the backward pass, several times over.
PyTorch's own attention keeps a number a row instead and computes the scores again. It rounds elsewhere.

It is chosen through ComfyUI's own hook, `transformer_options["optimized_attention_override"]`, and leaves alone
whatever else stands there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch

from . import comfyui

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

OVERRIDE = "optimized_attention_override"
_WRAPPED = comfyui.optional("comfy.ldm.modules.attention.attention_sub_quad")
SUB_QUADRATIC = None if _WRAPPED is None else inspect.unwrap(_WRAPPED)
"""ComfyUI's function; None if this version has none, and its attention stays as it is."""
SCORE_BYTES = 8_000_000
"""Bound on the scores of one part. From 6 to 24 MB the speed is the same; above 32 MB the C library gives the memory
back."""
LEAST_QUERIES = 64
"""Queries of a part at least, whatever SCORE_BYTES says. With fewer, a matrix library may round elsewhere."""


def attend_in_parts(patcher: ModelPatcher) -> None:
    """Lets a ModelPatcher whose model computes on a CPU attend in parts; clones inherit it with its options."""
    if SUB_QUADRATIC is not None and comfy.model_management.is_device_cpu(patcher.load_device):
        patcher.model_options.setdefault("transformer_options", {}).setdefault(OVERRIDE, in_parts)


def in_parts(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """function(query, key, value, heads, ..), with ComfyUI's arguments; in parts if it is sub-quadratic.

    Query, key and value [B, heads, tokens, D] with skip_reshape, [B, tokens, heads D] or [B, tokens, heads, D] without;
    result [B, tokens, heads D]. On another device than a CPU, with a mask, grouped heads or skip_output_reshape it is
    called once, as every other function is. Where gradients are wanted PyTorch's attention takes its place.
    """
    return _in_parts(*args, **kwargs) if function is SUB_QUADRATIC else function(*args, **kwargs)


def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> torch.Tensor:
    def whole() -> torch.Tensor:
        return SUB_QUADRATIC(
            query, key, value, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **options
        )

    if query.device.type != "cpu" or mask is not None or skip_output_reshape or options.get("enable_gqa"):
        return whole()
    q, k, v = (query, key, value) if skip_reshape else (_by_head(t, heads) for t in (query, key, value))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=options.get("scale"))
        return out.transpose(1, 2).flatten(2)
    batch, _, tokens, _ = q.shape
    most = max(1, SCORE_BYTES // (batch * k.shape[2] * q.dtype.itemsize))
    if most >= heads * tokens:
        return whole()
    head_step = max(1, most // tokens)
    turns = max(1, min(-(-tokens // most), tokens // LEAST_QUERIES))
    width = v.shape[3]
    out = q.new_empty(batch, tokens, heads * width)
    for head in range(0, heads, head_step):
        some = slice(head, min(head + head_step, heads))
        count = some.stop - some.start
        columns = slice(some.start * width, some.stop * width)
        for turn in range(turns):
            rows = slice(tokens * turn // turns, tokens * (turn + 1) // turns)
            out[:, rows, columns] = SUB_QUADRATIC(
                q[:, some, rows], k[:, some], v[:, some], count, None, attn_precision, True, **options
            )
    return out


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, tokens, heads D], or [B, tokens, heads, D] as SD3 has values, as [B, heads, tokens, D]."""
    return tensor.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
