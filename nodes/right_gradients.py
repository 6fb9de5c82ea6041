"""Right Gradients for Training: a MODEL that ComfyUI's Train LoRA gets right gradients from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..bonsai_ops.host.gradients import with_right_gradients
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class BonsaiRightGradients(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BonsaiRightGradients",
            display_name="Right Gradients for Training",
            category=inputs.CATEGORY,
            description="ComfyUI's FLUX and LTX blocks write into their inputs, which spoils the gradients of Train "
            "LoRA without a message. Behind this node they are right. Sampling is not changed.",
            **inputs.found_as("train lora", "training", "fine-tune", "gradients", "flux", "ltx"),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any diffusion model that is to be trained. Models from our own loaders and from Patch to "
                    "BitLinear need no such node.",
                )
            ],
            outputs=[io.Model.Output(tooltip="The same model. Connect it to Train LoRA.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        return io.NodeOutput(with_right_gradients(model))
