"""The packs' FLUX.2 VAE as ComfyUI's VAE; stock for the published size, with its widths spelled out for others."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.sd

from .errors import PackError
from .formats.safetensors_file import SafetensorsFile

PATCH = 2
"""Latent positions are patches of PATCH x PATCH positions of the convolutional latent."""
FILE = "vae/diffusion_pytorch_model.safetensors"
STOCK_WIDTHS = [128, 256, 512, 512]
"""block_out_channels that ComfyUI assumes when it recognises a FLUX.2 VAE."""


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The VAE of a pack folder. Raises PackError if it is missing or no FLUX.2 VAE."""
    path = folder / FILE
    if not path.is_file():
        raise PackError(folder, f"holds no {FILE}", "Download the whole repository into this folder.")
    file = SafetensorsFile(path)
    for key in ("bn.running_mean", "decoder.conv_in.weight"):
        if key not in file.tensors:
            raise PackError(path, "is missing", "Expected the FLUX.2 VAE as it was published.", key)
    config = _config(folder)
    vae = comfy.sd.VAE(sd={name: file.get(name) for name in file.tensors}, config=config)
    if vae.first_stage_model is None:
        raise PackError(path, "was read, but this ComfyUI does not recognise it as a VAE", "Update ComfyUI.")
    if config is not None:  # ComfyUI knows these sizes only of VAEs it recognises
        vae.latent_channels = PATCH * PATCH * config["params"]["embed_dim"]
        vae.downscale_ratio = vae.upscale_ratio = PATCH * 2 ** (len(config["params"]["ddconfig"]["ch_mult"]) - 1)
    return vae


def _config(folder: Path) -> dict | None:
    """ComfyUI's description of a VAE that is narrower than the published one, None for that."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    widths = config.get("block_out_channels", STOCK_WIDTHS)
    if widths == STOCK_WIDTHS:
        return None
    latent = config.get("latent_channels", 32)
    sizes = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [w // widths[0] for w in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    return {"params": {"ddconfig": sizes, "embed_dim": latent}}
