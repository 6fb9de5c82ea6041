"""What the benchmarks share: the machine's description, timing in turns, a table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .. import __version__


def machine(threads: int | None = None) -> dict[str, str | int]:
    """Processor, threads, system, torch and our version; sets torch's threads if given."""
    if threads:
        torch.set_num_threads(threads)
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else "",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bonsai_image": __version__,
    }


def show_machine(facts: Mapping[str, object]) -> None:
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def time_in_turns(runs: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """{name: median seconds}, each run once to warm up and then `rounds` times in turn, so that drift hits all."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows right-aligned under their heads; floats with three digits."""
    texts = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(head, *texts, strict=True)]
    for row in (head, *texts):
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)


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
