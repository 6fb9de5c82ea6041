"""Sampling as the official pipeline does, through ComfyUI's own sampler: its preview, progress, masks and interrupt."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from .schedule import official_sigmas


def sample_official(model: object, positive: list, latent: dict, seed: int, steps: int, denoise: float) -> dict:
    """Euler steps over the official sigmas at guidance 1; returns a LATENT like `latent`.

    latent["samples"]: [B, 128, H / 16, W / 16] float. Noise is torch's CPU generator seeded with `seed`, as in the
    official pipeline. A noise_mask is honoured.
    """
    samples = _fit(model, latent)
    sigmas = official_sigmas(samples.shape[-1] * samples.shape[-2], steps, denoise)
    out = {name: value for name, value in latent.items() if name != "downscale_ratio_spacial"}
    if len(sigmas) == 0:
        out["samples"] = samples
        return out
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    out["samples"] = comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        positive,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return out


def _fit(model: object, latent: dict) -> torch.Tensor:
    """The latent with the model's channels and scale: an empty latent of another model is turned into an empty one.

    Raises ValueError for a latent with content that belongs to another model.
    """
    ratio = latent.get("downscale_ratio_spacial")
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *([] if ratio is None else [ratio]))
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"the latent has shape {list(samples.shape)}, expected [batch, {channels}, height / 16, width / "
            "16]: encode the picture with the FLUX.2 VAE or use Empty Flux 2 Latent"
        )
    return samples


@dataclass(frozen=True)
class Sampling:
    """A sampling such as KSampler's from noise alone: what to draw, on which latent, and how."""

    positive: list
    negative: list
    latent: dict
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str

    def run(self, model: object) -> dict:
        """The LATENT that `model` draws."""
        latent = self.latent
        ratio = latent.get("downscale_ratio_spacial")
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *([] if ratio is None else [ratio]))
        noise = comfy.sample.prepare_noise(samples, self.seed, latent.get("batch_index"))
        out = {name: value for name, value in latent.items() if name != "downscale_ratio_spacial"}
        out["samples"] = comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler,
            self.scheduler,
            self.positive,
            self.negative,
            samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, self.steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )
        return out
