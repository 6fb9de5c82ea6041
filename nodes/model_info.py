"""Bonsai Model Info: what a packed MODEL is, as text and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..bonsai_ops.host import info as model_info
from ..bonsai_ops.host.inventory import take_inventory
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class BonsaiModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BonsaiModelInfo",
            display_name="Bonsai Model Info",
            category=inputs.CATEGORY,
            description="Shows what a packed model takes in memory, which backend multiplies it and why no faster one.",
            inputs=[io.Model.Input("model", tooltip="A model from Load Bonsai Model or Load Bonsai Pack.")],
            outputs=[
                io.String.Output("text", tooltip="The facts, a line each."),
                io.Image.Output(
                    "picture", tooltip="The same as a picture, with the memory beside that of a dense bf16 model."
                ),
            ],
            is_output_node=True,
            **inputs.found_as("model info", "inspect", "memory", "vram", "size", "backend", "quantization"),
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        found = take_inventory(model)
        lines = model_info.describe(model, found)
        text, picture = model_info.to_text(lines), model_info.draw(found, lines)
        return io.NodeOutput(text, picture, ui=inputs.on_node(text, picture))
