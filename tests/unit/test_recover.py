"""Residuals trained together: against a small dense network whose layers were rounded, with no ComfyUI."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from bonsai_ops.quantize import Settings, quantize_layer, recover
from bonsai_ops.quantize.recover import Plan, Residual, Tuned, tune

WIDTH, RANK, POINTS = 64, 8, 24
TRAINED, HELD = range(POINTS - 6), range(POINTS - 6, POINTS)


class Net:
    """Three layers with a nonlinearity between them: dense, and rounded with residuals."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dense = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(3)]
        made = [quantize_layer(w, Settings("ternary", 64, rank=RANK)).weight for w in self.dense]
        self.codes = [weight.without_residual().dequantize() for weight in made]
        self.residuals = [Residual(weight.up, weight.down) for weight in made]
        self.inputs = torch.randn(POINTS, 8, WIDTH, generator=generator)
        self.truth = self.forward(self.inputs, self.dense)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, weights: list[torch.Tensor], residuals: Any = (None,) * 3) -> torch.Tensor:
        for weight, residual in zip(weights, residuals, strict=True):
            y = x @ weight.T
            x = torch.tanh(y if residual is None else y + x @ residual.down.T @ residual.up.T)
        return x

    def error(self, point: int) -> torch.Tensor:
        self.calls.append(point)
        found = self.forward(self.inputs[point], self.codes, self.residuals)
        return (found - self.truth[point]).square().sum() / self.truth[list(HELD)].square().sum((1, 2)).mean()

    def held_out(self) -> float:
        """The relative error in float64, by the definition."""
        with torch.no_grad():
            found = self.forward(self.inputs[list(HELD)], self.codes, self.residuals).double()
        truth = self.truth[list(HELD)].double()
        return float((found - truth).norm() / truth.norm())

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for residual in self.residuals for parameter in residual.parameters()]

    def tuned(self, plan: Plan, **options: Any) -> Tuned:
        return tune(self.residuals, options.pop("error", self.error), TRAINED, HELD, plan, **options)


PLAN = Plan(steps=40, learning_rate=1e-2, batch=4)


def test_the_error_falls_and_is_what_it_says() -> None:
    """Measured as stored, in bf16; a layer's best residual is the start; held-out points are never trained on."""
    net = Net()
    before, started = net.held_out(), net.values()
    found = net.tuned(PLAN)
    assert found.before.held_out == pytest.approx(before, rel=1e-4) and found.before.training is None
    assert found.best.held_out == pytest.approx(net.held_out(), rel=1e-4) and found.best.held_out < 0.9 * before
    assert all(torch.equal(value, value.bfloat16().float()) for value in net.values())
    assert not any(torch.equal(a, b) for a, b in zip(started, net.values(), strict=True))
    assert [look.step for look in found.looks] == list(range(0, 41, 4)) and found.finite
    counts = [net.calls.count(point) for point in range(POINTS)]
    assert counts[POINTS - 6 :] == [11] * 6 and sum(counts) == 11 * 6 + 160
    assert max(counts[: POINTS - 6]) - min(counts[: POINTS - 6]) <= 1


def test_the_same_twice_and_another_seed() -> None:
    first, second, other = Net(), Net(), Net()
    looks = [net.tuned(plan) for net, plan in ((first, PLAN), (second, PLAN))]
    assert looks[0] == looks[1] and all(map(torch.equal, first.values(), second.values()))
    other.tuned(dataclasses.replace(PLAN, seed=1))
    assert not all(map(torch.equal, first.values(), other.values()))


def test_it_goes_on_from_its_own_result() -> None:
    net = Net()
    first, second = net.tuned(PLAN), net.tuned(PLAN)
    assert second.before.held_out == first.best.held_out
    assert second.best.held_out < first.best.held_out


@pytest.mark.parametrize("rate", [1e3, 1e30], ids=["worse", "not finite"])
def test_never_worse_than_what_came_in(rate: float) -> None:
    net = Net()
    started = net.values()
    found = net.tuned(Plan(steps=6, learning_rate=rate, batch=2))
    assert found.best is found.before and all(map(torch.equal, started, net.values()))


def test_an_error_that_is_not_finite_ends_it() -> None:
    net, plan = Net(), Plan(steps=10, batch=1)
    good = net.error

    def error(point: int) -> torch.Tensor:
        return good(point) * (math.nan if len(net.calls) > 30 else 1.0)

    found = net.tuned(plan, error=error)
    assert not found.finite and found.looks[-1].step < 10 and math.isfinite(found.best.held_out)
    assert all(bool(torch.isfinite(value).all()) for value in net.values())


def test_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further step begins, the rate has fallen by then, and what was reached counts."""
    clock = itertools.count()
    monkeypatch.setattr(recover.time, "monotonic", lambda: float(next(clock)))
    net = Net()
    found = net.tuned(Plan(steps=1000, learning_rate=1e-2, batch=2, seconds=30.0))
    assert found.looks[-1].step == 30 and found.best.held_out < found.before.held_out
    assert found.best.held_out == pytest.approx(net.held_out(), rel=1e-4)


def test_progress_counts_to_the_end_and_what_it_raises_ends_it() -> None:
    net, seen = Net(), []
    net.tuned(Plan(steps=5, batch=3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 15 + 6 * 6) for i in range(51)]

    def cancel(done: int, total: int) -> None:
        if done == 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        net.tuned(Plan(steps=5, batch=3), progress=cancel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_as_it_came(dtype: torch.dtype) -> None:
    """What is not made better comes back to the bit, in any dtype of a residual."""
    up, down = (torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    residual = Residual(up, down)
    tune([residual], lambda _: residual.up.sum() * 0 + 1.0, [0], [1], Plan(steps=2, batch=1))
    assert residual.stored == dtype
    assert torch.equal(residual.up.to(dtype), up) and torch.equal(residual.down.to(dtype), down)


def test_a_residual_on_a_weight_is_added_to_it() -> None:
    residual, weight = Residual(torch.randn(6, 2), torch.randn(2, 5)), torch.randn(6, 5)
    assert torch.allclose(residual(weight), weight + residual.up @ residual.down, atol=1e-6)


@pytest.mark.parametrize("name", ["steps", "learning_rate", "batch", "seconds"])
def test_numbers_that_are_not_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected more than 0"):
        dataclasses.replace(PLAN, **{name: 0})
