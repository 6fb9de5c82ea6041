"""What the benchmarks share: the machine's description, tables on the screen and as CSV, peak memory."""

from __future__ import annotations

import contextlib
import csv
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ... import __version__

TABLES = ("layers", "sweep", "step", "lora", "profile", "picture", "quantize")
"""Figures that --csv writes, in this order."""


def machine(threads: int | None = None, device: str = "cpu") -> dict[str, str | int]:
    """Processor or GPU, threads, system, torch and our version; sets torch's threads if given."""
    if threads:
        torch.set_num_threads(threads)
    facts: dict[str, str | int] = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else "",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bonsai_image": __version__,
    }
    return facts | _allocator() | (_gpu() if device == "cuda" else {})


def _allocator() -> dict[str, str]:
    """The memory allocator that was loaded in place of the system's, if one was (Linux)."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace") if maps.is_file() else ""
    return next(({"allocator": name} for name in ("tcmalloc", "jemalloc", "mimalloc") if f"lib{name}" in loaded), {})


def _gpu() -> dict[str, str | int]:
    """Name, capability, memory, L2 cache in bytes, toolkit, Triton; clocks where they can be read."""
    properties = torch.cuda.get_device_properties(0)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_memory": properties.total_memory,
        "gpu_l2": properties.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": version,
        "clock": gpu_clock(),
    }


def gpu_clock() -> str:
    """The GPU's clock at this moment with its temperature and power draw, or why they cannot be read."""
    try:
        clock, degrees, watts = torch.cuda.clock_rate(), torch.cuda.temperature(), torch.cuda.power_draw() / 1000
    except Exception as error:  # an absent pynvml, an old driver and a virtual GPU each raise something else
        return f"unknown ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return f"{clock} MHz, {degrees} C, {watts:.0f} W"


def show_machine(facts: Mapping[str, object]) -> None:
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int = 0, *, headed: bool = True) -> None:
    """Prints rows right-aligned under their heads; floats with three digits, very small ones as 1.2e-05, None as -.

    width: least width of a column, and headed=False to leave the heads out, for a table whose rows come one by one.
    """
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(width, *(len(text) for text in column)) for column in zip(head, *texts, strict=True)]
    for row in (head, *texts)[0 if headed else 1 :]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 5e-3 else f"{value:.3f}"
    return str(value)


def rows_of(table: object) -> list[dict]:
    """A table of the figures as rows with the same columns: a list of rows, the rows of a mapping, or it as one row.

    Nested values are spread out: {"parts": {"vae_s": 1}} becomes the column parts.vae_s.
    """
    if isinstance(table, Mapping):
        table = table.get("rows", [table])
    rows = [_flat(row) for row in table]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _flat(row: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def write_csv(file: Path, figures: Mapping[str, object]) -> list[Path]:
    """Writes the tables of TABLES that `figures` holds; returns the files.

    One table goes into `file`, several into NAME-<table>.csv beside it; the columns are the keys of the JSON.
    """
    chosen = [name for name in TABLES if figures.get(name)]
    files = []
    for name in chosen:
        target = file if len(chosen) == 1 else file.with_name(f"{file.stem}-{name}{file.suffix or '.csv'}")
        rows = rows_of(figures[name])
        with target.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        files.append(target)
    return files


def peak_rss() -> int:
    """Peak resident set of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(row for row in status.read_text(encoding="ascii").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        import psutil  # Windows: ComfyUI brings it

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Lets peak_rss count from the present resident set on; only Linux can, elsewhere nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
