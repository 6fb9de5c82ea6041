"""What the stages share: their settings, figures that are written down at once, and clocks.

Imports nothing but the standard library: a stage within ComfyUI must import torch after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inside.comfyui import set_up

if TYPE_CHECKING:
    import torch

    from ..peaks import DevicePeaks


FOLDERS = ("out", "comfyui", "work", "project")


@dataclass(frozen=True)
class Settings:
    """Folders and the device. project: the repository. asked: the run's device, if this process has another."""

    out: Path
    comfyui: Path
    work: Path
    project: Path
    device: str
    asked: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, str | None]) -> Settings:
        """Those that `text` wrote."""
        folders = {name: Path(given[name]) for name in FOLDERS}
        return cls(**folders, device=str(given["device"]))

    def text(self) -> str:
        """As one argument of a command."""
        return json.dumps({**{name: str(getattr(self, name)) for name in FOLDERS}, "device": self.device})

    def file(self, process: str, suffix: str) -> Path:
        """Where a process writes."""
        return self.work / f"{process.replace(':', '_')}{suffix}"

    def read(self, process: str) -> dict[str, Any]:
        """The figures that a process has written down so far."""
        try:
            return json.loads(self.file(process, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


class Check:
    """One process: its figures and what it needs to take them."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings, self.device = name, settings, settings.device
        self.figures: dict[str, Any] = {}
        self.peaks: DevicePeaks | None = None

    def watch(self) -> None:
        """Counts the GPU's memory from now on (`peaks`)."""
        from ..peaks import DevicePeaks

        self.peaks = DevicePeaks() if self.on_gpu else None

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes; else every size is tiny."""
        return self.device != "cpu"

    def note(self, key: str, value: Any, *, show: bool = True) -> None:
        """Writes a figure down, so that it stays whatever comes next."""
        self.figures[key] = value
        file = self.settings.file(self.name, ".json")
        file.with_suffix(".tmp").write_text(json.dumps(self.figures), encoding="utf-8")
        file.with_suffix(".tmp").replace(file)
        if show:
            text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
            print(f"> {key}: {text[:400]}", flush=True)

    @contextlib.contextmanager
    def guarded(self, key: str) -> Iterator[None]:
        """What fails inside is written down under `key`; the stage goes on."""
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(f"{key} FAILED", f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            print(f"({key}: {time.perf_counter() - begun:.1f} s)", flush=True)

    def start(self, dynamic: bool) -> None:
        """Sets ComfyUI up and notes the facts about it. Before anything imports torch: ComfyUI sets its allocator."""
        begun = time.perf_counter()
        base = self.settings.work / "base"
        base.mkdir(exist_ok=True)
        self.note("host", set_up(self.settings.comfyui, self.device, dynamic, ["--base-directory", str(base)]))
        self.note("import_s", time.perf_counter() - begun, show=False)
        logging.getLogger().setLevel(logging.INFO)

    def synchronise(self) -> None:
        """Waits until the GPU has done what was asked of it."""
        from ..inside.start import synchronise

        synchronise(self.device)

    def seconds(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of a call, by CUDA events on a GPU."""
        from .. import timer

        return statistics.median(timer.time_in_turns({"call": [call]}, timer.make_timer(self.device), rounds)["call"])

    def host_microseconds(self, call: Callable[[], object], count: int = 300) -> float:
        """Microseconds until an asynchronous call returns, without waiting for the device."""
        for _ in range(20):
            call()
        self.synchronise()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - begun
        self.synchronise()
        return 1e6 * spent / count

    def used(self) -> int:
        """Bytes of the GPU's memory that anyone uses."""
        from ..peaks import used_on_device

        return used_on_device() if self.on_gpu else 0


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, Euclidean."""
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
