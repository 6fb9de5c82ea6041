"""Load Bonsai Pack: one downloaded pack folder -> MODEL, CLIP and VAE."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..bonsai_ops.host import folders
from ..bonsai_ops.host.pack import load_pack
from ..bonsai_ops.host.progress import comfyui_bar
from . import inputs

TEXT_DTYPE = "text_compute_dtype"


class LoadBonsaiPack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadBonsaiPack",
            display_name="Load Bonsai Pack",
            category=inputs.CATEGORY,
            description="Loads transformer, text encoder and VAE of one downloaded Bonsai repository.",
            inputs=[
                io.Combo.Input(
                    "pack_name",
                    options=folders.pack_names(),
                    tooltip="A folder in models/bonsai that holds a whole Bonsai repository: MLX, gemlite or unpacked.",
                ),
                *inputs.loading(),
                inputs.text_dtype(TEXT_DTYPE),
            ],
            outputs=[
                io.Model.Output(tooltip="An ordinary MODEL: use it with any sampler."),
                io.Clip.Output(tooltip="The pack's text encoder, kept in 4 bit."),
                io.Vae.Output(tooltip="The pack's FLUX.2 VAE."),
            ],
            **inputs.found_as(
                "load checkpoint",
                "load diffusion model",
                "mlx",
                "gemlite",
                "low vram",
                *inputs.KLEIN,
                essential=True,
            ),
        )

    @classmethod
    def execute(cls, pack_name: str, **options: str) -> io.NodeOutput:
        embeddings, of_text = folder_paths.get_folder_paths("embeddings"), options.pop(TEXT_DTYPE, "auto")
        return io.NodeOutput(*load_pack(folders.pack_path(pack_name), options, embeddings, comfyui_bar(), of_text))
