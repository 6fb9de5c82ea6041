"""The seedling's dense model, and what becomes of it with packed values in its layers.

Its points are what it computes while it samples: x, sigma and velocity of each step. Distances from it are measured on
prompts and noise that nothing was calibrated, trained or chosen on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bonsai_ops.host.schedule import official_sigmas
from bonsai_ops.quantize import Recorder, Settings, Statistics, quantize_layer
from bonsai_ops.quantize.recover import Look, Plan, Residual, Tuned, tune
from bonsai_ops.weights.packed_weight import PackedWeight

from . import transformer, vae
from .captions import caption
from .measure import accuracy, held_out, painter
from .scene import random_scene
from .speed import frozen, narrow

SIZE, TOKENS, TEXT = (128, 128), 64, transformer.SHORT_TEXT
PROMPTS, CALIBRATED, CHOOSING, MEASURED = 320, 24, 24, 24
"""Prompts that a training learns from, that calibrate, that choose a training's best state, and for the distances."""
HELD_OUT = 64
"""Held-out prompts: the first of them are drawn and measured, the last choose."""
BATCH, GROUP = 16, 8
"""Points of a step of training, and of a look at those that choose."""

Range = tuple[float, float]
"""Sigmas above the first up to the second."""


@dataclass(frozen=True)
class Points:
    """text [P, T, 384]; sigmas [S]; x and velocity [S, P, L, 128] of P samplings of S steps; last [P, L, 128]."""

    text: torch.Tensor
    sigmas: torch.Tensor
    x: torch.Tensor
    velocity: torch.Tensor
    last: torch.Tensor

    def batches(self, size: int, rng: random.Random | None = None) -> list[list[tuple[int, int]]]:
        """All (step, prompt), `size` at a time, in an order that `rng` gives."""
        every = list(itertools.product(range(len(self.sigmas)), range(len(self.text))))
        if rng is not None:
            rng.shuffle(every)
        return [every[i : i + size] for i in range(0, len(every), size)]


def beside(
    x: torch.Tensor, y: torch.Tensor, sigma: torch.Tensor, residuals: Sequence[tuple[Range, Residual]]
) -> torch.Tensor:
    """y [B, .., N] + x down^T up^T for x [B, .., K], in x's dtype, where sigma [B] is in a residual's range."""
    for (low, high), residual in residuals:
        inside = (sigma > low) & (sigma <= high)
        up, down = residual.up.to(x.dtype), residual.down.to(x.dtype)
        product = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
        y = torch.where(inside.view(-1, *[1] * (y.ndim - 1)), y + product, y)
    return y


class Twin:
    """The dense model, whose layers can be given other weights, and residuals beside them.

    statistics: {layer: what goes into it} in the dense model, on prompts of their own. choosing, measured: the dense
    model's points, on which the best state of a training is chosen, and on which distances are measured.
    """

    def __init__(self, work: Path, comfyui: Path) -> None:
        self.model = frozen(transformer.load(work, "dense"))
        self.feed, self.decoder = transformer.Feed(work, comfyui), vae.load(work)
        self.layers = dict(transformer.packed_layers(self.model))
        self.dense = {name: layer.weight.detach().float().clone() for name, layer in self.layers.items()}
        self._residuals: Sequence[tuple[Range, Mapping[str, Residual]]] = ()
        self.model.register_forward_pre_hook(self._note_sigma, with_kwargs=True)
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, inputs, y, name=name: self._beside(name, inputs[0], y))
        prompts = [prompt for _, prompt in held_out(HELD_OUT)]
        self._prompts, self._packed, self._known = prompts[:MEASURED], {}, {}
        self.statistics = self._calibrated()
        self.measured = self.points(self._prompts, 700)
        self.choosing = self.points(prompts[-CHOOSING:], 500)

    @torch.no_grad()
    def put(self, values: Mapping[str, torch.Tensor], *residuals: tuple[Range, Mapping[str, Residual]]) -> None:
        """Gives the layers these weights [N, K], and for each range of sigmas residuals beside them."""
        for name, layer in self.layers.items():
            layer.weight.copy_(values[name])
        self._residuals = residuals

    def _note_sigma(self, _: torch.nn.Module, inputs: tuple, named: Mapping[str, torch.Tensor]) -> None:
        self._sigma = named["timestep"]

    def _beside(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return beside(x, y, self._sigma, [(span, parts[name]) for span, parts in self._residuals])

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Velocity [B, L, 128] at x [B, L, 128], sigma [B], for text [B, T, 384]."""
        return transformer.predict(self.model, x, sigma, text, *SIZE).float()

    @torch.no_grad()
    def points(self, prompts: Sequence[str], seed: int) -> Points:
        """Of the model as it is now, with noise of the seeds from `seed` on."""
        text, sigmas = self.feed.encode(list(prompts), TEXT), official_sigmas(TOKENS, transformer.SAMPLING_STEPS)
        noise = [torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(text))]
        x, states, velocities = torch.stack(noise), [], []
        for now, then in itertools.pairwise(sigmas):
            parts = zip(x.split(BATCH), text.split(BATCH), strict=True)
            velocities.append(torch.cat([self.predict(a, now.expand(len(a)), b) for a, b in parts]))
            states.append(x)
            x = x + (then - now) * velocities[-1]
        return Points(text, sigmas[:-1], torch.stack(states), torch.stack(velocities), x)

    def known(self, seed: int) -> Points:
        """The dense model's, for trainings with this seed. Those of the last seed asked for are kept."""
        if seed not in self._known:
            rng = random.Random(f"recovery {seed}")
            self.put(self.dense)
            prompts = [caption(random_scene(rng), rng)[0] for _ in range(PROMPTS)]
            self._known = {seed: self.points(prompts, 10_000 * (seed + 1))}
        return self._known[seed]

    def _calibrated(self) -> dict[str, Statistics]:
        rng, recorder = random.Random("calibration"), Recorder("full")
        with recorder.recording(self.layers.items()):
            self.points([caption(random_scene(rng), rng)[0] for _ in range(CALIBRATED)], 300)
        return recorder.result()

    def packed(self, settings: Settings, calibrated: bool = True) -> dict[str, PackedWeight]:
        """{layer: its quantized weight}; the same again for the same question."""
        if (settings, calibrated) not in self._packed:
            known = self.statistics if calibrated else {}
            self._packed[settings, calibrated] = {
                name: quantize_layer(weight, settings, known.get(name)).weight for name, weight in self.dense.items()
            }
        return self._packed[settings, calibrated]

    def error(
        self, points: Points, batch: Sequence[tuple[int, int]], metric: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Square of the velocity's error relative to all of them; in a metric of `transformer.importance` if given.

        Where it is differentiated, products are `narrow`; where it is only looked at, they are in fp32.
        """
        steps, prompts = (torch.tensor(numbers) for numbers in zip(*batch, strict=True))
        with narrow() if torch.is_grad_enabled() else contextlib.nullcontext():
            found = self.predict(points.x[steps, prompts], points.sigmas[steps], points.text[prompts])
        difference = found - points.velocity[steps, prompts]
        if metric is None:
            return difference.square().mean() / points.velocity.square().mean()
        whole = transformer.weighted_error(points.velocity.flatten(0, 1), metric)
        return transformer.weighted_error(difference, metric) / whole

    def train(
        self,
        points: Points,
        residuals: Sequence[Residual],
        plan: Plan,
        metric: torch.Tensor | None = None,
        told: Callable[[Look], None] | None = None,
    ) -> Tuned:
        """Trains residuals that were put in; a point of the plan is a batch of BATCH."""
        known, asked = points.batches(BATCH, random.Random(plan.seed)), self.choosing.batches(GROUP)
        places = [(points, batch, metric) for batch in known] + [(self.choosing, batch, None) for batch in asked]
        numbers = range(len(places))
        return tune(
            residuals,
            lambda number: self.error(*places[number]),
            numbers[: len(known)],
            numbers[len(known) :],
            plan,
            told=told,
        )

    @torch.no_grad()
    def distances(self) -> dict[str, float | None]:
        """Of the model as it is now.

        velocity: relative root mean square error at the dense model's points. latent: the same of the last latents,
        each model from the same noise by itself. psnr: of the pictures decoded from these, all at once,
        in dB, None if they are the same.
        """
        truth = self.measured
        squares = [float(self.error(truth, batch)) for batch in truth.batches(GROUP)]
        mine = self.points(self._prompts, 700)
        pictures = [torch.from_numpy(vae.decode(self.decoder, latents(p.last))).double() for p in (mine, truth)]
        error = float((pictures[0] - pictures[1]).square().mean())
        return {
            "velocity": math.sqrt(sum(squares) / len(squares)),
            "latent": float((mine.last - truth.last).norm() / truth.last.norm()),
            "psnr": 10 * math.log10(255**2 / error) if error else None,
        }

    def attributes(self) -> dict[str, float]:
        """Share of pictures of the model as it is now in which each attribute is as the prompt says (`accuracy`)."""
        return accuracy(painter(self.model, self.feed, self.decoder, TEXT), *SIZE, batch=BATCH)


def latents(tokens: torch.Tensor) -> torch.Tensor:
    """[B, 128, h, w] of tokens [B, L, 128]."""
    return tokens.transpose(1, 2).unflatten(2, (SIZE[1] // 16, SIZE[0] // 16))
