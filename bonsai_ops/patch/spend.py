"""Which layers get more bits when the whole model may have a given size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..quantize import LayerError, Settings, Statistics, budget
from .layers import Layer, quantized, stored_bytes
from .options import PatchOptions

KEPT = "kept"


def spend(
    source: object,
    layers: Sequence[Layer],
    other: Mapping[str, torch.Tensor],
    options: PatchOptions,
    statistics: Mapping[str, Statistics],
    device: torch.device,
    begin: Callable[[Layer], None],
) -> str:
    """Gives layers 4 bits, or keeps them, as far as the target allows, where that takes away most error for a byte.

    other: the tensors that are no linear weight. begin is called before a layer is quantized. Returns a line for the
    report.
    """
    four = Settings("4bit", options.group_size)
    chosen = {layer.name: layer for layer in layers if layer.kept is None}
    for layer in chosen.values():
        begin(layer)
        finer = quantized(source, layer, four, statistics.get(layer.name), device)
        layer.options = [
            budget.Option(layer.form, layer.made.weight.nbytes, _sensitivity(layer.made.error)),
            budget.Option(four.scheme, finer.weight.nbytes, _sensitivity(finer.error)),
            budget.Option(KEPT, stored_bytes(source, layer), 0.0),
        ]
    fixed = sum(t.nbytes for t in other.values()) + sum(stored_bytes(source, x) for x in layers if x.kept is not None)
    found = budget.choose({name: layer.options for name, layer in chosen.items()}, options.target_bytes - fixed)
    for name, option in found.items():
        layer = chosen[name]
        if option.name == KEPT:
            layer.made, layer.kept = None, "room for it within the target size"
        elif option.name != layer.form:
            layer.made, layer.form = quantized(source, layer, four, statistics.get(name), device), option.name
    size = fixed + sum(option.nbytes for option in found.values())
    names = [option.name for option in found.values()]
    counts = ", ".join(f"{names.count(n)} {n}" for n in dict.fromkeys((options.scheme, four.scheme, KEPT)))
    reached = "reached" if size <= options.target_bytes else "not reachable, this is the smallest"
    return f"target {options.target_bytes / 1e6:.1f} MB {reached}: {size / 1e6:.1f} MB ({counts})"


def _sensitivity(error: LayerError) -> float:
    """What the budget weighs: the squared relative error of the outputs where inputs are known, else of the weights."""
    return (error.relative if error.output is None else error.output) ** 2
