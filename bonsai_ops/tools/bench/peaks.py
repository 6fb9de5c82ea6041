"""Peak memory of this process: its resident set on a CPU, the device's own count on a GPU.

torch's allocator sees neither ComfyUI's dynamic VRAM nor what libraries and other allocators take, so its count is a
second figure. The device is asked every few milliseconds: what is taken and given back in between goes unseen.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .machine import own_rss, peak_rss, reset_peak_rss

EVERY = 0.005
"""Seconds between two looks at the device."""


class Peaks(Protocol):
    """Counts from its making on."""

    def reset(self) -> None:
        """Counts from what is in memory now on, where the system can."""

    def pause(self) -> None:
        """What changes until `resume` is another process's."""

    def resume(self) -> None:
        """Ends a pause."""

    def peak(self) -> int:
        """Bytes."""

    def own_peak(self) -> int | None:
        """Bytes of the whole time that are no pages of files, which the system takes back; None if it does not tell."""

    def torch_peak(self) -> int | None:
        """Bytes that torch's own allocator had given out at most; None on a CPU, which has no such count."""


def used_on_device() -> int:
    """Bytes of the GPU's memory that anyone uses."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _watch(look: Callable[[], object], every: float) -> None:
    """Calls a method every so many seconds, as long as its object is held by anyone else."""
    held = weakref.WeakMethod(look)

    def watch() -> None:
        while (method := held()) is not None:
            method()
            del method
            time.sleep(every)

    threading.Thread(target=watch, name="peaks", daemon=True).start()


class ProcessPeaks:
    """The resident set. The pages that are the process's own are counted every few milliseconds."""

    def __init__(self, every: float = EVERY) -> None:
        self._own = own_rss()
        if self._own is not None:
            _watch(self._look_at_own, every)

    def _look_at_own(self) -> None:
        self._own = max(self._own, own_rss())

    def reset(self) -> None:
        reset_peak_rss()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def peak(self) -> int:
        return peak_rss()

    def own_peak(self) -> int | None:
        return self._own

    def torch_peak(self) -> None:
        return None


class DevicePeaks:
    """What the device's memory holds beyond what it held when this was made, this process's context included.

    The device counts for everyone: other processes must rest, or this one pause while they work. used: asks the device;
    cuda: torch.cuda or what behaves like it.
    """

    def __init__(self, used: Callable[[], int] = used_on_device, cuda: Any = torch.cuda, every: float = EVERY) -> None:
        self._used, self._cuda = used, cuda
        self._ours = self._most = 0
        self._resumed_at: int | None = used()
        _watch(self._look, every)

    def _look(self) -> int:
        """Bytes that are this process's now."""
        since = self._resumed_at
        ours = self._ours if since is None else self._ours + self._used() - since
        self._most = max(self._most, ours)
        return ours

    def reset(self) -> None:
        self._most = 0
        self._look()
        self._cuda.reset_peak_memory_stats()

    def pause(self) -> None:
        self._ours, self._resumed_at = self._look(), None

    def resume(self) -> None:
        self._resumed_at = self._used()

    def peak(self) -> int:
        self._look()
        return self._most

    def own_peak(self) -> None:
        return None

    def torch_peak(self) -> int:
        return self._cuda.max_memory_allocated()


def make_peaks(device: str) -> Peaks:
    """Those of a device."""
    return ProcessPeaks() if device == "cpu" else DevicePeaks()
