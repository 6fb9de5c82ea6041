"""What rounding took from a whole model, won back by training the low-rank residuals of its layers together.

    y = x W^T + x down^T up^T       W: the codes, fixed; up [N, r], down [r, K]: trained, fp32

One layer's best residual (lowrank.py) knows nothing of the layers before and behind it. Trained end to end, against
what the dense model computes, residuals make good one another's errors too. Adam (Kingma and Ba, arXiv 1412.6980)
without weight decay, its rate rising in the first steps and falling along a cosine to nothing.

Points that are not trained on decide which state is the result, as it is stored: rounded to the dtype it came in.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

WARM_UP = 0.05
"""Share of the steps in which the rate rises."""
LOOKS = 10
"""How often the held-out points are asked, beside before the first step."""
CLIP = 1.0
"""The largest norm of a step's gradient; a larger one is made as small."""
MOMENTS = (0.9, 0.99)


class Residual(torch.nn.Module):
    """The residual of one layer while it is trained: fp32 masters of up [N, r] and down [r, K].

    Applied to a dense weight [N, K] it gives the sum of both. stored: the dtype it came in.
    """

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.stored = up.dtype
        self.up = torch.nn.Parameter(up.detach().to(torch.float32, copy=True))
        self.down = torch.nn.Parameter(down.detach().to(torch.float32, copy=True))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).to(weight)


@dataclass(frozen=True)
class Plan:
    """steps: of Adam, each on `batch` points. seconds: after these no further step begins, and the rate falls sooner.

    seed: of the order of the points. Raises ValueError for a number that is not positive.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    batch: int = 16
    seed: int = 0
    seconds: float = math.inf

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True)
class Look:
    """After `step` steps: relative errors (root mean square) on held-out points, and on those of the steps since the
    look before, None at the first."""

    step: int
    held_out: float
    training: float | None = None


@dataclass(frozen=True)
class Tuned:
    """The looks in their order, and which of them was kept: the first is what came in. finite: False if the training
    ended because an error was not."""

    looks: Sequence[Look]
    best: Look
    finite: bool = True

    @property
    def before(self) -> Look:
        return self.looks[0]


def tune(
    residuals: Sequence[Residual],
    error: Callable[[int], torch.Tensor],
    training: Sequence[int],
    held_out: Sequence[int],
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
    told: Callable[[Look], None] | None = None,
    better: Callable[[Tuned, Sequence[Sequence[torch.Tensor]]], None] | None = None,
) -> Tuned:
    """Trains the residuals in place; they end as the best state that a look found, never a worse one than came in.

    error(i): the squared error of point i, a differentiable scalar, in one unit for all points. training, held_out:
    numbers of points. progress(points done, points in all) is called a point; what it raises leaves the residuals as
    they are just then. told: called with every look. better(so far, [(up, down) of each residual, as stored]): called
    where a look found a better state than all before. The same inputs give the same result.
    """
    work = _Work(residuals, error, plan, progress, len(held_out))
    order = _shuffled(training, random.Random(plan.seed))
    parameters = [parameter for residual in residuals for parameter in residual.parameters()]
    adam = torch.optim.Adam(parameters, plan.learning_rate, betas=MOMENTS)
    looks, kept, finite = [Look(0, work.look(held_out))], _copies(residuals), True
    if told is not None:
        told(looks[0])
    best, since, started = looks[0], [], time.monotonic()
    for step in range(1, plan.steps + 1):
        share = max((step - 1) / plan.steps, (time.monotonic() - started) / plan.seconds)
        finite = share >= 1 or work.step(adam, parameters, [next(order) for _ in range(plan.batch)], share, since)
        over = not finite or share >= 1 or step == plan.steps
        if over or step * LOOKS // plan.steps > (step - 1) * LOOKS // plan.steps:
            seen = _root(since)
            look = Look(step, work.look(held_out) if finite else math.nan, seen)
            looks.append(look)
            since.clear()
            if told is not None:
                told(look)
            if look.held_out < best.held_out:
                best, kept = look, _copies(residuals)
                if better is not None:
                    better(Tuned(tuple(looks), best), kept)
        if over:
            break
    take(residuals, kept)
    return Tuned(looks, best, finite)


class _Work:
    """The evaluations of one training, counted towards `progress`."""

    def __init__(
        self,
        residuals: Sequence[Residual],
        error: Callable[[int], torch.Tensor],
        plan: Plan,
        progress: Callable[[int, int], None] | None,
        held_out: int,
    ) -> None:
        self.residuals, self.error, self.plan, self.progress = residuals, error, plan, progress
        self.done, self.total = 0, plan.steps * plan.batch + (1 + min(LOOKS, plan.steps)) * held_out

    def count(self) -> None:
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
        self.done += 1

    @torch.no_grad()
    def look(self, points: Sequence[int]) -> float:
        """The relative error on these points with the residuals as they would be stored."""
        with _rounded(self.residuals):
            found = []
            for point in points:
                self.count()
                found.append(float(self.error(point)))
        return _root(found)

    def step(
        self,
        adam: torch.optim.Adam,
        parameters: Sequence[torch.Tensor],
        points: Sequence[int],
        share: float,
        seen: list[float],
    ) -> bool:
        """One step at this share of the way; False, and nothing is changed, if an error or gradient is not finite."""
        errors = []
        for point in points:
            self.count()
            squared = self.error(point)
            (squared / len(points)).backward()
            errors.append(float(squared.detach()))
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if not math.isfinite(sum(errors)) or not bool(torch.isfinite(norm)):
            return False
        seen += errors
        for group in adam.param_groups:
            group["lr"] = self.plan.learning_rate * _rate(share, self.plan.steps)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return True


def _rate(share: float, steps: int) -> float:
    """Of the peak, at a share of the way."""
    warm = max(WARM_UP, 1 / steps)
    rising = min(1.0, (share + 1 / steps) / warm)
    return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _shuffled(points: Sequence[int], rng: random.Random) -> Iterator[int]:
    """The points in ever new orders, without end."""
    while True:
        yield from rng.sample(points, len(points))


def _root(squares: Sequence[float]) -> float | None:
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def _copies(residuals: Sequence[Residual]) -> list[list[torch.Tensor]]:
    return [[parameter.detach().to(r.stored, copy=True) for parameter in (r.up, r.down)] for r in residuals]


@torch.no_grad()
def take(residuals: Sequence[Residual], values: Sequence[Sequence[torch.Tensor]]) -> None:
    """Gives each residual these values (up, down)."""
    for residual, (up, down) in zip(residuals, values, strict=True):
        residual.up.copy_(up)
        residual.down.copy_(down)


@contextlib.contextmanager
def _rounded(residuals: Sequence[Residual]) -> Iterator[None]:
    """Inside, the residuals have the values that are stored."""
    masters = [[parameter.detach().clone() for parameter in (r.up, r.down)] for r in residuals]
    take(residuals, _copies(residuals))
    try:
        yield
    finally:
        take(residuals, masters)
