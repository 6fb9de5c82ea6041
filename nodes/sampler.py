"""Bonsai Sampler: the official schedule, Euler, guidance 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..bonsai_ops.host.sampling import sample_official
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class BonsaiSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BonsaiSampler",
            display_name="Bonsai Sampler",
            category=inputs.CATEGORY,
            description="Samples as the official Bonsai pipeline does: its sigmas for the image's size, Euler steps, "
            "no guidance. Reference latents on the conditioning work as with any sampler.",
            inputs=[
                io.Model.Input("model", tooltip="A Bonsai model, or any FLUX.2 Klein model."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. A negative prompt has no effect without guidance."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty FLUX.2 latent for text to image, an encoded picture for image "
                    "to image (with denoise below 1).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise: the same seed and size give the same picture.",
                ),
                io.Int.Input("steps", default=4, min=1, max=100, tooltip="Number of steps. The model was made for 4."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the picture is drawn anew: 1 ignores the latent's content, less keeps "
                    "more of it.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Connect it to VAE Decode.")],
            **inputs.found_as("ksampler", "sample", "euler", *inputs.KLEIN, essential=True),
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, positive: list, latent: dict, seed: int, steps: int = 4, denoise: float = 1.0
    ) -> io.NodeOutput:
        return io.NodeOutput(sample_official(model, positive, latent, seed, steps, denoise))
