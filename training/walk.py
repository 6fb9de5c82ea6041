"""A model in ComfyUI along Euler's way: its points, what another model makes of them, and how far the two are apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Start:
    """Where a sampling begins: a CONDITIONING, the seed of the noise, an empty latent [1, ..] and its sigmas."""

    prompt: list
    seed: int
    latent: torch.Tensor
    sigmas: torch.Tensor


@dataclass(frozen=True)
class Point:
    """What went into the model, [1, ..], and its velocity there."""

    x: torch.Tensor
    sigma: torch.Tensor
    velocity: torch.Tensor


@dataclass(frozen=True)
class Way:
    """A sampling with its points and the last latent."""

    start: Start
    points: Sequence[Point]
    last: torch.Tensor


def sampled(model: ModelPatcher, start: Start) -> Way:
    """Euler's way from there."""
    points: list[Point] = []

    def walk(
        denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Mapping, **_: object
    ) -> torch.Tensor:
        for now, then in itertools.pairwise(sigmas):
            velocity = (x - denoise(x, now.expand(1), **extra_args)) / now
            points.append(Point(x, now, velocity))
            x = x + (then - now) * velocity
        return x

    return Way(start, points, _drive(model, start, walk))


def distances(model: ModelPatcher, truth: Sequence[Way]) -> dict[str, float]:
    """{"velocity", "latent"}: relative errors (root mean square) at the points of another model, and of the last
    latents, each model from the same noise by itself."""
    wrong = all_of = off = whole = 0.0
    for way in truth:
        for point, velocity in zip(way.points, _velocities(model, way), strict=True):
            wrong += float((velocity - point.velocity).square().sum())
            all_of += float(point.velocity.square().sum())
        off += float((sampled(model, way.start).last - way.last).square().sum())
        whole += float(way.last.square().sum())
    return {"velocity": math.sqrt(wrong / all_of), "latent": math.sqrt(off / whole)}


def _velocities(model: ModelPatcher, way: Way) -> list[torch.Tensor]:
    """The model's at the points of this way."""
    found: list[torch.Tensor] = []

    def visit(denoise: Callable, x: torch.Tensor, _: torch.Tensor, extra_args: Mapping, **__: object) -> torch.Tensor:
        for point in way.points:
            found.append((point.x - denoise(point.x, point.sigma.expand(1), **extra_args)) / point.sigma)
        return x

    _drive(model, way.start, visit)
    return found


def _drive(model: ModelPatcher, start: Start, sampler: Callable) -> torch.Tensor:
    """Lets ComfyUI load the model and prepare the prompt, and calls `sampler` as it calls one of its own."""
    import comfy.sample
    import comfy.samplers

    how, noise = comfy.samplers.KSAMPLER(sampler), comfy.sample.prepare_noise(start.latent, start.seed)
    return comfy.sample.sample_custom(
        model, noise, 1.0, how, start.sigmas, start.prompt, [], start.latent, disable_pbar=True, seed=start.seed
    )
