"""Import, load, sample and save on every supported ComfyUI, over HTTP."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bonsai_ops.tools import synthetic
from bonsai_ops.tools.server import ComfyServer, PromptInterruptedError
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.read import open_transformer
from training.judge import judge

pytestmark = pytest.mark.host

NODES = (
    "LoadBonsaiPack",
    "LoadBonsaiModel",
    "LoadBonsaiTextEncoder",
    "BonsaiSampler",
    "SaveBonsaiModel",
    "BonsaiModelInfo",
)
PACK = "matrix"


@pytest.fixture(scope="module")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / PACK
    synthetic.write_pipeline(folder)
    return folder


@pytest.fixture
def server(every_comfy_server: ComfyServer, tiny_pack: Path) -> ComfyServer:
    """A server of each version with the tiny pack in models/bonsai."""
    target = every_comfy_server.base_directory / "models" / "bonsai" / PACK
    if not target.exists():
        shutil.copytree(tiny_pack, target)
    return every_comfy_server


def graph(**sampler: object) -> dict:
    """Text to image up to a saved latent."""
    settings = {"seed": 3, "steps": 2, "denoise": 1.0, **sampler}
    return {
        "pack": {
            "class_type": "LoadBonsaiPack",
            "inputs": {"pack_name": PACK, "compute_dtype": "auto", "memory": "auto"},
        },
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["pack", 1], "text": "a tree"}},
        "empty": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 128, "height": 96, "batch_size": 1}},
        "sampler": {
            "class_type": "BonsaiSampler",
            "inputs": {"model": ["pack", 0], "positive": ["text", 0], "latent": ["empty", 0], **settings},
        },
        "latent": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "matrix"}},
    }


def run(server: ComfyServer, prompt: dict) -> torch.Tensor:
    """The latent that node "latent" saved."""
    saved = server.wait(server.queue(prompt))["outputs"]["latent"]["latents"][0]
    return load_file(server.base_directory / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def test_nodes_are_registered(server: ComfyServer) -> None:
    info = server.object_info()
    assert [node for node in NODES if node not in info] == []


def test_beside_comfyui_manager(comfy_server: Callable[..., ComfyServer]) -> None:
    """The server of this process has ComfyUI's manager where BONSAI_PACKAGES brings it."""
    server = comfy_server()
    if "--enable-manager" not in server.extra_args:
        pytest.skip("no comfyui-manager: BONSAI_PACKAGES names no folder with it")
    assert isinstance(server.get("/v2/customnode/installed"), dict)
    assert [node for node in NODES if node not in server.object_info()] == []


def test_text_to_image(server: ComfyServer) -> None:
    """The whole pack draws a picture of the right size."""
    prompt = graph()
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["pack", 2]}}
    prompt["image"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "matrix"}}
    entry = server.wait(server.queue(prompt))
    assert Image.open(server.images(entry)[0]).size == (128, 96)


def test_the_shipped_pack_draws_what_it_is_asked_for(every_comfy_server: ComfyServer) -> None:
    """Nothing was put into models/bonsai: the seedling comes with the plugin."""
    prompt = graph(seed=1, steps=4)
    prompt["pack"]["inputs"]["pack_name"] = "seedling"
    prompt["text"]["inputs"]["text"] = "two green bonsai trees in blue pots, summer, blue sky"
    prompt["empty"]["inputs"] |= {"width": 128, "height": 128}
    del prompt["latent"]
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["pack", 2]}}
    prompt["image"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "seedling"}}
    entry = every_comfy_server.wait(every_comfy_server.queue(prompt))
    with Image.open(every_comfy_server.images(entry)[0]) as picture:
        seen = judge(np.asarray(picture.convert("RGB")))
    assert seen == {"count": 2, "foliage": "green", "pot": "blue", "season": "summer", "background": "blue"}


def test_saved_model_draws_the_same(server: ComfyServer) -> None:
    """Save Bonsai Model, load the file: the same latent to the bit, and the file is a native pack with its source."""
    first = run(server, graph(seed=11))
    prompt = graph(seed=11)
    prompt["save"] = {
        "class_type": "SaveBonsaiModel",
        "inputs": {"model": ["pack", 0], "filename_prefix": "diffusion_models/matrix"},
    }
    saved = Path(server.wait(server.queue(prompt))["outputs"]["save"]["text"][0])
    pack = open_pack(saved)
    assert pack.format == "native"
    assert pack.source["file"] == "diffusion_pytorch_model.safetensors"
    assert len(pack.source["sha256"]) == 64
    shutil.copy(saved, server.base_directory / "models" / "bonsai" / "saved.safetensors")
    prompt = graph(seed=11)
    prompt["model"] = {
        "class_type": "LoadBonsaiModel",
        "inputs": {"model_name": "saved.safetensors", "compute_dtype": "auto", "memory": "classic"},
    }
    prompt["sampler"]["inputs"]["model"] = ["model", 0]
    assert torch.equal(run(server, prompt), first)


def test_a_model_saved_with_its_lora_draws_the_same(server: ComfyServer, tiny_pack: Path) -> None:
    """include_loras: the file, loaded without the LoRA, draws what the model with it drew, to 1e-6 in fp32."""
    name, (rows, columns) = next((n, e.shape) for n, e in open_transformer(tiny_pack).entries.items() if "qkv" in n)
    generator = torch.Generator().manual_seed(0)
    layer, folder = f"diffusion_model.{name.removesuffix('.weight')}", server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    lora = {"lora_B": torch.randn(rows, 4, generator=generator), "lora_A": torch.randn(4, columns, generator=generator)}
    save_file({f"{layer}.{part}.weight": tensor for part, tensor in lora.items()}, folder / "matrix.safetensors")
    prompt = graph(seed=12)
    prompt["pack"]["inputs"]["compute_dtype"] = "fp32"
    plain = run(server, prompt)
    prompt["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["pack", 0], "lora_name": "matrix.safetensors", "strength_model": 0.3},
    }
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    drawn = run(server, prompt)
    prompt["save"] = {
        "class_type": "SaveBonsaiModel",
        "inputs": {"model": ["lora", 0], "filename_prefix": "diffusion_models/lora", "include_loras": True},
    }
    path, said = server.wait(server.queue(prompt))["outputs"]["save"]["text"]
    assert said.startswith("LoRAs: in 1 packed layers (rank 4), ")
    shutil.copy(path, server.base_directory / "models" / "bonsai" / "with_lora.safetensors")
    prompt["lora"] = {
        "class_type": "LoadBonsaiModel",
        "inputs": {"model_name": "with_lora.safetensors", "compute_dtype": "fp32", "memory": "auto"},
    }
    del prompt["save"]
    found = run(server, prompt)
    assert float((found - drawn).norm() / drawn.norm()) < 1e-6
    assert float((found - plain).norm() / plain.norm()) > 1e-3


def test_same_sigmas_as_the_stock_scheduler(server: ComfyServer) -> None:
    """Bonsai Sampler against Flux2Scheduler + SamplerCustomAdvanced in fp32: relative difference below 1e-5."""
    prompt = graph(seed=5, steps=4)
    prompt["pack"]["inputs"]["compute_dtype"] = "fp32"
    ours = run(server, prompt)
    sampler = prompt.pop("sampler")["inputs"]
    prompt |= {
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        "guider": {
            "class_type": "BasicGuider",
            "inputs": {"model": sampler["model"], "conditioning": sampler["positive"]},
        },
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {"class_type": "Flux2Scheduler", "inputs": {"steps": 4, "width": 128, "height": 96}},
        "sampler": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["euler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        },
    }
    stock = run(server, prompt)
    assert float((ours - stock).norm() / stock.norm()) < 1e-5


def test_image_to_image_and_reference(server: ComfyServer) -> None:
    """denoise below 1 keeps some of the picture, 0 all of it; a reference latent changes the result."""
    start = run(server, graph(seed=1))
    saved = sorted((server.base_directory / "output").glob("matrix_*.latent"))[-1]
    shutil.copy(saved, server.base_directory / "input" / "start.latent")

    def from_start(**sampler: object) -> dict:
        prompt = graph(seed=2, **sampler)
        prompt["start"] = {"class_type": "LoadLatent", "inputs": {"latent": "start.latent"}}
        prompt["sampler"]["inputs"]["latent"] = ["start", 0]
        return prompt

    assert torch.equal(run(server, from_start(denoise=0.0)), start)
    near, far = (run(server, from_start(steps=4, denoise=d)) for d in (0.3, 1.0))
    assert float((near - start).norm()) < float((far - start).norm())
    prompt = from_start(denoise=1.0)
    plain = run(server, prompt)
    prompt["reference"] = {
        "class_type": "ReferenceLatent",
        "inputs": {"conditioning": ["text", 0], "latent": ["start", 0]},
    }
    prompt["sampler"]["inputs"]["positive"] = ["reference", 0]
    assert float((run(server, prompt) - plain).norm() / plain.norm()) > 1e-3


def test_model_info(server: ComfyServer) -> None:
    """The facts as text: scheme, sizes, backend; and a picture."""
    prompt = graph()
    prompt["info"] = {"class_type": "BonsaiModelInfo", "inputs": {"model": ["pack", 0]}}
    prompt["image"] = {"class_type": "SaveImage", "inputs": {"images": ["info", 1], "filename_prefix": "info"}}
    entry = server.wait(server.queue(prompt))
    text = entry["outputs"]["info"]["text"][0]
    assert "ternary" in text
    assert "bits a weight" in text
    assert "backend" in text
    assert len(server.images({"outputs": {"image": entry["outputs"]["image"]}})) == 1
    (shown,) = entry["outputs"]["info"]["images"]
    assert shown["type"] == "temp"
    with Image.open(server.base_directory / "temp" / shown["subfolder"] / shown["filename"]) as picture:
        assert picture.width == 640 and 300 < picture.height < 1000


def test_interrupt_then_again(server: ComfyServer) -> None:
    """An interrupted prompt ends, and the next run of it draws what an uninterrupted one does."""
    whole = run(server, graph(seed=21, steps=40))
    number = server.queue(graph(seed=22, steps=100))
    with pytest.raises(PromptInterruptedError):
        server.wait(number, on_progress=lambda seconds, state: server.interrupt() if state != "queued" else None)
    prompt = graph(seed=21, steps=40)
    prompt["latent"]["inputs"]["filename_prefix"] = "matrix-again"
    assert torch.equal(run(server, prompt), whole)


def test_wrong_latent_is_refused(server: ComfyServer) -> None:
    """A latent with another model's channels and content gets one sentence."""
    prompt = graph()
    prompt["other"] = {"class_type": "LoadLatent", "inputs": {"latent": "other.latent"}}
    tensors = {"latent_tensor": torch.ones(1, 16, 8, 8), "latent_format_version_0": torch.tensor([])}
    save_file(tensors, server.base_directory / "input" / "other.latent")
    prompt["sampler"]["inputs"]["latent"] = ["other", 0]
    with pytest.raises(RuntimeError, match=r"expected \[batch, 128, height / 16, width / 16\]"):
        run(server, prompt)


def test_missing_file_is_refused(server: ComfyServer) -> None:
    """A damaged pack gets one sentence that names file, fault and cure."""
    source = server.base_directory / "models" / "bonsai" / PACK / "transformer-packed-mflux"
    file = source / "diffusion_pytorch_model.safetensors"
    broken = server.base_directory / "models" / "bonsai" / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-1000])
    prompt = graph()
    prompt["model"] = {
        "class_type": "LoadBonsaiModel",
        "inputs": {"model_name": "broken.safetensors", "compute_dtype": "auto", "memory": "auto"},
    }
    prompt["sampler"]["inputs"]["model"] = ["model", 0]
    with pytest.raises(RuntimeError, match=r"broken\.safetensors.*download it again"):
        run(server, prompt)
