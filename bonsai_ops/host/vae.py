"""The VAE of a pack as ComfyUI's VAE.

FLUX.2's convolutional one is stock in its published size and gets its widths spelled out in others. A tiny one of the
TAESD family (keys `taesd_encoder.*`, `taesd_decoder.*`, numbered as in comfy.taesd) may be narrower than ComfyUI's own
and lack blocks: what is missing is zeros, and a residual block of zeros hands on what it gets. Its latents
[B, 32, H/8, W/8] are folded to FLUX.2's [B, 128, H/16, W/16], channel c of row y and column x of a 2 x 2 patch at
4 c + 2 y + x.

On a CPU the convolutional one computes its wide convolutions with a quarter of the products (kernels/winograd.py).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from .. import kernels
from ..kernels import is_the_devices, winograd
from ..weights.errors import PackError, escaped
from ..weights.files import is_file
from ..weights.finite import NOT_FINITE, is_finite
from ..weights.formats.entries import DOWNLOAD_AGAIN
from ..weights.formats.safetensors_file import SafetensorsFile
from ..weights.json_file import is_count, read_json
from ..weights.release import VAE_CONFIG, find_vae
from ..weights.releases import release_of
from . import comfyui
from .flags import maps_files

logger = logging.getLogger(__name__)

PATCH = 2
"""Latent positions are patches of PATCH x PATCH positions of the convolutional latent."""
TINY_KEY = "taesd_decoder.1.weight"
"""Tensor [width, latent channels, 3, 3] that only the TAESD family has."""
TINY_RATIO = 8
"""Pixels a side of a latent position of that family."""
STOCK = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 32, "layers_per_block": 2}
"""Sizes that ComfyUI assumes when it recognises a FLUX.2 VAE, as config.json has them."""
MAX_LATENT = 512
"""Channels of a latent."""
KERNEL = 3
FIRST_CONVOLUTION = r"encoder\.down(?:_blocks)?\.(\d{1,3})\.(?:resnets|block)\.(\d{1,3})\.conv1\.weight"
"""Tensor [width, ..] of each layer of each block."""


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The VAE of a pack folder. Raises PackError if it is missing or no FLUX.2 VAE."""
    path = find_vae(folder)
    file = SafetensorsFile(path, maps_files())
    logger.info("Bonsai VAE: %s, %s", escaped(str(path)), release_of(path, file.census()))
    if TINY_KEY in file.tensors:
        return _load_tiny(file)
    for key in ("bn.running_mean", "decoder.conv_in.weight"):
        if key not in file.tensors:
            raise PackError(path, "is missing", "Expected the FLUX.2 VAE as it was published.", key)
    config = _config(folder, file)
    tensors = {name: _finite(file, name) for name in file.tensors}
    try:
        vae = comfy.sd.VAE(sd=tensors, config=config)
    except Exception as error:  # a tensor does not fit its module, or sizes make none
        if is_the_devices(error):
            raise
        told = is_file(folder / VAE_CONFIG)
        raise _misfit(
            path, "the published sizes" if config is None else f"the sizes in {VAE_CONFIG}" if told else "one another"
        ) from error
    if vae.first_stage_model is None:
        raise PackError(path, "was read, but this ComfyUI does not recognise it as a VAE", "Update ComfyUI.")
    if config is not None:  # ComfyUI knows these sizes only of VAEs it recognises
        vae.latent_channels = PATCH * PATCH * config["params"]["embed_dim"]
        vae.downscale_ratio = vae.upscale_ratio = PATCH * 2 ** (len(config["params"]["ddconfig"]["ch_mult"]) - 1)
    _convolve_with_fewer_products(vae.first_stage_model)
    return vae


def _convolve_with_fewer_products(model: torch.nn.Module) -> None:
    """Has those convolutions that winograd.convolve is for computed by it, and all of their kind channels last.

    On a CPU the decoder's results use memory again.
    """
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    found = [conv for conv in convolutions if _is_plain(conv, KERNEL)]
    if any(min(conv.in_channels, conv.out_channels) >= winograd.LEAST_CHANNELS for conv in found):
        for conv in found:
            conv._conv_forward = winograd.convolve
        for conv in convolutions:
            if _is_plain(conv, 1):
                conv._conv_forward = winograd.mix
        model.decoder.register_forward_pre_hook(lambda decoder, _: kernels.keep_memory(decoder))
        model.decoder.register_forward_hook(lambda decoder, *_: kernels.release_memory(decoder), always_call=True)


def _is_plain(conv: torch.nn.Conv2d, size: int) -> bool:
    """True for a convolution of size x size that keeps the picture's size and has no other options."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return sizes == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")


def _misfit(path: Path, sizes: str) -> PackError:
    return PackError(path, f"has tensors that do not fit {sizes}", "Download its folder again.")


def _finite(file: SafetensorsFile, name: str) -> torch.Tensor:
    """A tensor of the file. Raises PackError for NaN and infinity."""
    tensor = file.get(name)
    if not is_finite(tensor):
        raise file.error(NOT_FINITE, DOWNLOAD_AGAIN, name)
    return tensor


def _load_tiny(file: SafetensorsFile) -> comfy.sd.VAE:
    """A VAE of the TAESD family, filled up with zeros to the size of ComfyUI's class."""
    cure = "Download the file again, or choose a pack whose VAE has ComfyUI's TAESD layout."
    shape, dtype = file.tensors[TINY_KEY]
    if len(shape) != 4 or not 0 < shape[1] <= MAX_LATENT or not dtype.is_floating_point:
        raise PackError(file.path, f"is {dtype} {list(shape)}, expected floats [width, latent, 3, 3]", cure, TINY_KEY)
    tiny = comfyui.needed("comfy.taesd.taesd.TAESD")
    filled = dict(tiny(latent_channels=shape[1]).state_dict())
    for name, tensor in filled.items():
        if tensor.ndim:  # vae_scale and vae_shift keep the values that change nothing
            filled[name] = torch.zeros(tensor.shape, dtype=dtype)
    for name, (own, _) in file.tensors.items():
        if name not in filled:
            raise PackError(file.path, "is no tensor of a tiny VAE", cure, name)
        room = filled[name].shape
        if len(own) != len(room) or any(n > m for n, m in zip(own, room, strict=True)):
            raise PackError(file.path, f"is {list(own)}, expected at most {list(room)}", cure, name)
        filled[name][tuple(slice(n) for n in own)] = _finite(file, name)
    whole = {name.partition(".conv.")[0] for name in file.tensors if ".conv." in name}
    for name, tensor in filled.items():
        block, inside, _ = name.partition(".conv.")
        if tensor.ndim and name not in file.tensors and (not inside or block in whole):
            raise PackError(file.path, "is missing: only whole blocks may be", cure, name)
    vae = comfy.sd.VAE(sd=filled)
    model = vae.first_stage_model  # hooks leave the names of the tensors as they are: VAESave writes what is read here
    model.taesd_encoder.register_forward_hook(_folded)
    model.taesd_decoder.register_forward_pre_hook(_unfolded)
    vae.latent_channels = PATCH * PATCH * shape[1]
    vae.downscale_ratio = vae.upscale_ratio = PATCH * TINY_RATIO
    return vae


def _folded(encoder: torch.nn.Module, inputs: tuple, latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pixel_unshuffle(latents, PATCH)


def _unfolded(decoder: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.pixel_shuffle(inputs[0], PATCH)


def _config(folder: Path, file: SafetensorsFile) -> dict | None:
    """ComfyUI's description of a VAE of other sizes than the published one's, None for that. Raises PackError.

    What config.json does not tell, or all of it where there is none, is measured on the tensors.
    """
    sizes, path = _measured(file), file.path
    measured = dict(sizes)
    if is_file(folder / VAE_CONFIG):
        path = folder / VAE_CONFIG
        config = read_json(path)
        if not isinstance(config, dict):
            raise PackError(path, f"holds a {type(config).__name__}", "Expected a JSON object: download it again.")
        sizes |= {key: config[key] for key in sizes if key in config}
    widths = sizes["block_out_channels"]
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
    latent, layers = sizes["latent_channels"], sizes["layers_per_block"]
    for key, value in (("latent_channels", latent), ("layers_per_block", layers)):
        if not is_count(value):
            raise PackError(path, f"is {str(value)[:80]}", "Expected a positive whole number. Download it again.", key)
    if sizes != measured:
        raise _misfit(file.path, f"the sizes in {VAE_CONFIG}")
    if sizes == STOCK:
        return None
    _require_whole(file, latent)
    return _description(widths, latent, layers)


def _require_whole(file: SafetensorsFile, latent: int) -> None:
    """Raises PackError for widths that single tensors claim: ComfyUI makes whole layers of them before it compares."""
    fits = latent <= MAX_LATENT
    for name, (shape, _) in file.tensors.items():
        if re.fullmatch(FIRST_CONVOLUTION, name):
            second, _ = file.tensors.get(name.replace("conv1", "conv2"), ((), None))
            fits = fits and len(shape) == 4 and tuple(second) == (shape[0], shape[0], KERNEL, KERNEL)
    if not fits:
        raise _misfit(file.path, "one another")


def _measured(file: SafetensorsFile) -> dict[str, Any]:
    """The sizes of STOCK as the tensors have them, under diffusers' names or BFL's; the published ones if they lack."""
    counted: dict[tuple[int, int], int] = {}  # {(block, layer): width}
    for name, (shape, _) in file.tensors.items():
        if (found := re.fullmatch(FIRST_CONVOLUTION, name)) and shape:
            counted[int(found[1]), int(found[2])] = shape[0]
    shape, _ = file.tensors["decoder.conv_in.weight"]
    blocks = sorted({block for block, _ in counted})
    if not blocks or any((block, 0) not in counted for block in blocks) or len(shape) != 4:
        return dict(STOCK)
    return {
        "block_out_channels": [counted[block, 0] for block in blocks],
        "latent_channels": shape[1],
        "layers_per_block": sum(block == blocks[0] for block, _ in counted),
    }


def _description(widths: list[int], latent: int, layers: int) -> dict:
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
