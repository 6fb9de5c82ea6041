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

from ... import kernels
from . import session
from .inside.step import IN_PARTS
from .report import show_table
from .session import Session
from .ways import STEP_WAYS, StepWay, check_modes, named

TURNS = 3
"""How often each way is asked; inside/step.py times STEPS steps a turn."""


def measure(
    comfyui: Path,
    folder: Path,
    size: int,
    modes: Sequence[str] = ("exact",),
    density: str = "compact",
    device: str = "cpu",
) -> dict:
    """Prints the table and returns {"size", "ours_s", "dense_bf16_s", "stock_s", "<way>_bytes", "<way>_peak_rss", ..}.

    Modes other than exact are further ways, such as ours_a8. <way>_s: median of <way>_seconds, those of each step.
    <way>_joules: energy of a step, None where the machine does not tell. <way>_peak_rss: of the process, None for
    dense_bf16_parts, which shares that of dense_bf16; on a GPU what the device held at most beyond what it held before.
    <way>_torch_peak: what torch's allocator counted of it. dynamic: whether ComfyUI had dynamic VRAM.
    """
    check_modes(modes)
    ways = [way for way in STEP_WAYS if way.mode in (kernels.EXACT, *modes) and (device == "cpu" or not way.shares)]
    figures: dict = {"size": size, "device": device, "layout": density}
    rows = _in_turns(comfyui, folder, [way for way in ways if way.model != "stock"], TURNS, size, density, device)
    rows |= _in_turns(comfyui, folder, [way for way in ways if way.model == "stock"], 1, size, density, device)
    for way, row in rows.items():
        if way.ours and row["mode"] != way.mode:
            print(f"{way.name}: not measured, this mode is not offered here: {row['declined']}")
            continue
        joules = [j for _, j in row["steps"] if j is not None]
        figures |= {
            f"{way.name}_s": statistics.median(s for s, _ in row["steps"]),
            f"{way.name}_seconds": [s for s, _ in row["steps"]],
            f"{way.name}_bytes": row["bytes"],
            f"{way.name}_peak_rss": None if way.shares else row["peak"],
            f"{way.name}_torch_peak": None if way.shares else row["torch_peak"],
            f"{way.name}_joules": statistics.median(joules) if joules else None,
        }
    figures["dynamic"] = rows[ways[0]]["dynamic"]
    _show(figures, ways)
    if why_not := rows[ways[-1]]["no_joules"]:
        print(f"no joules: {why_not}")
    return figures


def _show(figures: dict, ways: Sequence[StepWay]) -> None:
    """Prints the row of each way that was measured."""
    print(f"one step of the 4B model at {figures['size']}x{figures['size']}, {figures['device']}")
    torchs = () if figures["device"] == "cpu" else ("by torch",)
    show_table(
        ("way", "seconds", "of stock", "of dense bf16", "weights MB", "peak MB", *torchs, "joules"),
        [
            (
                way.text,
                figures[f"{way.name}_s"],
                figures[f"{way.name}_s"] / figures["stock_s"],
                figures[f"{way.name}_s"] / figures["dense_bf16_s"],
                figures[f"{way.name}_bytes"] / 1e6,
                None if way.shares else figures[f"{way.name}_peak_rss"] / 1e6,
                *(figures[f"{way.name}_torch_peak"] / 1e6 for _ in torchs),
                figures[f"{way.name}_joules"],
            )
            for way in ways
            if f"{way.name}_s" in figures
        ],
    )


def measure_lora(comfyui: Path, folder: Path, size: int, rank: int, device: str = "cpu") -> dict:
    """Prints what a LoRA on every linear layer costs a step, ours and dense; returns the seconds and ratios."""
    figures: dict = {"size": size, "rank": rank}
    rows = []
    for way in (named(STEP_WAYS, "ours"), named(STEP_WAYS, "dense_bf16")):
        with _open(comfyui, folder, way, size, rank, "compact", device) as child:
            row = child.finish()
        cost = row["lora_seconds"] / row["seconds"]
        figures |= {
            f"{way.name}_s": row["seconds"],
            f"{way.name}_lora_s": row["lora_seconds"],
            f"{way.name}_cost": cost,
        }
        rows.append((way.text, row["seconds"], row["lora_seconds"], cost))
    print(f"a rank {rank} LoRA on every linear layer of the 4B model at {size}x{size}, seconds a step")
    show_table(("way", "without", "with", "cost"), rows)
    return figures


def _in_turns(
    comfyui: Path, folder: Path, ways: Sequence[StepWay], turns: int, size: int, density: str, device: str
) -> dict[StepWay, dict]:
    """{way: its last figures, and "steps": (seconds, joules) of each step}."""
    with contextlib.ExitStack() as stack:
        children: dict[str, Session] = {}
        for way in ways:  # one after another: nothing is measured while another loads
            if not way.shares:
                children[way.name] = stack.enter_context(_open(comfyui, folder, way, size, 0, density, device))
                children[way.name].read()
        done: dict[StepWay, list] = {way: [] for way in ways}
        for _ in range(turns):
            for way in ways:
                child = children[way.shares or way.name]
                done[way] += (child.ask(IN_PARTS) if way.shares else child.ask())["steps"]
        last = {name: child.finish() for name, child in children.items()}
        return {way: {**last[way.shares or way.name], "steps": done[way]} for way in ways}


def _open(comfyui: Path, folder: Path, way: StepWay, size: int, rank: int, density: str, device: str) -> Session:
    """One way in a fresh process, its pack written first if it is not there."""
    return Session(
        "step",
        way.name,
        comfyui=comfyui,
        device=device,
        model=way.model,
        file=session.ternary_pack(folder, device) if way.ours else session.dense_file(folder, device),
        size=size,
        rank=rank,
        options={"mode": way.mode, "layout": density} if way.ours else None,
    )
