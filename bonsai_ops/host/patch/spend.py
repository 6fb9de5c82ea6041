"""Which layers get more bits when the whole model may have a given size."""

from __future__ import annotations

from ...quantize import Quantized, budget
from .layers import stored_bytes
from .work import Work

KEPT = "kept"


def spend(work: Work, other_bytes: int) -> str:
    """Gives layers 4 or 8 bits or keeps them, as far as the target allows, where that takes away most error for a byte.

    other_bytes: size of the tensors that are no linear weight. Returns a line for the report.
    """
    source, options = work.source, work.options
    chosen = {layer.name: layer for layer in work.chosen}
    finer = {s.recipe: s for s in options.finer}
    for layer in chosen.values():
        layer.options = [_option(layer.recipe, layer.made)]
        for settings in finer.values():
            work.counter.begin(layer.size)
            layer.options.append(_option(settings.recipe, work.quantized(layer, settings)))
        layer.options.append(budget.Option(KEPT, stored_bytes(source, layer), 0.0))
    fixed = other_bytes + sum(stored_bytes(source, layer) for layer in work.layers if layer.kept is not None)
    given = budget.choose({name: layer.options for name, layer in chosen.items()}, options.target_bytes - fixed)
    for name, option in given.items():
        layer = chosen[name]
        if option.name == KEPT:
            layer.made, layer.kept = None, "room for it within the target size"
        elif option.name != layer.recipe:
            work.quantize(layer, finer[option.name])
    size = fixed + sum(option.nbytes for option in given.values())
    names = [option.name for option in given.values()]
    counts = ", ".join(f"{names.count(n)} {n}" for n in (options.recipe, *finer, KEPT))
    reached = "reached" if size <= options.target_bytes else "not reachable, this is the smallest"
    return f"target {options.target_bytes / 1e6:.1f} MB {reached}: {size / 1e6:.1f} MB ({counts})"


def _option(recipe: str, made: Quantized) -> budget.Option:
    """Weighed by the squared relative error: of the outputs where inputs are known, else of the weights."""
    error = made.error.relative if made.error.output is None else made.error.output
    return budget.Option(recipe, made.weight.nbytes, error**2)
