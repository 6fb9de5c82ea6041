"""Measure BitLinear: a sampling that compares every packed layer with the dense one it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..bonsai_ops.host.patch.measure import sample_measured
from ..bonsai_ops.host.progress import comfyui_bar
from ..bonsai_ops.host.sampling import Sampling
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class MeasureBitLinear(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeasureBitLinear",
            display_name="Measure BitLinear",
            category=inputs.CATEGORY,
            description="Samples once with the packed model and computes the dense layers beside it: how far each "
            "layer's output is off on the inputs that it really gets.",
            inputs=[
                io.Model.Input("original", tooltip="The dense model that was patched."),
                io.Model.Input("patched", tooltip="From Patch to BitLinear, or a packed file of the same model."),
                *inputs.sampling(),
            ],
            outputs=[
                io.String.Output("report", tooltip="Sizes and errors, a line a layer."),
                io.String.Output("csv", tooltip="The same as a table for a spreadsheet."),
                io.Image.Output("plot", tooltip="The errors of every packed layer as a picture."),
                io.Latent.Output(tooltip="What the packed model drew meanwhile."),
            ],
            **inputs.reports(),
            **inputs.found_as(
                "measure",
                "compare models",
                "error",
                "quality",
                "sqnr",
                "quantize",
                "quantization",
                "bitlinear",
                "bit linear",
            ),
        )

    @classmethod
    def execute(cls, original: ModelPatcher, patched: ModelPatcher, **sampling: Any) -> io.NodeOutput:
        report, drawn = sample_measured(original, patched, Sampling(**sampling), comfyui_bar())
        text, csv, picture = inputs.report(report)
        return io.NodeOutput(text, csv, picture, drawn, ui=inputs.on_node(text, picture))
