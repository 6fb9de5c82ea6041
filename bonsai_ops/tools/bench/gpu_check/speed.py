"""Every layer of the 4B model: dense, ours in every way, the trial kernels and what other formats reach."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .... import kernels
from ....weights.packed_weight import PackedWeight
from ...synthetic import random_weight
from .. import layers, timer
from .check import Check

TOKENS = (1536, 4608, 64, 512)
CODECS = ("trit5", "crumb", "bit")
FEW = 512
"""With fewer tokens the reference is not worth its time."""
KEPT = 2
"""Tiles of plane_kernel that go on after the first number of tokens."""
GEMLITE_SHAPE = 4

Ways = dict[str, list[Callable[[], object]]]


def run(check: Check, _: str) -> None:
    """Notes milliseconds of all layers of a step, and each way's speed relative to dense bf16."""
    shapes = layers.SHAPES if check.on_gpu else (layers.Shape(256, 640, 1, 1),)
    clock = timer.make_timer("cuda" if check.on_gpu else "cpu")
    scratch = torch.empty(max(s.k * s.n for s in shapes), dtype=torch.bfloat16, device=check.device)
    planes = _plane_names(check)
    table: dict[str, dict[str, float]] = {}
    for tokens in TOKENS if check.on_gpu else (16,):
        totals: dict[str, float] = {}
        for shape in shapes:
            ways = _ways(check, shape, tokens, clock, scratch, planes)
            for name in _broken(check, ways, f"m{tokens} {shape.k}->{shape.n}"):
                del ways[name]
                planes = [plane for plane in planes if plane != name]
            rounds = timer.time_in_turns(ways, clock, 3)
            row = {name: statistics.median(seconds) for name, seconds in rounds.items()}
            for name, seconds in row.items():
                totals[name] = totals.get(name, 0.0) + shape.calls * seconds
            table[f"m{tokens} {shape.k}->{shape.n}"] = {**row, "spread": timer.spread(rounds["bf16"])}
            check.note("table_s", table, show=False)
            del ways
        _show(check, tokens, totals, shapes)
        if tokens == TOKENS[0]:
            planes = sorted(planes, key=lambda name: totals[name])[:KEPT]
    if check.on_gpu and importlib.util.find_spec("gemlite"):
        with check.guarded("gemlite"):
            _gemlite(check, shapes[GEMLITE_SHAPE], clock)


def _show(check: Check, tokens: int, totals: dict[str, float], shapes: tuple[layers.Shape, ...]) -> None:
    flop = sum(2 * tokens * s.k * s.n * s.calls for s in shapes)
    bf16 = totals["bf16"]
    check.note(f"m{tokens} step_ms", {name: round(1000 * s, 3) for name, s in totals.items()})
    check.note(f"m{tokens} vs_bf16", {name: round(bf16 / s, 3) for name, s in totals.items() if name != "bf16"})
    check.note(f"m{tokens} bf16_tflops", flop / bf16 / 1e12)


def _plane_names(check: Check) -> list[str]:
    if not check.on_gpu:
        return []
    from . import candidates

    return list(candidates.plane_tiles(check.device))


def _ways(
    check: Check, shape: layers.Shape, tokens: int, clock: timer.Timer, scratch: torch.Tensor, planes: list[str]
) -> Ways:
    """{name: calls of one way, one a copy of the weight}."""
    x = torch.randn(tokens, shape.k, device=check.device, dtype=torch.bfloat16)
    weights = {codec: random_weight(codec, shape.n, shape.k, check.device) for codec in CODECS}
    copies = {codec: layers._copies(weight, clock) for codec, weight in weights.items()}
    ways: Ways = {"bf16": layers.dense(x, weights["trit5"].dequantize(torch.bfloat16), clock)}
    for codec in CODECS:
        ways[codec] = [lambda w=w: kernels.linear(x, w) for w in copies[codec]]
    for codec, mode in itertools.product(("crumb", "bit"), ("a8", "a8_fp8")):
        if layers.offers(x, weights[codec], mode) is None:
            ways[f"{codec} {mode}"] = [lambda w=w, mode=mode: kernels.linear(x, w, mode=mode) for w in copies[codec]]
    if tokens >= FEW:
        ways["eager"] = [lambda w=w: _forced("eager", x, w) for w in copies["trit5"]]
    if check.on_gpu:
        ways |= _trials(x, copies["trit5"], scratch, planes)
        ways |= dict(_other_formats(check, shape, tokens, clock))
    return ways


def _forced(backend: str, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    with kernels.use_backend(backend):
        return kernels.linear(x, weight)


def _trials(x: torch.Tensor, copies: list[PackedWeight], scratch: torch.Tensor, planes: list[str]) -> Ways:
    """Unpacking in one launch with and without the product after it, and plane_kernel in each tile."""
    from ....kernels.unpack import by_nvrtc, by_triton
    from . import candidates

    rows, columns = copies[0].shape
    whole = scratch[: rows * columns].view(rows, columns)
    ways: Ways = {
        "unpack": [lambda w=w: _forced("unpack", x, w) for w in copies],
        "unpack only": [lambda w=w: by_triton.write(w, 0, rows, whole) for w in copies],
        "unpack_nvrtc only": [lambda w=w: by_nvrtc.write(w, 0, rows, whole) for w in copies],
    }
    tiles = candidates.plane_tiles(x.device)
    if tiles:
        ways["triton"] = [lambda w=w: _forced("triton", x, w) for w in copies]
    for name in planes:
        ways[name] = [lambda w=w, name=name: candidates.plane_linear(x, w, tiles[name]) for w in copies]
    return ways


def _other_formats(
    check: Check, shape: layers.Shape, tokens: int, clock: timer.Timer
) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """The vendor's products of int8 and fp8 operands that lie ready."""
    x = torch.randint(-127, 127, (tokens, shape.k), device=check.device, dtype=torch.int8)
    w = torch.randint(-1, 2, (shape.n, shape.k), device=check.device, dtype=torch.int8)
    yield "int_mm alone", [lambda w=w: torch._int_mm(x, w.t()) for w in layers._copies(w, clock)]
    xf, wf = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    rows, columns = torch.ones(tokens, 1, device=check.device), torch.ones(1, shape.n, device=check.device)
    yield (
        "fp8 alone",
        [
            lambda w=w: torch._scaled_mm(xf, w.t(), rows, columns, out_dtype=torch.bfloat16)
            for w in layers._copies(wf, clock)
        ],
    )


def _broken(check: Check, ways: Ways, where: str) -> list[str]:
    """The ways whose first call raises, each noted."""
    broken = []
    for name, calls in ways.items():
        try:
            calls[0]()
            check.synchronise()
        except Exception as error:  # a way that a device lacks must not hide the others
            check.note(f"{name} {where} FAILED", f"{type(error).__name__}: {str(error)[:200]}")
            broken.append(name)
    return broken


def _gemlite(check: Check, shape: layers.Shape, clock: timer.Timer) -> None:
    weight = random_weight("trit5", shape.n, shape.k, check.device)
    x = torch.randn(TOKENS[0], shape.k, device=check.device, dtype=torch.bfloat16)
    begun = time.perf_counter()
    exact = F.linear(x[: layers.CHECKED_ROWS].double(), weight.dequantize().double())
    way = layers._gemlite(x, weight, exact, clock)
    way.calls[0]()
    check.synchronise()
    check.note("gemlite first call s", time.perf_counter() - begun)
    seconds = statistics.median(clock.seconds(way.calls, turn) for turn in range(3))
    check.note(f"gemlite m{TOKENS[0]} {shape.k}->{shape.n} s", seconds)
