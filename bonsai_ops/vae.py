"""The packs' FLUX.2 VAE as ComfyUI's VAE; stock for the published size, with its widths spelled out for others."""

from __future__ import annotations

from pathlib import Path

import comfy.sd

from .errors import PackError
from .formats.json_file import is_count, read_json
from .formats.safetensors_file import SafetensorsFile

PATCH = 2
"""Latent positions are patches of PATCH x PATCH positions of the convolutional latent."""
FILE = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"
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
    try:
        vae = comfy.sd.VAE(sd={name: file.get(name) for name in file.tensors}, config=config)
    except RuntimeError as error:  # torch: a tensor does not fit the module that was built for it
        sizes = "the published sizes" if config is None else f"the sizes in {CONFIG}"
        raise PackError(
            path, f"has tensors that do not fit {sizes}", f"Download the folder {path.parent} again."
        ) from error
    if vae.first_stage_model is None:
        raise PackError(path, "was read, but this ComfyUI does not recognise it as a VAE", "Update ComfyUI.")
    if config is not None:  # ComfyUI knows these sizes only of VAEs it recognises
        vae.latent_channels = PATCH * PATCH * config["params"]["embed_dim"]
        vae.downscale_ratio = vae.upscale_ratio = PATCH * 2 ** (len(config["params"]["ddconfig"]["ch_mult"]) - 1)
    return vae


def _config(folder: Path) -> dict | None:
    """ComfyUI's description of a VAE that is narrower than the published one, None for that. Raises PackError."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        raise PackError(path, f"holds a {type(config).__name__}", "Expected a JSON object: download it again.")
    widths = config.get("block_out_channels", STOCK_WIDTHS)
    if (
        not isinstance(widths, list)
        or not widths
        or not all(map(is_count, widths))
        or any(w % widths[0] for w in widths)
    ):
        raise PackError(
            path,
            f"is {str(widths)[:80]}",
            "Expected a list of positive whole numbers, multiples of the first. Download it again.",
            "block_out_channels",
        )
    latent, layers = config.get("latent_channels", 32), config.get("layers_per_block", 2)
    for key, value in (("latent_channels", latent), ("layers_per_block", layers)):
        if not is_count(value):
            raise PackError(path, f"is {str(value)[:80]}", "Expected a positive whole number. Download it again.", key)
    if widths == STOCK_WIDTHS:
        return None
    sizes = {
        "double_z": True,
        "z_channels": latent,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [w // widths[0] for w in widths],
        "num_res_blocks": layers,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    return {"params": {"ddconfig": sizes, "embed_dim": latent}}
