"""Patch to BitLinear: any diffusion MODEL -> the same with 1-bit or ternary linear layers, and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..bonsai_ops.host.patch import EXCLUDED, RECIPES, PatchOptions, patch_model, patterns
from ..bonsai_ops.host.progress import comfyui_bar
from . import inputs
from .calibrate import Calibration

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..bonsai_ops.host.patch.calibrate import Calibration as Recorded


class PatchToBitLinear(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PatchToBitLinear",
            display_name="Patch to BitLinear",
            category=inputs.CATEGORY,
            description="Quantizes the linear layers of any diffusion model to 1 bit or three levels and keeps them "
            "packed in memory. No training: expect a loss of quality, which the report measures.",
            inputs=[
                io.Model.Input("model", tooltip="Any diffusion model. It stays as it is; LoRAs on it go along."),
                io.Combo.Input(
                    "scheme",
                    options=list(RECIPES),
                    default="ternary",
                    tooltip="ternary: three levels, 1.6 bits a weight. binary: two levels, 1 bit. 4bit, 8bit: 16 or "
                    "256 even steps. Scales come on top.",
                ),
                io.Combo.Input(
                    "group_size",
                    options=["32", "64", "128", "256"],
                    default="128",
                    tooltip="Weights in a row that share one 16-bit scale. Smaller is more exact and larger in memory.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=512,
                    tooltip="Rank of a 16-bit branch beside each packed layer that makes good part of its error. 0: "
                    "none. 32 costs 0.33 bits a weight in a layer of 3072 by 3072.",
                ),
                io.Int.Input(
                    "target_size_mb",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Size in MB that the whole model may have: the layers that suffer most keep 4, 8 or 16 "
                    "bits. 0: every layer is packed alike.",
                ),
                io.String.Input(
                    "include",
                    default="*",
                    tooltip="Layers to pack: names with * for anything, separated by commas or lines, such as "
                    "double_blocks.*",
                ),
                io.String.Input(
                    "exclude",
                    default=", ".join(EXCLUDED),
                    multiline=True,
                    tooltip="Layers that stay as they are: names with * for anything, separated by commas or lines. "
                    "The default leaves out embedders, modulation and the final layer.",
                ),
                io.Boolean.Input(
                    "dry_run", default=False, tooltip="Only report: the model goes through as it came in."
                ),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="From Calibrate for BitLinear: errors are then kept small where the inputs are large.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The packed model: use it with any sampler, or save it."),
                io.String.Output("report", tooltip="Sizes and errors, a line a layer."),
                io.String.Output("csv", tooltip="The same as a table for a spreadsheet."),
                io.Image.Output("plot", tooltip="The error of every packed layer as a picture."),
            ],
            **inputs.reports(),
            **inputs.found_as(
                "quantize",
                "quantization",
                "quantizer",
                "bitlinear",
                "bit linear",
                "compress",
                "4-bit",
                "4 bit",
                "8-bit",
                "gguf",
                "low vram",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        scheme: str = "ternary",
        group_size: str = "128",
        rank: int = 0,
        target_size_mb: int = 0,
        include: str = "*",
        exclude: str = ", ".join(EXCLUDED),
        dry_run: bool = False,
        calibration: Recorded | None = None,
    ) -> io.NodeOutput:
        options = PatchOptions(
            scheme,
            int(group_size),
            rank,
            target_size_mb * 1_000_000 or None,
            patterns(include),
            patterns(exclude),
            dry_run,
        )
        statistics = None if calibration is None else calibration.layers
        patched, report = patch_model(model, options, statistics, comfyui_bar())
        text, csv, picture = inputs.report(report)
        return io.NodeOutput(patched, text, csv, picture, ui=inputs.on_node(text, picture))
