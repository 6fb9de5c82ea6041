"""Cost against tokens and pictures at a time: both layers of a single block, three quarters of a step's work."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ... import kernels
from ...weights.packed_weight import recode
from . import layers
from .report import show_table
from .timer import make_timer, time_in_turns
from .ways import SWEEP_WAYS

TOKENS = (256, 512, 1024, 1536, 2560, 4608)
"""512 of text and an image of 0 .. 1024x1024 pixels."""
CASES = (*((1, m) for m in TOKENS), (2, 256), (3, 256), (4, 256), (4, 1536))
"""(batch, tokens of each picture of it)."""
SHAPES = tuple(shape for shape in layers.SHAPES if shape.calls == 20)


def measure(
    device: str = "cpu", rounds: int = 3, clock: str = "wall", cases: Sequence[tuple[int, int]] = CASES
) -> list[dict]:
    """Prints the table and returns a row for each (batch, tokens).

    batch, m tokens of each picture, <way>_s seconds of both products together, <way>_us_per_token, <way>_relative the
    cost of a token relative to that of one picture nearest to 1536 (1 = linear), <way>_vs_bf16 the speed relative to
    dense bf16. Ways: bf16, trit5 and, where it is offered, a8. clock: of timer.CLOCKS, what a CPU is timed by.
    """
    timer = make_timer(device, clock)
    rows: list[dict] = [{"batch": batch, "m": m} for batch, m in cases]
    for shape in SHAPES:
        weight = layers.random_weight("ternary", shape.n, shape.k, device)
        planes = recode(weight, "crumb")
        values = weight.dequantize(layers.activations(1, 1, device).dtype)
        for row in rows:
            x = layers.activations(row["batch"] * row["m"], shape.k, device).unflatten(0, (row["batch"], row["m"]))
            ways = {"bf16": layers.dense(x, values, timer), "trit5": layers.ours(x, weight, timer)}
            if layers.offers(x, planes, "a8") is None:
                ways["a8"] = layers.ours(x, planes, timer, "a8")
            with kernels.keeping_memory():  # as while ComfyUI samples
                found = time_in_turns(ways, timer, rounds)
            for name, seconds in found.items():
                row[f"{name}_s"] = row.get(f"{name}_s", 0.0) + statistics.median(seconds)
    names = [name for name in SWEEP_WAYS if all(f"{name}_s" in row for row in rows)]
    for row in rows:
        for name in names:
            row[f"{name}_us_per_token"] = 1e6 * row[f"{name}_s"] / (row["batch"] * row["m"])
            row[f"{name}_vs_bf16"] = row["bf16_s"] / row[f"{name}_s"]
    middle = min(rows, key=lambda row: (row["batch"], abs(row["m"] - 1536)))
    for row in rows:
        row |= {f"{n}_relative": row[f"{n}_us_per_token"] / middle[f"{n}_us_per_token"] for n in names}
    note = f"{device}, {clock} time; relative: of a token's cost at {middle['m']}; vs bf16: 2 = twice as fast"
    _show(rows, names, note)
    return rows


def _show(rows: Sequence[dict], names: Sequence[str], note: str) -> None:
    print(f"cost against tokens, both layers of a single block, {note}")
    show_table(
        (
            *("batch", "tokens", *(f"{n} ms" for n in names), *(f"{n} us/token" for n in names)),
            *(*(f"{n} relative" for n in names), *(f"{n} vs bf16" for n in names if n != "bf16")),
        ),
        [
            (
                *(row["batch"], row["m"], *(1000 * row[f"{n}_s"] for n in names)),
                *(row[f"{n}_{what}"] for what in ("us_per_token", "relative") for n in names),
                *(row[f"{n}_vs_bf16"] for n in names if n != "bf16"),
            )
            for row in rows
        ],
    )
