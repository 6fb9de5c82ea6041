"""Timing in turns on a CPU or a GPU, and the temporary memory of one call.

A way is a list of calls that do the same work on copies of the same data. On a GPU the copies together are larger than
its L2 cache and are used in rotation, because a weight that stays in L2 between two calls would flatter every kernel;
inside a real model each weight is read once a step. A CPU gets one copy: the activations alone overrun its caches.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

Calls = Sequence[Callable[[], object]]


class Timer(Protocol):
    """Times a way on one device."""

    def copies(self, nbytes: int) -> int:
        """How many copies of data of that size a way needs."""

    def seconds(self, calls: Calls, turn: int) -> float:
        """Seconds of one call; `turn` says which copy is next."""


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""What a CPU is timed by: seconds that pass, or what all threads of this process together computed or waited busily."""


class CpuTimer:
    """A clock of CLOCKS around one call."""

    def __init__(self, clock: str = "wall") -> None:
        self._now = CLOCKS[clock]

    def copies(self, nbytes: int) -> int:
        return 1

    def seconds(self, calls: Calls, turn: int) -> float:
        call = calls[turn % len(calls)]
        started = self._now()
        call()
        return self._now() - started


class CudaTimer:
    """CUDA events around `repeats` calls in rotation over the copies; `cuda`: torch.cuda or what behaves like it."""

    def __init__(self, cuda: Any = torch.cuda, l2_bytes: int | None = None, repeats: int = 10) -> None:
        self.cuda, self.repeats = cuda, repeats
        self.l2_bytes = l2_bytes if l2_bytes is not None else cuda.get_device_properties(0).L2_cache_size

    def copies(self, nbytes: int) -> int:
        """As many as make twice the L2 cache, at least two."""
        return max(2, -(-2 * self.l2_bytes // max(nbytes, 1)))

    def seconds(self, calls: Calls, turn: int) -> float:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        begin.record()
        for i in range(self.repeats):
            calls[(turn * self.repeats + i) % len(calls)]()
        end.record()
        self.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / self.repeats


def make_timer(device: str, clock: str = "wall") -> Timer:
    """The timer of a device. Ends the program with one sentence where torch cannot use a GPU.

    clock: of CLOCKS, for a CPU.
    """
    if device == "cpu":
        return CpuTimer(clock)
    require_gpu()
    return CudaTimer()


def require_gpu() -> None:
    """Raises SystemExit where torch can use no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda needs a GPU that torch can use, and torch {torch.__version__} finds none here: leave the "
            "option out to measure the CPU."
        )


def time_in_turns(ways: Mapping[str, Calls], timer: Timer, rounds: int = 5) -> dict[str, list[float]]:
    """{name: seconds of each round}: every copy once to warm up, then all ways in turn, so that drift hits all."""
    for calls in ways.values():
        for call in calls:
            call()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, calls in ways.items():
            seconds[name].append(timer.seconds(calls, turn))
    return seconds


def speed_ratio(ours: Sequence[float], rival: Sequence[float]) -> float:
    """How many times as fast ours is: the median over the rounds, each round compared with itself."""
    return statistics.median(theirs / own for own, theirs in zip(ours, rival, strict=True))


def spread(seconds: Sequence[float]) -> float:
    """How far the rounds of one way lie apart, relative to their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def run_with_scratch(call: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, int]:
    """(the call's result, bytes that torch had allocated for it at its peak, the result's own left out).

    Counted by torch's allocator: oneDNN's buffers are seen, memory that a library takes from the system is not.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before - result.nbytes
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines a use to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return result, peak_of_trace(events) - result.nbytes


def peak_of_trace(events: Sequence[Mapping[str, Any]]) -> int:
    """Largest number of bytes alive at once, from the [memory] events of a profiler trace, relative to its start."""
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event["args"]["Ev Idx"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak
