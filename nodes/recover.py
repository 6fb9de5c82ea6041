"""Recover BitLinear: trains the residuals of a packed model to undo together what rounding did to the dense one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from ..bonsai_ops.host.patch.recover import Plan, Recovery, recover
from ..bonsai_ops.host.progress import comfyui_bar
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class RecoverBitLinear(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RecoverBitLinear",
            display_name="Recover BitLinear",
            category=inputs.CATEGORY,
            description="Trains the 16-bit branches of a model from Patch to BitLinear until it predicts what the "
            "dense model predicts. The model keeps its size; points that are not trained on decide what is kept.",
            is_input_list=True,
            inputs=[
                io.Model.Input("original", tooltip="The dense model that was patched."),
                io.Model.Input(
                    "patched", tooltip="From Patch to BitLinear with a rank, or from an earlier Recover BitLinear."
                ),
                io.Conditioning.Input(
                    "prompts",
                    tooltip="Typical prompts, the more the better: a list, or several combined; each counts by itself.",
                ),
                io.Latent.Input("latent", tooltip="An empty latent of the size you use."),
                io.Sigmas.Input("sigmas", tooltip="The schedule that you sample with, from a scheduler node."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate="fixed",
                    tooltip="Noise and order of the points. Another one to go on with new points.",
                ),
                *_numbers(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The packed model with better branches, for any sampler and Save Bonsai Model."
                ),
                io.String.Output("report", tooltip="The error before, during and after."),
                io.Image.Output("plot", tooltip="The same as a picture."),
            ],
            **inputs.reports(),
            **inputs.found_as(
                "recover",
                "distill",
                "distillation",
                "fine-tune",
                "training",
                "quality",
                "quantize",
                "quantization",
                "bitlinear",
                "bit linear",
            ),
        )

    @classmethod
    def execute(
        cls,
        original: list[ModelPatcher],
        patched: list[ModelPatcher],
        prompts: list[list],
        latent: list[dict],
        sigmas: list[torch.Tensor],
        seed: list[int],
        points: list[int],
        steps: list[int],
        batch: list[int],
        learning_rate: list[float],
        minutes: list[float],
    ) -> io.NodeOutput:
        seconds = 60 * minutes[0] or math.inf
        plan = Plan(steps[0], learning_rate[0], batch[0], seed[0], seconds)
        wanted = Recovery(prompts, latent[0], sigmas[0], points[0], plan)
        model, found = recover(original[0], patched[0], wanted, comfyui_bar())
        text, picture = found.to_text(), torch.from_numpy(found.draw()).unsqueeze(0)
        return io.NodeOutput(model, text, picture, ui=inputs.on_node(text, picture))


def _numbers() -> list[io.Input]:
    """How much to learn from and how long."""
    return [
        io.Int.Input(
            "points",
            default=320,
            min=2,
            max=100000,
            tooltip="How many steps of the dense model to learn from, over all prompts. One in eight is held out.",
        ),
        io.Int.Input("steps", default=200, min=1, max=100000, tooltip="Steps of training. 100 to 300 do."),
        io.Int.Input("batch", default=8, min=1, max=1024, tooltip="Points a step of training, one after the other."),
        io.Float.Input(
            "learning_rate",
            default=0.001,
            min=0.000001,
            max=1.0,
            step=0.0001,
            tooltip="Of Adam, at its highest. Lower it if the error does not fall.",
        ),
        io.Float.Input(
            "minutes",
            default=0.0,
            min=0.0,
            max=10000.0,
            step=1.0,
            tooltip="Training ends after so many minutes with the best so far. 0: after all steps.",
        ),
    ]
