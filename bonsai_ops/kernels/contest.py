"""Whether a fused kernel or unpacking and the vendor's product is faster: it depends on card, shape and tokens.

Below LEAST_TOKENS the fused kernel, which reads a fraction of the bytes. From there on the table of cards that were
measured says it, else the file of choices, else both are timed, once for a class of calls, at its first one. That takes
milliseconds, and never happens while a CUDA graph is recorded or where torch looks on: then the fused kernel multiplies
and the class is timed later.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch

from .. import __version__
from . import machine
from .call import Call
from .choices import FUSED, SIDES, UNPACK, Timed, choices

LEAST_TOKENS = 128
TOKENS = (512, 1536, 4608)
"""Buckets of tokens, each from above the one before; the last has no end. 64 stands for fewer than LEAST_TOKENS."""
MARGIN = 0.97
"""Unpacking must take less than this part of the fused kernel's time: it needs a scratch."""
ROUNDS = 5
MOST_MS = 8.0
"""No third round once the ones before took as long."""


@dataclass(frozen=True)
class Key:
    """A class of calls. device: a card's name. capability: "9.0", or "" where there is none. tokens: of TOKENS."""

    device: str
    capability: str
    dtype: str
    scheme: str
    codec: str
    mode: str
    columns: int
    rows: int
    tokens: int

    @property
    def text(self) -> str:
        """How the file names it: with the versions of what compiles and multiplies."""
        return " | ".join((*map(str, astuple(self)), _versions()))


SHIPPED: Mapping[Key, str] = {}
"""{class: the faster side} of cards that were measured, none yet. Such a row goes before what the file says."""

Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
"""Milliseconds of each of several calls, which were called before; in turns, so that a rising clock favours none."""


def by_events(calls: Sequence[Callable[[], object]]) -> list[float]:
    """By CUDA events on the current stream."""

    def once(call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return in_turns(calls, once)


def in_turns(calls: Sequence[Callable[[], object]], once: Callable[[Callable[[], object]], float]) -> list[float]:
    """The least that `once` says of each call, in two to ROUNDS rounds: what else the machine does only adds to it."""
    rounds: list[list[float]] = []
    while len(rounds) < 2 or (len(rounds) < ROUNDS and sum(map(sum, rounds)) < MOST_MS):
        rounds.append([once(call) for call in calls])
    return [min(of_one) for of_one in zip(*rounds, strict=True)]


timers: dict[str, Timer] = {"cuda": by_events}
"""{type of device: how calls are timed there}. Elsewhere nothing is timed. ROCm calls itself cuda."""


def bucket(tokens: int) -> int | None:
    """The bucket of a number of tokens; None below LEAST_TOKENS."""
    if tokens < LEAST_TOKENS:
        return None
    return next((most for most in TOKENS if tokens <= most), TOKENS[-1])


def key_of(call: Call, tokens: int) -> Key:
    """The class of a call with a bucket of tokens."""
    shape = (call.scheme, call.codec, call.mode, call.columns, call.rows)
    return Key(*_card(call.device), str(call.dtype).removeprefix("torch."), *shape, tokens)


def can_time(x: torch.Tensor) -> bool:
    """Whether products of x may be timed now."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return plain and x.device.type in timers and not machine.capturing() and not torch.compiler.is_compiling()


def known(key: Key) -> str | None:
    """The faster side as the table or the file has it, None if neither does."""
    if (side := SHIPPED.get(key)) is not None:
        return side
    timed = choices.find(key.text)
    return None if timed is None else timed.faster


def decide(key: Key, device: torch.device, calls: Mapping[str, Callable[[], object]]) -> str:
    """Times {side: its product}, which were called before, keeps the result and returns the faster side."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        ms = timers[device.type]([calls[side] for side in SIDES])
    if not all(math.isfinite(one) and one > 0 for one in ms):
        return FUSED
    times = {side: round(one, 4) or one for side, one in zip(SIDES, ms, strict=True)}
    faster = UNPACK if times[UNPACK] < MARGIN * times[FUSED] else FUSED
    return choices.add(key.text, Timed(faster, times)).faster


def told(device: torch.device, dtype: torch.dtype, shapes: set[tuple[int, int]]) -> dict[str, str]:
    """{class in a few words: what was chosen for it and why} for weights of these shapes (N, K) on a device."""
    found: dict[str, str] = {}
    if device.type not in timers or not choices.all():
        return found
    card, name = _card(device), str(dtype).removeprefix("torch.")
    for text, timed in choices.all().items():
        key = _parsed(text)
        if key is None or (key.device, key.capability, key.dtype) != (*card, name):
            continue
        if (key.rows, key.columns) in shapes:
            ms = ", ".join(f"{side} {timed.ms[side]:.3g} ms" for side in SIDES)
            what = f"{key.columns} to {key.rows}, {key.tokens} tokens, {key.codec} {key.mode}"
            found[what] = f"{timed.faster} is faster ({ms})"
    return found


def _parsed(text: str) -> Key | None:
    """The key of a text of this plugin and these versions, None for any other."""
    parts = text.split(" | ")
    if len(parts) != 10 or parts[-1] != _versions():
        return None
    try:
        return Key(*parts[:6], *map(int, parts[6:9]))
    except ValueError:
        return None


def _card(device: torch.device) -> tuple[str, str]:
    """(name, capability) of a device."""
    if device.type != "cuda":
        return device.type, ""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return name.replace("|", "/")[:100], f"{major}.{minor}"


@functools.cache
def _versions() -> str:
    """What a choice rests on beside the card: another version multiplies at another speed."""
    try:
        from triton import __version__ as triton
    except Exception:  # a half-installed Triton raises nearly anything
        triton = "none"
    return f"plugin {__version__}, torch {torch.__version__}, triton {triton}"
