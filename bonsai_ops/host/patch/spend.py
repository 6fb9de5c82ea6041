"""Which layers get more bits when the whole model may have a given size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ...quantize import Quantized, Statistics, budget
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
    """Gives layers 4 or 8 bits or keeps them, as far as the target allows, where that takes away most error for a byte.

    other: the tensors that are no linear weight. begin is called before a layer is quantized. Returns a line for the
    report.
    """
    chosen = {layer.name: layer for layer in layers if layer.kept is None}
    finer = {s.scheme: s for s in options.finer}
    for layer in chosen.values():
        layer.options = [_option(layer.form, layer.made)]
        for settings in finer.values():
            begin(layer)
            made = quantized(source, layer, settings, statistics.get(layer.name), device)
            layer.options.append(_option(settings.scheme, made))
        layer.options.append(budget.Option(KEPT, stored_bytes(source, layer), 0.0))
    fixed = sum(t.nbytes for t in other.values()) + sum(stored_bytes(source, x) for x in layers if x.kept is not None)
    given = budget.choose({name: layer.options for name, layer in chosen.items()}, options.target_bytes - fixed)
    for name, option in given.items():
        layer = chosen[name]
        if option.name == KEPT:
            layer.made, layer.kept = None, "room for it within the target size"
        elif option.name != layer.form:
            layer.made = quantized(source, layer, finer[option.name], statistics.get(name), device)
            layer.form = option.name
    size = fixed + sum(option.nbytes for option in given.values())
    names = [option.name for option in given.values()]
    counts = ", ".join(f"{names.count(n)} {n}" for n in (options.scheme, *finer, KEPT))
    reached = "reached" if size <= options.target_bytes else "not reachable, this is the smallest"
    return f"target {options.target_bytes / 1e6:.1f} MB {reached}: {size / 1e6:.1f} MB ({counts})"


def _option(form: str, made: Quantized) -> budget.Option:
    """Weighed by the squared relative error: of the outputs where inputs are known, else of the weights."""
    error = made.error.relative if made.error.output is None else made.error.output
    return budget.Option(form, made.weight.nbytes, error**2)
