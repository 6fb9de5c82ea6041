"""A model as ComfyUI prepares it for a sampling, without the sampling: what its velocity is, at any point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.sample
import comfy.samplers
import torch

from ..compiled import uncompiled
from ..misfit import as_conds, explained

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider


def with_model(
    model: ModelPatcher,
    prompts: list[list],
    samples: torch.Tensor,
    sigmas: torch.Tensor,
    work: Callable[[Loaded], None],
) -> None:
    """Calls `work` with the model loaded and these prompts prepared, as ComfyUI does it for a sampling."""
    noise, sampler = torch.zeros_like(samples), _Sampler(work)
    with explained(model.model, {"prompts": as_conds(prompts)}, samples), uncompiled(model) as plain:
        try:
            comfy.sample.sample_custom(
                plain, noise, 1.0, sampler, sigmas, prompts, [], samples, disable_pbar=True, seed=0
            )
        except KeyError as error:
            if not any(error.args[0] in entry for _, entry in prompts):
                raise ValueError(
                    f"a prompt has no {error.args[0]}, which {type(model.model).__name__} reads: encode the prompts "
                    "with the text encoder that belongs to the original model"
                ) from error
            raise


@dataclass(frozen=True)
class Loaded:
    """A model as a sampler of ComfyUI gets it, with the conditionings prepared."""

    model: BaseModel
    conds: Sequence[dict]
    options: Mapping[str, Any]
    latent: torch.Tensor
    whole: bool

    def velocity(self, prompt: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """[1, ..] of x [1, ..]."""
        times = torch.full((1,), sigma, dtype=torch.float32, device=x.device)
        (denoised,) = comfy.samplers.calc_cond_batch(self.model, [[self.conds[prompt]]], x, times, self.options)
        return (x - denoised) / sigma

    def start(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Where a sampling from this noise begins."""
        times = torch.tensor(sigma, dtype=torch.float32, device=noise.device)
        return self.model.model_sampling.noise_scaling(times, noise, self.latent, self.whole)


class _Sampler(comfy.samplers.Sampler):
    """Hands over what ComfyUI has loaded and prepared, and samples nothing."""

    def __init__(self, work: Callable[[Loaded], None]) -> None:
        self.work = work

    def sample(
        self,
        model_wrap: CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        whole = self.max_denoise(model_wrap, sigmas)
        options = extra_args["model_options"]
        self.work(Loaded(model_wrap.inner_model, model_wrap.conds["positive"], options, latent_image, whole))
        return noise
