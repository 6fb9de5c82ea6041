"""What a training of residuals came to, as text and as a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...quantize.recover import Plan, Tuned
from ..sheet import FAINT, GAP, GREEN, LARGE, SMALL, YELLOW, Sheet, bytes_text
from .unfinished import Unfinished

CHART = 240
"""Pixels of height."""


@dataclass(frozen=True)
class Recovered:
    """model: its class. nbytes: of the residuals. points: (trained on, held out). asked: (prompts, points asked for).
    seconds: of (sampling, training). begun: what a cancelled run had kept, which this one went on from."""

    model: str
    tuned: Tuned
    plan: Plan
    nbytes: int
    points: tuple[int, int]
    asked: tuple[int, int]
    seconds: tuple[float, float]
    begun: Unfinished | None = None

    @property
    def headline(self) -> str:
        """Before and after."""
        return f"velocity error {self.tuned.before.held_out:.4f} -> {self.tuned.best.held_out:.4f}"

    def to_text(self) -> str:
        """The errors, what was done, and a line a look at the held-out points."""
        trained, held = self.points
        plan, best = self.plan, self.tuned.best
        lines = [
            f"{self.model}, recovered: relative {self.headline} on {held} held-out points",
            f"{self.tuned.looks[-1].step} of {plan.steps} steps, {plan.batch} points each, of {trained} points of "
            f"{self.asked[0]} prompts; learning rate {plan.learning_rate:g}, seed {plan.seed}",
            f"residuals of {bytes_text(self.nbytes)} trained; the model is as large as before",
            f"sampled in {self.seconds[0]:.1f} s, trained in {self.seconds[1]:.1f} s",
        ]
        if self.begun is not None:
            before, kept = self.begun.before.held_out, self.begun.best
            error = f"{before:.4f} -> {kept.held_out:.4f}"
            lines.append(f"went on from what was kept at Cancel, after step {kept.step}: error {error}")
        if best is self.tuned.before:
            came = "were kept" if self.begun is not None else "came in"
            lines.append(f"no step made it better: the residuals are those that {came}")
        elif best is not self.tuned.looks[-1]:
            lines.append(f"the best residuals are those after step {best.step}")
        if not self.tuned.finite:
            lines.append("the training ended early, at values that were not finite: try a lower learning rate")
        lines += ["", "  step  held out  trained on"]
        for look in self.tuned.looks:
            training = "" if look.training is None else f"{look.training:.4f}"
            lines.append(f"{look.step:6d}  {look.held_out:8.4f}  {training:>10}")
        return "\n".join(lines)

    def draw(self) -> np.ndarray:
        """The error of the held-out points at each look, marked with that of the points trained on: float32
        [H, W, 3] in 0 .. 1."""
        sheet = Sheet()
        sheet.text(self.headline, LARGE)
        sheet.text(f"{self.model}, {self.plan.steps} steps", color=FAINT)
        sheet.gap()
        sheet.text("relative error of the velocity, from before the first step to after the last:", SMALL)
        sheet.gap(2 * GAP)
        looks = [look for look in self.tuned.looks if look.held_out == look.held_out]
        sheet.columns([(look.held_out, GREEN, look.training) for look in looks], CHART, 0.02)
        sheet.keys([("held-out points", GREEN), ("points trained on", YELLOW)])
        return sheet.image()
