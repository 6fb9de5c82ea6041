"""Sampling as a benchmark does it: Euler on given sigmas, told when each step has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .start import synchronise

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

TEXT_TOKENS = 512


def empty_latent(size: int | tuple[int, int]) -> torch.Tensor:
    """Zeros [1, 128, height / 16, width / 16] for (width, height), or for one number that is both."""
    width, height = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, 128, height // 16, width // 16)


def random_condition(model: ModelPatcher) -> list:
    """What a text encoder would give for a prompt, of Gaussian numbers, the same each time."""
    channels = model.model.model_config.unet_config["context_in_dim"]
    embeds = torch.randn(1, TEXT_TOKENS, channels, generator=torch.Generator().manual_seed(0))
    return [[embeds, {"pooled_output": None}]]


def sample(
    model: ModelPatcher,
    size: int | tuple[int, int],
    sigmas: torch.Tensor,
    condition: list,
    device: str,
    ended: Callable[[], None],
    velocities: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The latent of seed 0; `ended` is called after each step, when the device has done it.

    velocities: gets sigma times that of each step, with the latent's shape.
    """
    import comfy.sample
    import comfy.samplers

    latent = empty_latent(size)

    def callback(_: int, denoised: torch.Tensor, x: torch.Tensor, *__: object) -> None:
        synchronise(device)
        if velocities is not None:
            velocities.append(x - denoised)
        ended()

    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, 0),
        1.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        condition,
        condition,
        latent,
        callback=callback,
        disable_pbar=True,
    )
