"""Patches of ComfyUI on some rows of a layer: as many as there is room to unpack.

Most patches change each row of a weight by itself, so that a slice of them changes a slice of it as the whole would.
That holds for LoRAs, LoHas (both also as DoRA with a magnitude a row) and full differences; not for LoKr, OFT, a DoRA
with a magnitude a column, and what has a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import comfyui

PLAIN_LORA = comfyui.optional("comfy.weight_adapter.LoRAAdapter") or ()
LOHA = comfyui.optional("comfy.weight_adapter.LoHaAdapter") or ()
"""Classes for isinstance, () where this ComfyUI has none."""
ADAPTERS = tuple(found for found in (PLAIN_LORA, LOHA) if found)


def on_rows(patches: Sequence[tuple], shape: Sequence[int], first: int, last: int) -> list[tuple] | None:
    """ComfyUI's patches for rows first .. last - 1 of a weight of `shape` (N, K); None if one needs all rows."""
    found = []
    for strength, value, strength_model, offset, function in patches:
        rows, columns = shape
        low, high, place = first, last, offset
        if offset is not None and offset[0] == 0:
            start, rows = offset[1:]
            low, high = max(first - start, 0), min(last - start, rows)
            place = (0, start + low - first, high - low)
        elif offset is not None:
            columns = offset[2]
        part = None if function is not None else _part(value, (rows, columns), low, max(low, high))
        if part is None:
            return None
        if low < high:
            found.append((strength, part, strength_model, place, None))
    return found


def moved_to(value: Any, device: torch.device) -> Any:
    """An adapter that `on_rows` can cut with its matrices on `device`; any other value as it is."""
    if not isinstance(value, ADAPTERS) or all(t.device == device for t in value.weights if isinstance(t, torch.Tensor)):
        return value
    weights = [t.to(device) if isinstance(t, torch.Tensor) else t for t in value.weights]
    return type(value)(value.loaded_keys, tuple(weights))


def _part(value: Any, shape: tuple[int, int], low: int, high: int) -> Any:
    """Rows low .. high - 1 of a patch on a weight of `shape`; None if it has none of its own."""
    if isinstance(value, PLAIN_LORA):
        up, down, alpha, middle, magnitude, reshape = value.weights
        if middle is not None or reshape is not None or not _makes(up, down, shape):
            return None
        parts = _cut(low, high, shape[0], up, magnitude)
        return parts and type(value)(value.loaded_keys, (parts[0], down, alpha, None, parts[1], None))
    if isinstance(value, LOHA):
        up, down, alpha, up2, down2, middle, middle2, magnitude = value.weights
        plain = middle is None and middle2 is None
        if not plain or not _makes(up, down, shape) or not _makes(up2, down2, shape):
            return None
        parts = _cut(low, high, shape[0], up, up2, magnitude)
        weights = parts and (parts[0], down, alpha, parts[1], down2, None, None, parts[2])
        return weights and type(value)(value.loaded_keys, weights)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set"):
        tensor, *options = value[1]
        if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape and not options:
            return (value[0], (tensor[low:high],))
    return None


def _makes(up: torch.Tensor, down: torch.Tensor, shape: tuple[int, int]) -> bool:
    """True if up down is a matrix of `shape`."""
    rank = down.shape[0]
    return up.numel() == shape[0] * rank and len(up) == shape[0] and down.numel() == rank * shape[1]


def _cut(low: int, high: int, rows: int, *tensors: torch.Tensor | None) -> list[torch.Tensor | None] | None:
    """These rows of tensors that have `rows` of them; None if one has another number."""
    if any(tensor is not None and len(tensor) != rows for tensor in tensors):
        return None
    return [None if tensor is None else tensor[low:high] for tensor in tensors]
