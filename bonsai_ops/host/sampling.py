"""Sampling as the official pipeline does, through ComfyUI's own sampler: its preview, progress, masks and interrupt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from . import comfyui
from .misfit import as_conds, explained
from .schedule import official_sigmas

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

RATIO = "downscale_ratio_spacial"
"""Key of an empty LATENT that says for which models it was sized; a sampled one has none."""


def sample_official(model: ModelPatcher, positive: list, latent: dict, seed: int, steps: int, denoise: float) -> dict:
    """Euler steps over the official sigmas at guidance 1; returns a LATENT like `latent`.

    latent["samples"]: [B, 128, H / 16, W / 16] float. Noise is torch's CPU generator seeded with `seed`, as in the
    official pipeline. A noise_mask is honoured. Raises ValueError for a latent with content of another model's shape
    and for a conditioning that is empty, MisfitError for one of another model.
    """
    if not positive:
        raise ValueError("the positive conditioning is empty: connect CLIP Text Encode")
    samples = prepared(model, latent)
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"the latent has shape {list(samples.shape)}, expected [batch, {channels}, height / 16, width / "
            "16]: encode the picture with the FLUX.2 VAE or use Empty Flux 2 Latent"
        )
    sigmas = official_sigmas(samples.shape[-1] * samples.shape[-2], steps, denoise)
    if len(sigmas) == 0:
        return _finished(latent, samples)
    euler = comfy.samplers.sampler_object("euler")
    how = (1.0, euler, sigmas, positive, positive)
    with explained(model.model, {"positive": as_conds(positive)}, samples):
        return _sampled(comfy.sample.sample_custom, model, latent, samples, how, seed, steps)


@dataclass(frozen=True)
class Sampling:
    """A sampling such as KSampler's from noise alone: what to draw, on which latent, and how."""

    positive: list
    negative: list
    latent: dict
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str

    def run(self, model: ModelPatcher) -> dict:
        """The LATENT that `model` draws. Raises MisfitError for inputs of another model."""
        how = (self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive, self.negative)
        samples = prepared(model, self.latent)
        conds = {"positive": as_conds(self.positive), "negative": as_conds(self.negative)}
        with explained(model.model, conds, samples):
            return _sampled(comfy.sample.sample, model, self.latent, samples, how, self.seed, self.steps)


def prepared(model: ModelPatcher, latent: dict) -> torch.Tensor:
    """The samples of a LATENT; those of an empty one with the model's channels and scale."""
    ratio = [latent[RATIO]] if latent.get(RATIO) is not None else []  # ComfyUI 0.16 takes none
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratio)


def _sampled(
    sample: Callable[..., torch.Tensor],
    model: ModelPatcher,
    latent: dict,
    samples: torch.Tensor,
    how: tuple[Any, ...],
    seed: int,
    steps: int,
) -> dict:
    """The LATENT that `sample`, a function of comfy.sample, makes of prepared samples and noise.

    how: its arguments between the noise and the samples.
    """
    preview = comfyui.optional("latent_preview.prepare_callback")
    made = sample(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        *how,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=None if preview is None else preview(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return _finished(latent, made)


def _finished(latent: dict, samples: torch.Tensor) -> dict:
    """`latent` with other samples."""
    return {name: value for name, value in latent.items() if name != RATIO} | {"samples": samples}
