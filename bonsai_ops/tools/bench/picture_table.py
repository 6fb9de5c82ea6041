"""What the pictures of a benchmark say: medians, how far they lie apart, ratios, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .energy import per_hour
from .report import show_table
from .sdcpp import PARTS
from .ways import PROGRAMS

if TYPE_CHECKING:
    from .picture import Program

LABELS = {way.name: way.label for way in PROGRAMS}
OURS = {way.name for way in PROGRAMS if way.ours}
COMPARED = {"total_s": "without loading", "whole_s": "from start to PNG"}
SECONDS = {
    "load_s": "loading, s",
    "text_encoder_s": "text encoder, s",
    "steps_s": "steps, s",
    "vae_s": "VAE decode, s",
    "total_s": "these three without loading, s",
    "rest_s": "start, PNG and end of the process, s",
    "whole_s": "whole process, start to PNG, s",
}
LINES = {
    **SECONDS,
    "processor_s": "processor seconds of it",
    "load_processor_s": "of loading",
    "text_encoder_processor_s": "of the text encoder",
    "steps_processor_s": "of the steps",
    "vae_processor_s": "of VAE decode",
    "peak_bytes": "peak memory, GB",
    "own_peak_bytes": "of it not pages of files, GB",
    "load_peak_bytes": "peak while loading, GB",
    "text_encoder_peak_bytes": "of the text encoder, GB",
    "steps_peak_bytes": "of the steps, GB",
    "vae_peak_bytes": "of VAE decode, GB",
    "joules": "joules",
    "pictures_per_hour": "pictures an hour, a process each",
    "pictures_per_hour_per_gb": "and GB of peak memory",
    "loaded_per_hour": "pictures an hour, loaded before",
    "loaded_per_hour_per_gb": "and GB of peak memory",
}
"""{key of a row: how the tables call it}."""


def with_totals(row: dict) -> dict:
    """`row` with what follows: pictures an hour and, where the program tells its parts, total_s, rest_s and more.

    total_s: the parts without loading. rest_s: what of whole_s is no part and no loading.
    """
    row = {**row, **per_hour("pictures_per_hour", row["whole_s"], row["peak_bytes"])}
    if "load_s" not in row:
        return row
    total = sum(row[part] for part in PARTS)
    rest = row["whole_s"] - total - row["load_s"]
    return {**row, "total_s": total, "rest_s": rest, **per_hour("loaded_per_hour", total, row["peak_bytes"])}


def summary(pictures: Sequence[tuple[Program, int, dict]]) -> dict:
    """{name: medians, "spread", "ratios", "rows"} of (program, number of the run, row) of each picture.

    medians: with "width", "height", "pictures" (how many) and "source". spread: {name: {key: [least, most]}}. ratios:
    {name of ours: {name of a rival: {key of COMPARED: {"median": that of ours by that of the rival, "least", "most": of
    the runs that have both}}}}, for pictures of the same size. rows: every picture, with "program" and "run".
    """
    programs = {program.name: program for program, _, _ in pictures}
    runs = {name: {run: row for program, run, row in pictures if program.name == name} for name in programs}
    figures: dict = {}
    for name, program in programs.items():
        width, height = program.size
        known = {"width": width, "height": height, "pictures": len(runs[name]), "source": program.source}
        figures[name] = {**median(list(runs[name].values())), **known}
    spreads = {name: spread(list(rows.values())) for name, rows in runs.items()}
    ratios = {
        ours: {
            rival: ratios_of(runs[ours], runs[rival])
            for rival in programs
            if rival not in OURS and programs[rival].size == programs[ours].size
        }
        for ours in programs
        if ours in OURS and not programs[ours].once
    }
    rows = [{"program": program.name, "run": run, **row} for program, run, row in pictures]
    return {**figures, "spread": spreads, "ratios": ratios, "rows": rows}


def median(rows: Sequence[dict]) -> dict:
    """The row of medians, lists of numbers element by element; what is no number as the first row has it."""
    found: dict = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, list):
            found[key] = [statistics.median(parts) for parts in zip(*values, strict=True)]
        else:
            found[key] = statistics.median(values) if _numbers(values) else first
    return found


def spread(rows: Sequence[dict]) -> dict[str, list[float]]:
    """{key: [least, most]} of what is a number in every row."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: [min(values), max(values)] for key, values in columns.items() if _numbers(values)}


def _numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def ratios_of(ours: Mapping[int, dict], rival: Mapping[int, dict]) -> dict[str, dict[str, float]]:
    """{key of COMPARED: {"median", "least", "most"}} of rows by the number of their run; what both tell."""
    found = {}
    for key in COMPARED:
        if not all(key in row for row in (*ours.values(), *rival.values())):
            continue
        turns = [ours[run][key] / rival[run][key] for run in ours.keys() & rival.keys()]
        medians = [statistics.median(row[key] for row in rows.values()) for rows in (ours, rival)]
        found[key] = {"median": medians[0] / medians[1], "least": min(turns), "most": max(turns)}
    return found


def said(row: Mapping[str, object]) -> str:
    """The seconds of a picture in one line."""
    return ", ".join(f"{text} {row[key]:.1f}" for key, text in SECONDS.items() if key in row)


def show(figures: Mapping) -> None:
    """Prints a table for each size, a column for each program, and under it the ratios to the rivals of that size.

    Where there were several runs the least and the most stand in brackets.
    """
    names = [way.name for way in PROGRAMS if way.name in figures]
    for size in dict.fromkeys((figures[name]["width"], figures[name]["height"]) for name in names):
        columns = [name for name in names if (figures[name]["width"], figures[name]["height"]) == size]
        print(f"one picture of {size[0]}x{size[1]}, {figures['steps']} steps, median of {figures['runs']}")
        show_table(
            ("", *(LABELS[name] for name in columns)),
            [
                (text, *(_cell(figures, name, key) for name in columns))
                for key, text in LINES.items()
                if any(figures[name].get(key) is not None for name in columns)
            ],
        )
        for name in columns:
            if figures[name]["pictures"] != figures["runs"]:
                print(f"{LABELS[name]}: pictures {figures[name]['pictures']}")
            for rival, found in figures["ratios"].get(name, {}).items():
                shares = (f"{_ratio(found[key])} {text}" for key, text in COMPARED.items() if key in found)
                print(f"{LABELS[name]} takes of the time of {LABELS[rival]}: {', '.join(shares)}")
    if why_not := figures[names[0]]["no_joules"]:
        print(f"no joules: {why_not}")
    if all(name in OURS for name in names):
        print("--rivals measures other programs beside it, --sdcpp PATH your own stable-diffusion.cpp")


def _cell(figures: Mapping, name: str, key: str) -> str | None:
    value = figures[name].get(key)
    if value is None:
        return None
    scale = 1e-9 if key.endswith("_bytes") else 1
    text, ends = _number(value * scale), figures["spread"][name][key]
    return text if figures[name]["pictures"] == 1 else f"{text} ({_number(ends[0] * scale)}-{_number(ends[1] * scale)})"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _ratio(found: Mapping[str, float]) -> str:
    ends = found["least"], found["most"]
    return f"{found['median']:.3f}" + (f" ({ends[0]:.3f}-{ends[1]:.3f})" if ends[0] != ends[1] else "")
