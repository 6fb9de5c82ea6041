"""Tiny files with random weights for whatever the workflows load that does not ship; the pictures they draw are noise.

ComfyUI's own VAELoader accepts only VAEs of the published widths, so it is taken out of a workflow and its links start
at a Load Bonsai Pack node instead. All other nodes, values and links stay as they are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from bonsai_ops.tools.synthetic import TINY, write_dense, write_pipeline

SHIPPED_PACK = "seedling"
PICTURES = "tiny-files"
"""A folder of pictures with captions."""
PACK, MODEL, PICTURE = "tiny-files", "tiny-files.safetensors", "tiny-files.png"
DENSE, ENCODER = "tiny-files-dense.safetensors", "tiny-files-encoder.safetensors"
LORA, LORA_RANK = "tiny-files-lora.safetensors", 4
REPLACED = {
    "LoadBonsaiModel": MODEL,
    "LoadBonsaiPack": PACK,
    "LoadBonsaiTextEncoder": ENCODER,
    "LoadImage": PICTURE,
    "LoadImageTextDataSetFromFolder": PICTURES,
    "LoraLoaderModelOnly": LORA,
    "UNETLoader": DENSE,
}
NOT_SHIPPED = {"LoadImage": PICTURE, "LoadImageTextDataSetFromFolder": PICTURES, "LoraLoaderModelOnly": LORA}
"""Node: file that takes the place of one that the user brings, for which the workflow names no address."""
STOCK_LOADERS = {"VAELoader": 2}
"""Loader: output of Load Bonsai Pack that takes its place."""
TRAINING = {"TrainLoraNode": {2: 2}, "RecoverBitLinear": {2: 8, 3: 1, 4: 1}}
"""Nodes that take minutes as they are saved: {place among their values: what is enough here} of steps and the like."""
SIDES_AT = {"EmptyFlux2LatentImage": (0, 1), "ImageScale": (1, 2), "PrimitiveInt": (0,), "Flux2Scheduler": (1, 2)}
"""{node: places of width and height}. Half of them is enough: a quarter of the time, and noise in any case."""
MEGAPIXELS, MEGAPIXELS_AT, LARGE = "ImageScaleToTotalPixels", 1, 256
"""A node that is told the area, where; sides from which on a workflow is drawn smaller."""


@contextlib.contextmanager
def written(base_directory: Path) -> Iterator[None]:
    """Inside, ComfyUI with this base directory has the files; they are removed at the end."""
    models, picture = base_directory / "models", base_directory / "input" / PICTURE
    folder = base_directory / "input" / PICTURES
    pack, lora = models / "bonsai" / PACK, models / "loras" / LORA
    model, dense = (models / "diffusion_models" / name for name in (MODEL, DENSE))
    encoder = models / "text_encoders" / ENCODER
    try:
        write_pipeline(pack, variant="ternary", seed=0)
        write_dense(dense, TINY)
        shutil.copyfile(pack / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors", model)
        encoder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pack / "text_encoder-mlx-4bit" / "model.safetensors", encoder)
        _write_lora(lora)
        picture.parent.mkdir(parents=True, exist_ok=True)
        _write_picture(picture)
        folder.mkdir(exist_ok=True)
        for number in range(2):
            Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a gradient, {number}", encoding="utf-8")
        yield
    finally:
        shutil.rmtree(pack, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        for file in (model, dense, encoder, lora, picture):
            file.unlink(missing_ok=True)


def instead_of_published(graph: dict[str, Any]) -> dict[str, Any]:
    """A workflow as saved with the tiny files' names, and Load Bonsai Pack instead of ComfyUI's own loaders.

    What it trains is trained for some steps only, and what is large is drawn with half its sides.
    """
    for node in graph["nodes"]:
        node["properties"].pop("models", None)
        if node["type"] in REPLACED and node["widgets_values"][0] != SHIPPED_PACK:
            node["widgets_values"][0] = REPLACED[node["type"]]
        for place, enough in TRAINING.get(node["type"], {}).items():
            node["widgets_values"][place] = enough
        for place in SIDES_AT.get(node["type"], ()):
            node["widgets_values"][place] = _smaller(node["widgets_values"][place])
        if node["type"] == MEGAPIXELS:
            node["widgets_values"][MEGAPIXELS_AT] /= 4
    replaced = {node["id"]: STOCK_LOADERS[node["type"]] for node in graph["nodes"] if node["type"] in STOCK_LOADERS}
    if not replaced:
        return graph
    graph["last_node_id"] += 1
    outputs = [{"name": kind, "type": kind, "links": []} for kind in ("MODEL", "CLIP", "VAE")]
    for link in graph["links"]:
        if link[1] in replaced:
            link[1], link[2] = graph["last_node_id"], replaced[link[1]]
            outputs[link[2]]["links"].append(link[0])
    graph["nodes"] = [node for node in graph["nodes"] if node["id"] not in replaced]
    graph["nodes"].append(
        {
            "id": graph["last_node_id"],
            "type": "LoadBonsaiPack",
            "pos": [0, -400],  # clear of the groups
            "size": [420, 198],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": outputs,
            "properties": {},
            "widgets_values": [PACK, "auto", "auto", "exact", "compact", "auto"],
        }
    )
    return graph


def pixels(graph: dict[str, Any]) -> int:
    """About how many pixels the pictures of a workflow as saved have when they are drawn instead."""
    for node in graph["nodes"]:
        if node["type"] == "EmptyFlux2LatentImage":
            width, height = node["widgets_values"][:2]
            return _smaller(width) * _smaller(height)
    return _smaller(512) ** 2


def _smaller(side: int) -> int:
    return side // 2 if side > LARGE else side


def _write_lora(path: Path) -> None:
    """A plain LoRA for one packed layer of the tiny pack, named as LoRAs for FLUX.2 Klein are."""
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    down, up = torch.randn(LORA_RANK, TINY.hidden), torch.randn(3 * TINY.hidden, LORA_RANK)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{layer}.lora_A.weight": down / TINY.hidden**0.5, f"{layer}.lora_B.weight": up / LORA_RANK**0.5}, path)


def _write_picture(path: Path) -> None:
    """A gradient whose middle is masked: Load Image makes the mask from what is transparent."""
    picture = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (100, 50, 200, 150))
    picture.putalpha(alpha)
    picture.save(path)
