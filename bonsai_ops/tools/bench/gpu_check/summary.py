"""summary.md: the run on one page, to be posted. The figures of results.json, each beside its rival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .goals import Figures, outcomes
from .results import RUN

FACTS = ("gpu", "driver", "torch", "cuda", "triton", "comfyui", "bonsai_image", "commit", "system", "date")
PROCESSES = ("dynamic", "classic")
REACHED = {True: "pass", False: "FAIL", None: "-"}
MOST_FAULTS = 20
MOST_CHARACTERS = 160


def page(figures: Figures) -> str:
    """Markdown: the machine, the goals, the layers, the steps, what went wrong."""
    run = figures.get(RUN, {})
    facts = ", ".join(f"{name} {run[name]}" for name in FACTS if name in run)
    if run.get("device") == "cpu":
        facts = f"**a dry run on a CPU, tiny sizes: no figure of it means anything**; {facts}"
    goals = [(o.text, o.wanted, o.found, REACHED[o.reached]) for o in outcomes(figures)]
    parts = [
        "# Bonsai Image on a GPU",
        facts,
        "## Goals",
        _table(("", "wanted", "found", ""), goals),
        *_layers(figures.get("speed", {})),
        *_steps(figures),
        "## What went wrong",
        "\n".join(f"- {fault}" for fault in _faults(figures)) or "nothing",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _layers(speed: Mapping[str, Any]) -> Iterator[str]:
    """A row for each way, a column for each number of tokens: milliseconds, and the speed of dense bf16."""
    steps = {key.removesuffix(" step_ms"): value for key, value in speed.items() if key.endswith(" step_ms")}
    steps = dict(sorted(steps.items(), key=lambda item: int(item[0][1:])))
    if not steps:
        return
    yield "## All packed layers of a step: ms, and how many times as fast as dense bf16"
    ways = dict.fromkeys(way for row in steps.values() for way in row)
    rows = []
    for way in ways:
        cells = []
        for row in steps.values():
            ms, dense = row.get(way), row["bf16"]
            cells.append("-" if ms is None else f"{ms:.2f}" if way == "bf16" else f"{ms:.2f} ({_times(dense, ms)})")
        rows.append((way, *cells))
    yield _table(("way", *(f"{name[1:]} tokens" for name in steps)), rows)


def _steps(figures: Figures) -> Iterator[str]:
    rows = []
    for process in PROCESSES:
        found = {key: value for key, value in figures.get(process, {}).items() if _is_step(value)}
        for key, value in found.items():
            name, _, size = key.rpartition(" ")
            rival = "dense lora" if "lora" in name else "dense"
            dense = found.get(f"{rival} {size}", {}).get("step_s")
            times = _times(dense, value["step_s"]) if dense and name != rival else "-"
            mb = (value.get("device_peak_mb"), value.get("torch_peak_mb"))
            seconds = (f"{value['step_s']:.4f}", times, f"{value['first_s']:.1f}")
            rows.append((process, name, size, *seconds, *("-" if x is None else str(x) for x in mb)))
    if rows:
        yield "## A step of the 4B model in ComfyUI"
        head = ("memory", "way", "size", "s", "times dense", "first s", "device peak MB", "by torch")
        yield _table(head, rows)


def _times(dense: float, ours: float) -> str:
    return f"{dense / ours:.2f}x" if ours else "-"


def _is_step(value: Any) -> bool:
    return isinstance(value, Mapping) and "step_s" in value and "first_s" in value


def _faults(figures: Figures) -> list[str]:
    """Processes that did not come to their end, what failed inside of one, wrong kernels."""
    found = []
    for process, values in figures.items():
        if process == RUN or not isinstance(values, Mapping):
            continue
        if values.get("ended") != "ok":
            found.append(f"{process}: {values.get('ended')}")
        found += [f"{process}: {key}: {value}" for key, value in values.items() if key.endswith(" FAILED")]
        found += [f"{process}: wrong: {' '.join(map(str, case))}" for case in values.get("bad", ())]
        found += [f"{process}: its log has {words!r} {n} times" for words, n in values.get("warnings", {}).items()]
    more = [f"and {len(found) - MOST_FAULTS} more in results.json"] if len(found) > MOST_FAULTS else []
    return [fault[:MOST_CHARACTERS] for fault in found[:MOST_FAULTS]] + more


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
