"""Joules, where the machine counts them: RAPL for processors (Linux), NVML for NVIDIA GPUs; else why not.

RAPL: /sys/class/powercap/intel-rapl:N/energy_uj counts microjoules of package N (AMD too) and starts again at 0 after
max_energy_range_uj, usually 65 or 262 kJ, so one measurement must be shorter than one such round. NVML, through the
optional package pynvml: millijoules since the driver was loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

POWERCAP = Path("/sys/class/powercap")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Counter:
    """One counter of energy. `read`: joules since some moment; `wraps_at`: joules after which it starts again at 0."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules from one reading to a later one."""
        return after - before + (self.wraps_at if self.wraps_at and after < before else 0)


class Energy:
    """Sums the counters of a device. `why_not`: one line where there is none."""

    def __init__(self, counters: list[Counter], why_not: str | None = None) -> None:
        self.counters = counters
        self.why_not = None if counters else why_not or "no counter of energy was found"

    def read(self) -> list[float]:
        """The counters as they stand."""
        return [counter.read() for counter in self.counters]

    def between(self, before: list[float], after: list[float]) -> float | None:
        """Joules from one reading to a later one, None without a counter."""
        if not self.counters:
            return None
        return sum(c.between(b, a) for c, b, a in zip(self.counters, before, after, strict=True))

    def around(self, run: Callable[[], Result]) -> tuple[Result, dict]:
        """(what `run` returns, {"whole_s": seconds that it took, "joules", "no_joules": why there are none})."""
        before, started = self.read(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        return result, {
            "whole_s": seconds,
            "joules": self.between(before, self.read()),
            "no_joules": self.why_not,
        }


def find_energy(device: str = "cpu", powercap: Path = POWERCAP) -> Energy:
    """The counters of the processor packages and, for cuda, of the first GPU."""
    counters, why_not = rapl_counters(powercap)
    if device == "cuda":
        gpu, why_no_gpu = _nvml_counters()
        counters, why_not = counters + gpu, why_not or why_no_gpu
    return Energy(counters, why_not)


def rapl_counters(powercap: Path = POWERCAP) -> tuple[list[Counter], str | None]:
    """(one counter a processor package, or none; why none)."""
    counters, locked = [], False
    for folder in sorted(powercap.glob("intel-rapl:*")):
        file = folder / "energy_uj"
        # intel-rapl:0:1 is a part of intel-rapl:0; psys counts the whole board, packages included
        if folder.name.count(":") != 1 or not _text(folder / "name").startswith("package"):
            continue
        try:
            int(file.read_text())
            limit = int((folder / "max_energy_range_uj").read_text()) / 1e6
        except PermissionError:
            locked = True
            continue
        except (OSError, ValueError):
            continue
        counters.append(Counter(_text(folder / "name"), lambda file=file: int(file.read_text()) / 1e6, limit))
    if locked and not counters:
        return [], f"{powercap} may only be read by root: run as root or make energy_uj readable"
    return (
        counters,
        None if counters else f"{powercap} shows no processor package (virtual machines hide it)",
    )


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _nvml_counters() -> tuple[list[Counter], str | None]:
    """(the first GPU's counter, or none; why none)."""
    try:
        import pynvml
    except ImportError:
        return [], "the package pynvml, which reads a GPU's energy, is not installed"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return [], f"NVML counts no energy here: {error}"
    return [Counter("gpu", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)], None


def per_hour(name: str, seconds: float, peak_bytes: int) -> dict[str, float | None]:
    """{name: pictures an hour at `seconds` a picture, <name>_per_gb: for each GB of peak memory, None if that is 0}."""
    pictures = 3600 / seconds
    return {name: pictures, f"{name}_per_gb": pictures / (peak_bytes / 1e9) if peak_bytes else None}
