"""Calibrate for BitLinear: a sampling that records what goes into every linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..bonsai_ops.host.patch.calibrate import DETAILS, sample_recorded
from ..bonsai_ops.host.sampling import Sampling
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Calibration = io.Custom("BONSAI_CALIBRATION")


class CalibrateBitLinear(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibrateBitLinear",
            display_name="Calibrate for BitLinear",
            category=inputs.CATEGORY,
            description="Samples once with the dense model and records how large each input of its linear layers is, "
            "for Patch to BitLinear. A few steps with a typical prompt are enough.",
            inputs=[
                io.Model.Input("model", tooltip="The dense model that Patch to BitLinear will get."),
                *inputs.sampling(),
                io.Combo.Input(
                    "mode",
                    options=list(DETAILS),
                    default="power",
                    tooltip="power: the size of each input, next to no memory. full: also how inputs go together, for "
                    "error-compensating rounding: more exact, but slower and up to 4 GB of memory.",
                ),
            ],
            outputs=[
                Calibration.Output("calibration", tooltip="Connect it to Patch to BitLinear."),
                io.Latent.Output(tooltip="What was sampled meanwhile."),
            ],
            **inputs.reports(),
            **inputs.found_as(
                "calibrate",
                "calibration",
                "imatrix",
                "importance matrix",
                "awq",
                "gptq",
                "quantize",
                "bitlinear",
                "bit linear",
            ),
        )

    @classmethod
    def execute(cls, model: ModelPatcher, mode: str = "power", **sampling: Any) -> io.NodeOutput:
        calibration, drawn = sample_recorded(model, Sampling(**sampling), detail=mode)
        return io.NodeOutput(calibration, drawn, ui={"text": [calibration.said]})
