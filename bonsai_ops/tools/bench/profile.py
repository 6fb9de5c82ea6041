"""Where the time of one 4B step in the real host goes: every torch operation by kind, place and cause.

Cause: whose code asked for the operation: the plugin, ComfyUI or its comfy-kitchen.
"""

from __future__ import annotations

from pathlib import Path

from . import session
from .report import show_table

SHOWN = 25


def measure(
    comfyui: Path, folder: Path, size: int, mode: str = "exact", density: str = "compact", device: str = "cpu"
) -> dict:
    """Prints the tables; returns {"size", "mode", "step_s", "outside_s", "rows"}.

    rows: {"kind", "op", "cause", "place", "calls", "seconds", "share", "bytes"}, most expensive first. outside_s: time
    of the step outside of torch operations.
    """
    figures = session.run(
        "profile",
        "the profile",
        comfyui=comfyui,
        device=device,
        file=session.ternary_pack(folder, device),
        size=size,
        options={"mode": mode, "layout": density},
    )
    rows, total = figures["rows"], figures["step_s"]
    for row in rows:
        row["share"] = row["seconds"] / total
    print(f"one step of the 4B model at {size}x{size}, {device}, mode {mode}: {total:.2f} s, of it")
    kinds: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["kind"], row["cause"])
        kinds[key] = kinds.get(key, 0.0) + row["seconds"]
    kinds["outside of torch operations", "Python"] = figures["outside_s"]
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    show_table(
        ("kind", "cause", "seconds", "% of step"),
        [(kind, cause, seconds, 100 * seconds / total) for (kind, cause), seconds in ranked],
    )
    print(f"the {SHOWN} most expensive operations")
    show_table(
        ("kind", "operation", "cause", "place", "calls", "seconds", "% of step", "MB made"),
        [
            (
                *(row[name] for name in ("kind", "op", "cause", "place", "calls", "seconds")),
                100 * row["share"],
                row["bytes"] / 1e6,
            )
            for row in rows[:SHOWN]
        ],
    )
    return {"size": size, "mode": mode, "layout": density, "device": device, **figures}
