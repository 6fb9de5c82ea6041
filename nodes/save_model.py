"""Save Bonsai Model: a packed MODEL -> one .safetensors that loads without repacking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import comfy.cli_args
import folder_paths
from comfy_api.latest import io

from ..bonsai_ops.host.progress import comfyui_bar
from ..bonsai_ops.host.save import save_bonsai_model, workflow_metadata
from . import inputs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class SaveBonsaiModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveBonsaiModel",
            display_name="Save Bonsai Model",
            category=inputs.CATEGORY,
            description="Writes a packed model as one .safetensors: the smallest form, loaded without repacking. LoRAs "
            'on the model are left out, or become part of it with "include LoRAs".',
            inputs=[
                io.Model.Input("model", tooltip="A model from Load Bonsai Model or Load Bonsai Pack."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/bonsai",
                    tooltip="Folder and name below ComfyUI's output folder; a number is added. With the default, "
                    "Load Bonsai Model lists the file after a refresh.",
                ),
                io.Boolean.Input(
                    "include_loras",
                    default=False,
                    optional=True,
                    display_name="include LoRAs",
                    tooltip="Off: the model without its LoRAs. On: plain LoRAs become part of the file, with their "
                    "strengths, as 16-bit or 32-bit branches beside the packed layers; it grows by about their size "
                    "and needs no LoRA file. DoRA, LoHa, LoKr and the like are refused.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            **inputs.found_as(
                "save model", "save diffusion model", "save checkpoint", "export", "merge lora", "bake lora", "quantize"
            ),
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str, include_loras: bool = False) -> io.NodeOutput:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        hidden = cls.hidden
        said = not comfy.cli_args.args.disable_metadata
        extra = workflow_metadata(hidden.prompt, hidden.extra_pnginfo) if said else {}
        said = save_bonsai_model(model, path, progress=comfyui_bar(), extra=extra, include_loras=include_loras)
        return io.NodeOutput(ui={"text": [str(path), *filter(None, [said])]})
