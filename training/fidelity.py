"""How close packed models come to the dense seedling, against their size: one row a way of making them.

Levels, 4 and 8 bits and mixtures of them; as rounded, calibrated, with a residual of some rank, with the residual
recovered by training (`bonsai_ops/quantize/recover.py`), and by other ways of training it that were tried:

    weighted     errors of latents count as they change pixels (`transformer.importance`)
    alternate    the codes are chosen again for what the trained residual leaves over, then the residual trained on
    hadamard     codes of the weight in a basis in which each 128 inputs are mixed evenly (a Hadamard matrix)
    two ranges   two residuals of half the rank, for the earlier and for the later half of the schedule

Every row is kept in fidelity.json as soon as it is measured and not measured again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bonsai_ops.quantize import Settings, Statistics, budget, measured, quantize_layer
from bonsai_ops.quantize.recover import Plan, Residual
from bonsai_ops.weights.packed_weight import PackedWeight

from . import curve
from .rows import Rows
from .twin import Points, Range, Twin

PLAN = Plan(steps=160, learning_rate=1e-3, batch=1)
ALWAYS: Range = (-math.inf, math.inf)
RANKS = (32, 16, 64, 8)
SEEDS = (0, 1, 2)
FILE, PICTURE = "fidelity.json", "fidelity.png"
GROUP = 128


@dataclass(frozen=True)
class Way:
    """How a packed model is made. recipe: of Settings, `dense`, or mix and its bits a weight. training: "" for none."""

    recipe: str
    rank: int = 0
    calibrated: bool = True
    training: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [self.recipe, "calibrated" if self.calibrated else "rounded"]
        parts += [f"rank {self.rank}"] if self.rank else []
        parts += [self.training, f"seed {self.seed}"] if self.training else []
        return ", ".join(parts)


def ways() -> Iterator[Way]:
    """All rows, those that decide most first."""
    yield Way("dense", calibrated=False)
    levels = ("ternary", "binary")
    for recipe in levels:
        yield from (Way(recipe, calibrated=False), Way(recipe), Way(recipe, RANKS[0]))
        yield Way(recipe, RANKS[0], training="recovered")
    yield from (
        Way("4bit", calibrated=False),
        Way("4bit"),
        Way("8bit"),
        *(Way(f"mix {bits}") for bits in (2.5, 3, 3.5)),
    )
    for rank in RANKS[1:]:
        for recipe in levels:
            yield from (Way(recipe, rank), Way(recipe, rank, training="recovered"))
    for training in ("alternate", "hadamard", "weighted", "two ranges"):
        yield Way("binary", RANKS[0], training=training)
    for rank in RANKS:
        for seed in SEEDS[1:]:
            yield from (Way(recipe, rank, training="recovered", seed=seed) for recipe in levels)


def show(work: Path, comfyui: Path, seconds: float = math.inf) -> bool:
    """Measures what is missing; needs the stage `dense`. True when all is there."""
    twin, rows = Twin(work, comfyui), Rows(work / FILE)
    started = time.monotonic()
    for way in ways():
        if way.name in rows:
            continue
        if time.monotonic() - started > seconds:
            return False
        begun = time.monotonic()
        found = _made(twin, way)
        row = {"bits": found.bits(twin.dense), **twin.distances(), **found.told, "seconds": time.monotonic() - begun}
        row["attributes"] = twin.attributes()
        rows.add(way.name, row)
        print(line(way.name, row), flush=True)
        curve.draw(work / PICTURE, {name: row for name, row in rows.items() if row["velocity"]})
    return True


def line(name: str, row: Mapping) -> str:
    """One row as text."""
    text = f"{name:42} {row['bits']:5.2f} bits  velocity {row['velocity']:.4f}  latent {row['latent']:.4f}"
    shares = row["attributes"]
    psnr = "same pictures" if row["psnr"] is None else f"{row['psnr']:5.2f} dB"
    return f"{text}  {psnr}  attributes {100 * mean(shares):.1f} %, all {100 * shares['all']:.1f} %"


def table(rows: Mapping[str, Mapping]) -> Iterator[str]:
    """The rows that there are as lines of Markdown."""
    yield "| | bits a weight | velocity | latent | PSNR | attributes right | pictures right in all five |"
    yield "| --- " * 7 + "|"
    for way in ways():
        if way.name not in rows:
            continue
        row, shares = rows[way.name], rows[way.name]["attributes"]
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        name = f"**{way.name}**" if way.training else way.name
        errors = ("", "") if row["psnr"] is None else (f"{row['velocity']:.3f}", f"{row['latent']:.3f}")
        right = (f"{100 * mean(shares):.1f} %", f"{100 * shares['all']:.1f} %")
        yield "| " + " | ".join((name, f"{row['bits']:.2f}", *errors, psnr, *right)) + " |"


def mean(shares: Mapping[str, float]) -> float:
    """Of the attributes alone."""
    return sum(share for key, share in shares.items() if key != "all") / (len(shares) - 1)


@dataclass
class _Made:
    """codes: the packed weights without residuals, None for the dense model; values: what the layers multiply with."""

    codes: Mapping[str, PackedWeight] | None
    values: Mapping[str, torch.Tensor]
    residuals: tuple[tuple[Range, Mapping[str, Residual]], ...]
    told: dict[str, float]

    def bits(self, dense: Mapping[str, torch.Tensor]) -> float:
        """A weight, residuals as they are stored in 16 bits."""
        weights = sum(weight.numel() for weight in dense.values())
        if self.codes is None:
            return 16.0
        stored = sum(8 * weight.nbytes for weight in self.codes.values())
        for _, parts in self.residuals:
            stored += sum(16 * (part.up.numel() + part.down.numel()) for part in parts.values())
        return stored / weights


def _made(twin: Twin, way: Way) -> _Made:
    """The packed model, in place; trained if the way says so."""
    if way.recipe == "dense":
        return _placed(twin, _Made(None, twin.dense, (), {}))
    if way.recipe.startswith("mix"):
        return _placed(twin, _plain(_mixed(twin, float(way.recipe.split()[1]))))
    rank = way.rank // 2 if way.training == "two ranges" else way.rank
    settings = Settings(way.recipe, GROUP, rank)
    if way.training == "hadamard":
        found = _placed(twin, _turned(twin.dense, twin.statistics, settings))
    else:
        found = _placed(twin, _plain(twin.packed(settings, way.calibrated)))
    return _trained(twin, way, found, settings) if way.training else found


def _placed(twin: Twin, found: _Made) -> _Made:
    twin.put(found.values, *found.residuals)
    return found


def _plain(weights: Mapping[str, PackedWeight]) -> _Made:
    codes = {name: weight.without_residual() for name, weight in weights.items()}
    values = {name: weight.dequantize() for name, weight in codes.items()}
    residuals = {name: Residual(w.up, w.down) for name, w in weights.items() if w.rank}
    return _Made(codes, values, ((ALWAYS, residuals),) if residuals else (), {})


def _mixed(twin: Twin, bits: float) -> dict[str, PackedWeight]:
    """Layers in three levels, 4 or 8 bits, as Patch to BitLinear spends a size of this many bits a weight."""
    tried = {recipe: twin.packed(Settings(recipe, GROUP)) for recipe in ("ternary", "4bit", "8bit")}
    options = {
        name: [
            budget.Option(
                recipe, made[name].nbytes, measured(weight, made[name], twin.statistics[name]).error.output ** 2
            )
            for recipe, made in tried.items()
        ]
        for name, weight in twin.dense.items()
    }
    chosen = budget.choose(options, round(bits / 8 * sum(weight.numel() for weight in twin.dense.values())))
    return {name: tried[option.name][name] for name, option in chosen.items()}


def _turned(dense: Mapping[str, torch.Tensor], known: Mapping[str, Statistics], settings: Settings) -> _Made:
    """Codes in the mixed basis. x H is what they would be multiplied with: here the weight is turned back instead."""
    codes, values, residuals = {}, {}, {}
    for name, weight in dense.items():
        statistics = known[name]
        gram = turn(turn(statistics.gram).T).T
        turned = Statistics(gram.diagonal().contiguous(), gram.contiguous(), statistics.count)
        packed = quantize_layer(turn(weight), settings, turned).weight
        codes[name] = packed.without_residual()
        values[name] = turn(codes[name].dequantize())
        residuals[name] = Residual(packed.up, turn(packed.down.float()).to(packed.down))
    return _Made(codes, values, ((ALWAYS, residuals),), {})


def turn(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] with each GROUP columns times the Hadamard matrix of that size, which is its own inverse."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < GROUP:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return (matrix.unflatten(1, (-1, GROUP)) @ (hadamard / math.sqrt(GROUP))).flatten(1)


def _trained(twin: Twin, way: Way, found: _Made, settings: Settings) -> _Made:
    points, plan = twin.known(way.seed), replace(PLAN, seed=way.seed)
    metric = twin.feed.importance if way.training == "weighted" else None
    if way.training == "two ranges":
        middle = float(points.sigmas[len(points.sigmas) // 2 - 1 : len(points.sigmas) // 2 + 1].mean())
        parts = found.residuals[0][1]
        later = {name: Residual(part.up, part.down) for name, part in parts.items()}
        found.residuals = (((middle, math.inf), parts), ((-math.inf, middle), later))
    if way.training == "alternate":
        plan = replace(plan, steps=plan.steps // 2)
        _run(twin, found, points, plan, metric)
        codes, trained = {}, found.residuals[0][1]
        for name, weight in twin.dense.items():
            rest = weight - (trained[name].up @ trained[name].down).detach()
            codes[name] = quantize_layer(rest, replace(settings, rank=0), twin.statistics[name]).weight
        found = replace(found, codes=codes, values={name: weight.dequantize() for name, weight in codes.items()})
    _run(twin, found, points, plan, metric)
    return found


def _run(twin: Twin, found: _Made, points: Points, plan: Plan, metric: torch.Tensor | None) -> None:
    """Trains the residuals in place; adds what it took to `told`."""
    begun, residuals = time.monotonic(), [part for _, parts in found.residuals for part in parts.values()]
    twin.put(found.values, *found.residuals)
    tuned = twin.train(points, residuals, plan, metric)
    found.told["training"] = found.told.get("training", 0.0) + time.monotonic() - begun
    found.told["step"] = tuned.best.step
