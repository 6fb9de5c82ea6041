"""Whether the number of threads that torch computes in on a CPU is a bad one for this process, and the cure.

torch takes MKL_NUM_THREADS, else OMP_NUM_THREADS, else with MKL a thread for each core that the process may run on, and
never more; without MKL, as on ARM, one for each processor, on Apple's for each fast core. It asks for no limit on
processor time, as containers have (aten/src/ATen/ParallelOpenMP.cpp, ParallelCommon.cpp). The number is ComfyUI's:
nothing here changes it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from .machine import allowed_time, read_start

logger = logging.getLogger(__name__)

ASKED = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""Variables that torch takes the number from, the stronger one first."""
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
"""Variables with which OpenMP binds this thread to one place: its affinity is not that of the process then."""
WORTH = 1.1
"""By how much fewer threads must be faster on paper to be spoken of."""


@dataclass(frozen=True)
class Processors:
    """What this process may use. None or empty: not known.

    processors, cores: how many it may run on. time: processor seconds a second that its control groups allow. speeds:
    of those cores, the fastest first, in a unit that only compares them.
    """

    processors: int | None = None
    cores: int | None = None
    time: float | None = None
    speeds: tuple[float, ...] = ()


def find_processors(root: Path = Path("/"), usable: Collection[int] | None = None) -> Processors:
    """What the system tells below `root` about the processors numbered `usable`, by default the affinity mask's."""
    if usable is None and not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return Processors(os.cpu_count())
    if usable is None and any(os.environ.get(name) for name in BINDING):
        return Processors(time=allowed_time(root))
    numbers = sorted(os.sched_getaffinity(0) if usable is None else usable)
    cores: dict[str, tuple[int, int]] = {}
    for number in numbers:
        folder = root / f"sys/devices/system/cpu/cpu{number}"
        siblings = read_start(folder / "topology/thread_siblings_list").strip()
        if not siblings:
            return Processors(len(numbers), time=allowed_time(root))
        cores[siblings] = (_number(folder / "cpu_capacity"), _number(folder / "cpufreq/cpuinfo_max_freq"))
    unlike = [speeds for speeds in zip(*cores.values(), strict=True) if all(speeds) and len({*speeds}) > 1]
    return Processors(
        len(numbers), len(cores), allowed_time(root), tuple(sorted(unlike[0], reverse=True)) if unlike else ()
    )


def misfit(threads: int, found: Processors) -> str | None:
    """What speaks against so many threads for this process, with the cure; None if nothing that is known does.

    A product is cut into equal parts, one a thread, and waits for the last: k threads on the k fastest cores are taken
    to be as fast as k times the slowest of those. That was not measured.
    """
    time = math.ceil(found.time) if found.time else None
    most = min([n for n in (found.cores or found.processors, time) if n], default=threads)
    rates = [k * speed for k, speed in enumerate(found.speeds[:most], start=1)]
    best = rates.index(max(rates)) + 1 if rates else most
    name = next((name for name in ASKED if os.environ.get(name)), ASKED[-1])
    if time and threads > time:
        why = f"this process is allowed the time of {_counted(found.time, 'processor')}"
    elif found.processors and threads > found.processors:
        why = f"this process may run on {_counted(found.processors, 'processor')}"
    elif found.cores and threads == 1 < best:
        why = f"there are {found.cores} cores" + (f" and {name} is 1" if os.environ.get(name) == "1" else "")
    elif rates and max(rates) > WORTH * rates[min(threads, most) - 1]:
        why = "some of them run on slow cores, for which the fast ones wait"
    else:
        return None
    return f"{why}: start ComfyUI with {name}={best}"


def threads_told() -> tuple[int, str | None]:
    """The number of threads that torch computes in, and what speaks against it."""
    threads = torch.get_num_threads()
    return threads, misfit(threads, find_processors())


@functools.cache
def tell_threads() -> None:
    """Says in the log that the number of threads is a bad one, once."""
    threads, why = threads_told()
    if why:
        logger.warning("Bonsai: torch computes in %s, but %s", _counted(threads, "thread"), why)


def _counted(number: float, thing: str) -> str:
    return f"{number:g} {thing}{'' if number == 1 else 's'}"


def _number(path: Path) -> int:
    text = read_start(path).strip()
    return int(text) if text.isdecimal() else 0
