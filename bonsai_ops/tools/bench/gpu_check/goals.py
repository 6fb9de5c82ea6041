"""What the plugin is to reach on a GPU, and what the figures of a run say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
TOKENS = {512: 1536, 1024: 4608}
"""{width and height in pixels: tokens, 512 of them text}."""
TEXT = "text "
"""How the seedling's names of text encodings begin."""
DIFFERENT = (
    ("dynamic", "lora streamed == resident"),
    ("classic", "lora offloaded == resident"),
    ("classic", "offloaded plain == resident"),
    ("dynamic", "dynamic == classic"),
    ("classic", "classic == dynamic"),
)
"""(process, figure): relative distances of latents that must be the same."""


@dataclass(frozen=True)
class Goal:
    """One line. found: None where it was not measured. reached: whether a figure is good enough; shown: as text."""

    text: str
    wanted: str
    found: Callable[[Figures], float | None]
    reached: Callable[[float], bool]
    shown: str = "{:.2f}"


@dataclass(frozen=True)
class Outcome:
    """A goal and what became of it; reached is None where it was not measured."""

    text: str
    wanted: str
    found: str
    reached: bool | None


def _of(figures: Figures, process: str, name: str, key: str = "step_s") -> float | None:
    value = figures.get(process, {}).get(name)
    return value.get(key) if isinstance(value, Mapping) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def speed(figures: Figures, name: str, size: int, process: str = "dynamic") -> float | None:
    """How many times as fast as the dense model in bf16 a step is that `drawing.measured` noted as `name`."""
    return _ratio(_of(figures, process, f"dense {size}"), _of(figures, process, f"{name} {size}"))


def _fastest_a8(figures: Figures, size: int) -> float | None:
    names = [key.rpartition(" ")[0] for key in figures.get("dynamic", {}) if key.startswith("ours a8")]
    return max((found for name in names if (found := speed(figures, name, size))), default=None)


def _lora(figures: Figures) -> float | None:
    """The worse of both ways to manage memory."""
    costs = [_ratio(_of(figures, p, "lora 512"), _of(figures, p, "ours 512")) for p in ("dynamic", "classic")]
    return max((cost for cost in costs if cost), default=None)


def _memory(figures: Figures) -> float | None:
    mb = _of(figures, "dynamic", "ours 512", "device_peak_mb")
    return None if mb is None else mb / 1000


def _distance(figures: Figures) -> float | None:
    found = [figures.get(process, {}).get(name) for process, name in DIFFERENT]
    return max((value for value in found if isinstance(value, float)), default=None)


def _decibels(figures: Figures) -> float | None:
    found = figures.get("seedling", {}).get("psnr auto against fp32 on the CPU", {})
    return min((db for name, db in found.items() if not name.startswith(TEXT)), default=None)


def _wrong(figures: Figures) -> float | None:
    """How many comparisons of a kernel with float64 went wrong."""
    found = [v["bad"] for name, v in figures.items() if name.startswith("kernels:") and "bad" in v]
    return float(sum(map(len, found))) if found else None


GOALS = (
    Goal("kernels against float64, wrong cases", "0", _wrong, lambda n: n == 0, "{:.0f}"),
    Goal("exact, 1536 tokens, speed of dense bf16", ">= 0.95", lambda f: speed(f, "ours", 512), lambda x: x >= 0.95),
    Goal("exact, 4608 tokens, speed of dense bf16", ">= 0.97", lambda f: speed(f, "ours", 1024), lambda x: x >= 0.97),
    Goal("int8 or fp8, 1536 tokens, speed of dense bf16", ">= 1.3", lambda f: _fastest_a8(f, 512), lambda x: x >= 1.3),
    Goal("int8 or fp8, 4608 tokens, speed of dense bf16", ">= 1.3", lambda f: _fastest_a8(f, 1024), lambda x: x >= 1.3),
    Goal(
        "first step after loading, compilation in it, s",
        "<= 10",
        lambda f: _of(f, "dynamic", "ours 512", "first_s"),
        lambda s: s <= 10,
        "{:.1f}",
    ),
    Goal("peak of the device's memory in a step at 512x512, GB", "<= 2.2", _memory, lambda gb: gb <= 2.2),
    Goal("a step with a LoRA of rank 16, of one without", "<= 1.10", _lora, lambda x: x <= 1.10),
    Goal("resident, offloaded and dynamic, distance", "0", _distance, lambda x: x == 0, "{:.1e}"),
    Goal("the seedling's pictures against the CPU's, dB", ">= 40", _decibels, lambda db: db >= 40, "{:.1f}"),
)


def outcomes(figures: Figures) -> Iterator[Outcome]:
    """What became of each goal."""
    for goal in GOALS:
        found = goal.found(figures)
        text = "not measured" if found is None else goal.shown.format(found)
        yield Outcome(goal.text, goal.wanted, text, None if found is None else goal.reached(found))
