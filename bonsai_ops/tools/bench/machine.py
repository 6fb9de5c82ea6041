"""What a benchmark runs on: the machine's description, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from ... import __version__


def describe(threads: int | None = None, device: str = "cpu") -> dict[str, str | int]:
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


def show(facts: Mapping[str, object]) -> None:
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


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
