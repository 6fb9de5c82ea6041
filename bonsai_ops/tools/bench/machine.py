"""What a benchmark runs on: the machine's description, and the peak memory of this process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from ... import __version__
from ..environment import PLUGIN


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
        "commit": revision(),
    }
    return facts | _allocator() | (_gpu() if device == "cuda" else {})


def revision(folder: Path = PLUGIN) -> str:
    """The commit of the plugin's checkout, with a + if files differ from it.

    Without one, as in a published archive: "sources" and the first digits of the SHA-256 of bonsai_ops' Python files,
    their names and contents in the order of the names.
    """
    top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=10", "HEAD")
    if not top or Path(top).resolve() != folder.resolve() or not commit:
        found = hashlib.sha256()
        for file in sorted((folder / "bonsai_ops").rglob("*.py")):
            found.update(file.relative_to(folder).as_posix().encode() + b"\n")
            found.update(file.read_bytes().replace(b"\r\n", b"\n"))
        return f"sources {found.hexdigest()[:10]}"
    return commit + ("+" if _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no") else "")


def driver() -> str:
    """The version of NVIDIA's driver, "unknown" without nvidia-smi."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "unknown"


def _output(*command: str) -> str:
    """What a program prints, "" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


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
        "driver": driver(),
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


def own_rss() -> int | None:
    """Resident bytes of this process that are no pages of files; None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s*(\d+)", status.read_text(encoding="ascii")) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def reset_peak_rss() -> None:
    """Lets peak_rss count from the present resident set on; only Linux can, elsewhere nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
