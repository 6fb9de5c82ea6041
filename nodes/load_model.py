"""Load Bonsai Model: a transformer file of any format -> MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..bonsai_ops.host import folders
from ..bonsai_ops.host.loader import load_bonsai_model
from ..bonsai_ops.host.progress import comfyui_bar
from . import inputs


class LoadBonsaiModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadBonsaiModel",
            display_name="Load Bonsai Model",
            category=inputs.CATEGORY,
            description="Loads a 1-bit or ternary Bonsai transformer and keeps it packed in memory. Reads MLX, "
            "gemlite, GGUF and unpacked releases and files written by Save Bonsai Model.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    tooltip="A transformer file in models/bonsai or models/diffusion_models. Best: the MLX release "
                    "(diffusion_pytorch_model.safetensors); it runs on every device.",
                ),
                *inputs.loading(),
            ],
            outputs=[io.Model.Output(tooltip="An ordinary MODEL: use it with any sampler.")],
            **inputs.found_as(
                "load diffusion model",
                "load unet",
                "unet loader",
                "load checkpoint",
                "gguf",
                "mlx",
                "gemlite",
                "low vram",
                *inputs.KLEIN,
                essential=True,
            ),
        )

    @classmethod
    def execute(cls, model_name: str, **options: str) -> io.NodeOutput:
        return io.NodeOutput(load_bonsai_model(folders.model_path(model_name), options, progress=comfyui_bar()))
