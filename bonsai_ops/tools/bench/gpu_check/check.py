"""What the stages share: their settings, figures that are written down at once, clocks and random packed weights.

Imports nothing but the standard library: a stage within ComfyUI must import torch after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ....weights.packed_weight import PackedWeight

GROUP = 128


@dataclass(frozen=True)
class Settings:
    """Folders and the device. project: the repository. asked: the run's device, if this process has another."""

    out: Path
    comfyui: Path
    work: Path
    project: Path
    device: str
    asked: str | None = None

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

    def start(self, comfyui: Callable[[], dict[str, Any]]) -> None:
        """Starts ComfyUI and notes the facts about it."""
        begun = time.perf_counter()
        self.note("host", comfyui())
        self.note("import_s", time.perf_counter() - begun, show=False)
        logging.getLogger().setLevel(logging.INFO)

    def synchronise(self) -> None:
        """Waits until the GPU has done what was asked of it."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
        """Median wall seconds of a call with a synchronisation around it."""
        for _ in range(warm):
            call()
        found = []
        for _ in range(repeats):
            self.synchronise()
            begun = time.perf_counter()
            call()
            self.synchronise()
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

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
        import torch

        if not self.on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free


def packed(rows: int, columns: int, codec: str, device: str, scale_dtype: torch.dtype | None = None) -> PackedWeight:
    """A weight [rows, columns] of random bytes that the codec writes, made on the device; scales bf16 by default."""
    import torch

    from ....weights import codec as codecs
    from ....weights.packed_weight import PackedWeight

    generator = torch.Generator(device).manual_seed(rows + columns)
    n = codecs.get_codec(codec).byte_rows(rows)
    values = torch.arange(256, device=device)
    if codec == "trit5":
        values = torch.tensor([-(-v * 256 // 243) for v in range(243)], device=device)
    if codec == "crumb":
        values = values[(values & values >> 1 & 0x55) == 0]
    codes = values.to(torch.uint8)[torch.randint(len(values), (n, columns), device=device, generator=generator)]
    scale = (torch.rand(rows, columns // GROUP, device=device, generator=generator) + 0.5) / columns**0.5
    scheme = "binary" if codec == "bit" else "ternary"
    return PackedWeight(codes, scale.to(scale_dtype or torch.bfloat16), (rows, columns), scheme, codec, GROUP)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, Euclidean."""
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
