"""Load Bonsai Text Encoder: a pack's 4-bit Qwen3 -> CLIP."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..bonsai_ops.host import folders
from ..bonsai_ops.host.progress import comfyui_bar
from ..bonsai_ops.host.text_encoder import load_bonsai_text_encoder
from . import inputs


class LoadBonsaiTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadBonsaiTextEncoder",
            display_name="Load Bonsai Text Encoder",
            category=inputs.CATEGORY,
            description="Loads the 4-bit Qwen3 text encoder of a Bonsai pack (MLX or HQQ), or Qwen3-4B-4bit of "
            "mlx-community, and keeps it in 4 bit. Stock CLIPLoader with qwen_3_4b.safetensors and type flux2 serves "
            "as well.",
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=folders.text_encoder_names(),
                    tooltip="The text encoder: model.safetensors of an MLX pack or of mlx-community/Qwen3-4B-4bit (the "
                    "same file), or qmodel.pt of a gemlite pack, in models/bonsai or models/text_encoders.",
                ),
                inputs.text_dtype("compute_dtype"),
            ],
            outputs=[io.Clip.Output(tooltip="Connect it to CLIP Text Encode.")],
            **inputs.found_as(
                "load clip",
                "clip loader",
                "qwen3",
                "qwen",
                "hqq",
                "mlx",
                "4-bit",
                "4 bit",
                "low vram",
                *inputs.KLEIN,
                essential=True,
            ),
        )

    @classmethod
    def execute(cls, text_encoder_name: str, **options: str) -> io.NodeOutput:
        path = folders.text_encoder_path(text_encoder_name)
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(load_bonsai_text_encoder(path, embeddings, progress=comfyui_bar(), **options))
