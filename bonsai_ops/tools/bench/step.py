"""One sampling step of the 4B model in the real host, each file in a process of its own.

Ours and the dense model in bf16 take turns, because a machine's speed changes by more than what lies between them.
Stock ComfyUI, which needs the memory of both, comes after them.

On a CPU our models attend in parts (attention.py), which has nothing to do with packing: the dense model is measured
without and with it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import session
from .inside.step import IN_PARTS
from .report import show_table
from .session import Session

WAYS = {
    "ours": "ternary pack, packed in memory",
    "dense_bf16": "dense model computing in bf16",
    "dense_bf16_parts": "the same, attention in parts",
    "stock": "stock ComfyUI, dense file",
}
SAME_MODEL = {"dense_bf16_parts": "dense_bf16"}
"""{way: the way whose process it shares}."""
TURNS = 3
"""How often each way is asked; inside/step.py times STEPS steps a turn."""


def measure(
    comfyui: Path,
    folder: Path,
    size: int,
    modes: Sequence[str] = ("exact",),
    layout: str = "compact",
    device: str = "cpu",
) -> dict:
    """Prints the table and returns {"size", "ours_s", "dense_bf16_s", "stock_s", "<way>_bytes", "<way>_peak_rss", ..}.

    Modes other than exact are further ways, such as ours_a8. <way>_s: median of <way>_seconds, those of each step.
    <way>_joules: energy of a step, None where the machine does not tell. <way>_peak_rss: of the process, None for
    dense_bf16_parts, which shares that of dense_bf16.
    """
    extra = {f"ours_{mode}": f"{WAYS['ours']}, mode {mode}" for mode in modes if mode != "exact"}
    ways = {"ours": WAYS["ours"], **extra, **WAYS}
    if device != "cpu":
        del ways["dense_bf16_parts"]
    figures: dict = {"size": size, "device": device, "layout": layout}
    rows = _in_turns(comfyui, folder, [way for way in ways if way != "stock"], TURNS, size, layout, device)
    rows |= _in_turns(comfyui, folder, ["stock"], 1, size, layout, device)
    for way, row in rows.items():
        if way in extra and row["mode"] != way.removeprefix("ours_"):
            print(f"{way}: not measured, this mode is not offered here: {row['declined']}")
            continue
        joules = [j for _, j in row["steps"] if j is not None]
        figures |= {
            f"{way}_s": statistics.median(s for s, _ in row["steps"]),
            f"{way}_seconds": [s for s, _ in row["steps"]],
            f"{way}_bytes": row["bytes"],
            f"{way}_peak_rss": None if way in SAME_MODEL else row["peak_rss"],
            f"{way}_joules": statistics.median(joules) if joules else None,
        }
    why_not = rows["stock"]["no_joules"]
    print(f"one step of the 4B model at {size}x{size}, {device}")
    show_table(
        ("way", "seconds", "of stock", "of dense bf16", "weights MB", "peak MB", "joules"),
        [
            (
                text,
                figures[f"{way}_s"],
                figures[f"{way}_s"] / figures["stock_s"],
                figures[f"{way}_s"] / figures["dense_bf16_s"],
                figures[f"{way}_bytes"] / 1e6,
                None if way in SAME_MODEL else figures[f"{way}_peak_rss"] / 1e6,
                figures[f"{way}_joules"],
            )
            for way, text in ways.items()
            if f"{way}_s" in figures
        ],
    )
    if why_not:
        print(f"no joules: {why_not}")
    return figures


def measure_lora(comfyui: Path, folder: Path, size: int, rank: int, device: str = "cpu") -> dict:
    """Prints what a LoRA on every linear layer costs a step, ours and dense; returns the seconds and ratios."""
    figures: dict = {"size": size, "rank": rank}
    rows = []
    for way in ("ours", "dense_bf16"):
        with _open(comfyui, folder, way, size, rank, "compact", device) as session:
            row = session.finish()
        cost = row["lora_seconds"] / row["seconds"]
        figures |= {f"{way}_s": row["seconds"], f"{way}_lora_s": row["lora_seconds"], f"{way}_cost": cost}
        rows.append((WAYS[way], row["seconds"], row["lora_seconds"], cost))
    print(f"a rank {rank} LoRA on every linear layer of the 4B model at {size}x{size}, seconds a step")
    show_table(("way", "without", "with", "cost"), rows)
    return figures


def _in_turns(
    comfyui: Path, folder: Path, ways: Sequence[str], turns: int, size: int, layout: str, device: str
) -> dict[str, dict]:
    """{way: its last figures, and "steps": (seconds, joules) of each step}."""
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for way in ways:  # one after another: nothing is measured while another loads
            if way not in SAME_MODEL:
                sessions[way] = stack.enter_context(_open(comfyui, folder, way, size, 0, layout, device))
                sessions[way].read()
        done: dict[str, list] = {way: [] for way in ways}
        for _ in range(turns):
            for way in ways:
                session = sessions[SAME_MODEL.get(way, way)]
                done[way] += (session.ask(IN_PARTS) if way in SAME_MODEL else session.ask())["steps"]
        last = {way: session.finish() for way, session in sessions.items()}
        return {way: {**last[SAME_MODEL.get(way, way)], "steps": done[way]} for way in ways}


def _open(comfyui: Path, folder: Path, way: str, size: int, rank: int, layout: str, device: str) -> Session:
    """One way in a fresh process, its pack written first if it is not there."""
    ours = way.startswith("ours")
    file = session.ternary_pack(folder) if ours else session.dense_file(folder)
    mode = way.removeprefix("ours").removeprefix("_") or "exact"
    options = {"mode": mode, "layout": layout} if ours else None
    return Session(
        "step", way, comfyui=comfyui, device=device, way=way, file=file, size=size, rank=rank, options=options
    )
