"""Cost against the number of tokens: the two layers of a single block, which are three quarters of a step's work."""

from __future__ import annotations

import statistics

from ... import kernels
from ...weights.packed_weight import recode
from . import layers
from .report import show_table
from .timer import make_timer, time_in_turns
from .ways import SWEEP_WAYS

TOKENS = (256, 512, 1024, 1536, 2560, 4608)
"""512 of text and an image of 0 .. 1024x1024 pixels."""
SHAPES = tuple(shape for shape in layers.SHAPES if shape.calls == 20)


def measure(device: str = "cpu", tokens: tuple[int, ...] = TOKENS, rounds: int = 3) -> list[dict]:
    """Prints the table and returns a row a number of tokens.

    m, <way>_s seconds of both products together, <way>_us_per_token, <way>_relative the cost of a token relative to
    that at the number nearest to 1536 (1 = linear), trit5_vs_bf16. Ways: bf16, trit5 and, where it is offered, a8.
    """
    timer = make_timer(device)
    rows: list[dict] = [{"m": m} for m in tokens]
    for shape in SHAPES:
        weight = layers.random_weight("ternary", shape.n, shape.k, device)
        planes = recode(weight, "crumb")
        values = weight.dequantize(layers.activations(1, 1, device).dtype)
        for row in rows:
            x = layers.activations(row["m"], shape.k, device)
            ways = {"bf16": layers.dense(x, values, timer), "trit5": layers.ours(x, weight, timer)}
            if layers.offers(x, planes, "a8") is None:
                ways["a8"] = layers.ours(x, planes, timer, "a8")
            with kernels.keeping_memory():  # as while ComfyUI samples
                found = time_in_turns(ways, timer, rounds)
            for name, seconds in found.items():
                row[f"{name}_s"] = row.get(f"{name}_s", 0.0) + statistics.median(seconds)
    names = [name for name in SWEEP_WAYS if all(f"{name}_s" in row for row in rows)]
    middle = min(rows, key=lambda row: abs(row["m"] - 1536))
    for row in rows:
        for name in names:
            row[f"{name}_us_per_token"] = 1e6 * row[f"{name}_s"] / row["m"]
            row[f"{name}_relative"] = row[f"{name}_s"] / row["m"] * middle["m"] / middle[f"{name}_s"]
        row["trit5_vs_bf16"] = row["bf16_s"] / row["trit5_s"]
    print(f"cost against tokens, both layers of a single block, {device}; relative: of a token's cost at {middle['m']}")
    show_table(
        ("tokens", *(f"{n} ms" for n in names), *(f"{n} us/token" for n in names), *(f"{n} relative" for n in names)),
        [
            (
                row["m"],
                *(1000 * row[f"{n}_s"] for n in names),
                *(row[f"{n}_us_per_token"] for n in names),
                *(row[f"{n}_relative"] for n in names),
            )
            for row in rows
        ],
    )
    return rows
