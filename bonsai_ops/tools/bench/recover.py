"""What Recover BitLinear takes for the 4B model in the real host, each size in a process of its own.

The model is synthetic, random bf16 weights of the real shapes: time and memory are those of the real one, the errors
are not. The fewest points are done and the whole run at the node's defaults is reckoned from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import session
from .report import show_table

POINTS, STEPS, BATCH, LOOKS, HELD_OUT = 320, 200, 8, 11, 8
"""The node's defaults: points sampled, steps of training and points in each, looks at one in HELD_OUT of the points."""


def measure(
    comfyui: Path,
    folder: Path,
    sizes: Sequence[int],
    rank: int = 32,
    device: str = "cpu",
    recipe: str = "ternary",
) -> list[dict]:
    """Prints a row a size as it is done; returns [{"size", "sampled_s", "trained_s", "looked_s", "peak", "hours", ..}].

    Seconds of a point: sampled_s of the dense model's step, trained_s of a step of training on it, looked_s of a look
    at it if it is held out. peak: bytes, of the process or on a GPU of its device, from the dense model's first step
    on; on a CPU the dense model is in it, 7.75 GB. hours: of the whole run, reckoned.
    """
    file = session.dense_file(folder, device)
    print(f"recovering rank {rank} residuals of a {recipe} 4B model, {device}", flush=True)
    head = ("size", "dtype", "s sampled", "s trained", "s looked", "peak MB", "residual MB", "hours")
    rows: list[dict] = []
    for size in sizes:
        figures = session.run(
            "recover",
            f"recovering at {size}",
            comfyui=comfyui,
            device=device,
            file=file,
            size=size,
            rank=rank,
            recipe=recipe,
        )
        rows.append({"size": size, "device": device, "rank": rank, **figures, "hours": hours(figures)})
        row = rows[-1]
        shown = (
            *(size, row["dtype"], row["sampled_s"], row["trained_s"], row["looked_s"]),
            *(row["peak"] / 1e6, row["residual_bytes"] / 1e6, row["hours"]),
        )
        show_table(head, [shown], width=12, headed=len(rows) == 1)
    return rows


def hours(figures: dict) -> float:
    """Of a run at the node's defaults, from seconds of a point."""
    looked = LOOKS * (POINTS // HELD_OUT) * figures["looked_s"]
    return (POINTS * figures["sampled_s"] + STEPS * BATCH * figures["trained_s"] + looked) / 3600
