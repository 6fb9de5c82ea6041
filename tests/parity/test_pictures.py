"""Prompt to picture through our nodes in a real ComfyUI over HTTP, against diffusers' pipeline, same seed.

Tolerances: latent 1e-5 relative (L2) in fp32; picture 1/255 a channel (ComfyUI cuts, diffusers rounds); text embeddings
1e-5 relative against transformers on the weights as hqq's and mlx's own code dequantizes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import mlx_pack, reference, tiny_klein
from peers.families import HEIGHT, PROMPT, SEED, WIDTH, Family, Truth, truth_of
from PIL import Image
from safetensors.torch import load_file

from bonsai_ops import convert
from bonsai_ops.tools import synthetic
from bonsai_ops.tools.server import ComfyServer

pytestmark = [pytest.mark.parity, pytest.mark.host]

LATENT_TOLERANCE = 1e-5
EMBEDS_TOLERANCE = 1e-5
FP32 = {"compute_dtype": "fp32", "memory": "auto"}
TEXT_FP32 = {"text_compute_dtype": "fp32"}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def place(server: ComfyServer, source: Path, name: str) -> str:
    """Puts a file or folder under models/bonsai of the server; returns its name there."""
    target = server.base_directory / "models" / "bonsai" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
    return name


def sample(server: ComfyServer, loaders: dict, model: list, clip: list, vae: list) -> tuple[torch.Tensor, np.ndarray]:
    """(latent, picture uint8) of the prompt with the given loader nodes and their outputs."""
    graph = {
        **loaders,
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": PROMPT}},
        "empty": {
            "class_type": "EmptyFlux2LatentImage",
            "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1},
        },
        "sampler": {
            "class_type": "BonsaiSampler",
            "inputs": {
                "model": model,
                "positive": ["text", 0],
                "latent": ["empty", 0],
                "seed": SEED,
                "steps": 4,
                "denoise": 1.0,
            },
        },
        "latent": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "parity"}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": vae}},
        "image": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "parity"}},
    }
    entry = server.wait(server.queue(graph))
    saved = entry["outputs"]["latent"]["latents"][0]
    latent = load_file(server.base_directory / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
    return latent, np.asarray(Image.open(server.images(entry)[0]).convert("RGB"))


def check(found: tuple[torch.Tensor, np.ndarray], truth: Truth) -> None:
    latent, picture = found
    assert relative(latent, truth.latent) <= LATENT_TOLERANCE
    assert np.abs(picture.astype(int) - truth.picture.astype(int)).max() <= 1
    assert truth.picture.std() > 5, "the reference picture is flat: it proves nothing"


def load_pack(name: str) -> dict:
    return {"pack": {"class_type": "LoadBonsaiPack", "inputs": {"pack_name": name, **FP32, **TEXT_FP32}}}


def load_model(name: str) -> dict:
    return {"model": {"class_type": "LoadBonsaiModel", "inputs": {"model_name": name, **FP32}}}


@pytest.fixture(scope="module")
def server(comfy_server: Callable[..., ComfyServer]) -> ComfyServer:
    return comfy_server()


@pytest.mark.parametrize("layout", ["unpacked", "mlx", "gemlite", "native", "converted"])
def test_transformer_of_every_layout(server: ComfyServer, family: Family, layout: str, tmp_path: Path) -> None:
    """The transformer of each layout with the text encoder and VAE of the unpacked folder."""
    name = f"{family.unpacked.parent.name}"
    folder = place(server, family.unpacked, f"{name}-unpacked")
    loaders = load_pack(folder)
    if layout == "unpacked":
        check(sample(server, loaders, ["pack", 0], ["pack", 1], ["pack", 2]), family.truth)
        return
    if layout == "gemlite":
        model = place(server, family.gemlite_file, f"{name}-gemlite/state_dict.pt")
    elif layout == "mlx":
        model = place(server, family.mlx / mlx_pack.TRANSFORMER_FOLDER / mlx_pack.WEIGHTS, f"{name}-mlx.safetensors")
    elif layout == "converted":
        file = tmp_path / "converted.safetensors"
        assert convert.main([str(family.gemlite), str(file)]) == 0
        model = place(server, file, f"{name}-converted.safetensors")
    else:
        source = place(server, family.mlx / mlx_pack.TRANSFORMER_FOLDER / mlx_pack.WEIGHTS, f"{name}-mlx.safetensors")
        save = {"class_type": "SaveBonsaiModel", "inputs": {"model": ["model", 0], "filename_prefix": f"{name}-saved"}}
        entry = server.wait(server.queue({**load_model(source), "save": save}))
        model = place(server, Path(entry["outputs"]["save"]["text"][0]), f"{name}-native.safetensors")
    loaders |= load_model(model)
    check(sample(server, loaders, ["model", 0], ["pack", 1], ["pack", 2]), family.truth)


@pytest.mark.parametrize("layout", ["mlx", "gemlite"])
def test_whole_pack(server: ComfyServer, family: Family, layout: str) -> None:
    """Model, text encoder and VAE from one pack folder; the reference runs on that text encoder's embeddings."""
    folder = getattr(family, layout)
    truth = truth_of(family.unpacked, reference.reference_embeds(folder, PROMPT))
    name = place(server, folder, f"{family.unpacked.parent.name}-{layout}-pack")
    check(sample(server, load_pack(name), ["pack", 0], ["pack", 1], ["pack", 2]), truth)


@pytest.mark.parametrize("variant", tiny_klein.VARIANTS)
def test_what_mlx_quantizes_itself(server: ComfyServer, variant: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    """mx.quantize of dense weights has four (2 bit) or two (1 bit) uneven levels: kept exactly, with both tables."""
    dense, pack, unpacked = tmp_path / "dense", tmp_path / "pack", tmp_path / "reference"
    tiny_klein.write_pipeline(dense, tokenizer=tokenizer_folder, variant=None, te_hidden=128)
    mlx_pack.write_mlx_pack(dense, pack, variant, quantizer="mlx", reference_folder=unpacked)
    embeds = reference.reference_embeds(pack, PROMPT)
    name = place(server, pack, f"mlx-own-{variant}")
    check(sample(server, load_pack(name), ["pack", 0], ["pack", 1], ["pack", 2]), truth_of(unpacked, embeds))


@pytest.mark.parametrize("layout", ["unpacked", "mlx", "gemlite"])
def test_text_encoder(family: Family, layout: str, comfyui_path: Path) -> None:
    """All 512 positions of the embedding, in this process."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    folder = getattr(family, layout)
    truth = family.truth.embeds if layout == "unpacked" else reference.reference_embeds(folder, PROMPT)
    with torch.inference_mode():
        clip = load_bonsai_text_encoder(folder, compute_dtype="fp32")
        found = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))[0][0]
    assert found.shape == truth.shape
    assert relative(found, truth) <= EMBEDS_TOLERANCE


def test_long_prompt_is_cut_like_the_official_one(family: Family, comfyui_path: Path) -> None:
    """A prompt of more than 512 tokens gives the embeddings of its first 512, template included."""
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    prompt = "a small tree " * 300
    truth = reference.reference_embeds(family.mlx, prompt)
    with torch.inference_mode():
        clip = load_bonsai_text_encoder(family.mlx, compute_dtype="fp32")
        found = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]
    assert found.shape == truth.shape == (1, 512, truth.shape[-1])
    assert relative(found, truth) <= EMBEDS_TOLERANCE


def test_initial_noise(comfyui_path: Path) -> None:
    """ComfyUI's noise is torch's CPU generator with the seed, to the bit."""
    import comfy.sample

    empty = torch.zeros(1, 128, HEIGHT // 16, WIDTH // 16)
    generator = torch.Generator("cpu").manual_seed(SEED)
    assert torch.equal(comfy.sample.prepare_noise(empty, SEED), torch.randn(empty.shape, generator=generator))


def test_synthetic_pipeline_is_a_pack(server: ComfyServer, tmp_path: Path) -> None:
    """What the demo writes loads as a whole pack and draws a picture that is not flat."""
    synthetic.write_pipeline(tmp_path / "tiny")
    name = place(server, tmp_path / "tiny", "synthetic")
    latent, picture = sample(server, load_pack(name), ["pack", 0], ["pack", 1], ["pack", 2])
    assert bool(torch.isfinite(latent).all())
    assert picture.std() > 5
