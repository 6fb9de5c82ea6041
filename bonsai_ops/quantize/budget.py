"""Which layers keep more bits when the whole model may have a given size.

Every layer offers the few-bit form and dearer ones, each with its bytes and its error. Starting from the smallest, the
step that takes away the most error for a byte is taken until none fits any more. Between steps on a layer's lower
convex hull this greedy order is optimal for every size that it passes through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One form of a layer: its name, its size in bytes, its squared error (in one unit for all layers)."""

    name: str
    nbytes: int
    error: float


def choose(layers: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """{layer: the option it gets}: total size at most `budget`, or every layer's smallest where that is larger yet.

    Deterministic: ties go to the layer that comes first.
    """
    hulls = {layer: _hull(options) for layer, options in layers.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].nbytes for hull in hulls.values())
    steps = [
        ((hull[i].error - hull[i + 1].error) / (hull[i + 1].nbytes - hull[i].nbytes), layer, i)
        for layer, hull in hulls.items()
        for i in range(len(hull) - 1)
    ]
    for _, layer, i in sorted(steps, key=lambda step: -step[0]):
        cost = hulls[layer][i + 1].nbytes - hulls[layer][i].nbytes
        if position[layer] == i and cost <= left:
            position[layer], left = i + 1, left - cost
    return {layer: hull[position[layer]] for layer, hull in hulls.items()}


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over size, smallest first; dearer ones that gain nothing drop."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.error - b.error) / (b.nbytes - a.nbytes) if b.nbytes > a.nbytes else float("inf")
