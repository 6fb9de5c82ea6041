"""Every way of saving that ComfyUI and we offer: what was saved is the same again, to the bit, or nothing is written.

WAYS lists the nodes that take a MODEL, CLIP or VAE and write it; one of a newer ComfyUI fails here until it is listed.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from twins import absent, draw, load_device, load_stock, low_rank, read_dense, relative, run_node, with_lora

from bonsai_ops import convert
from bonsai_ops.tools import synthetic
from bonsai_ops.tools.environment import PLUGIN
from bonsai_ops.weights import flux2
from bonsai_ops.weights.errors import PackError

pytestmark = pytest.mark.host

SEEDLING = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
NOTES = {"bonsai": {"a": 1}, "format": "webp", "prompt": 3, "workflow": {}}
"""What other nodes may have put into a workflow."""
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 96,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64}},
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}
TRANSFORMER = flux2.Geometry(hidden=128, context=384, in_channels=128, double_blocks=1, single_blocks=1)
TEXT = synthetic.TextGeometry(hidden=128, mlp=64, heads=1, key_heads=1, layers=27)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def load(path: Path) -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(path, {"compute_dtype": "fp32"})


def load_text(path: Path) -> Any:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    return load_bonsai_text_encoder(path)


def load_vae(file: Path, folder: Path) -> Any:
    """The VAE of a file that lies in a pack."""
    from bonsai_ops.host import vae

    target = folder / "vae" / "diffusion_pytorch_model.safetensors"
    target.parent.mkdir(parents=True)
    shutil.copyfile(file, target)
    return vae.load_vae(folder)


def encoded(clip: Any, prompt: str = "a tree") -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def decoded(vae: Any) -> torch.Tensor:
    return vae.decode(torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(0)))


def nodes_by_id() -> Mapping[str, Any]:
    import nodes

    if "ModelSave" not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return nodes.NODE_CLASS_MAPPINGS


@dataclass
class Bench:
    """A tiny pack in ComfyUI, and a way to run a saving node."""

    pack: Path
    model: Any
    clip: Any
    vae: Any
    output: Path
    scratch: Path

    def files(self) -> set[Path]:
        return {path for path in self.output.rglob("*") if path.is_file()}

    def save(self, node: str, **inputs: Any) -> Path:
        """The one file that the node writes, with a workflow that holds NOTES."""
        found = nodes_by_id().get(node)
        if found is None:
            absent(node)
        before = self.files()
        inputs = {"filename_prefix": "saving/x", "prompt": {"1": {}}, "extra_pnginfo": dict(NOTES), **inputs}
        function = found.execute if hasattr(found, "define_schema") else getattr(found(), found.FUNCTION)
        known = inspect.signature(function).parameters
        function(**{name: value for name, value in inputs.items() if name in known})
        (path,) = self.files() - before
        return path

    def picture(self, model: Any = None, clip: Any = None) -> torch.Tensor:
        positive = encoded(clip or self.clip)
        return draw(model or self.model, positive=positive, negative=positive, steps=1)

    def vision(self) -> Any:
        import comfy.clip_vision

        config = self.scratch / "vision.json"
        config.write_text(json.dumps(VISION))
        return comfy.clip_vision.ClipVisionModel(str(config))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "tiny"
    synthetic.write_pipeline(folder, geometry=TRANSFORMER, text=TEXT)
    return folder


@pytest.fixture(scope="module")
def parts(comfy: Any, pack: Path) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of the pack, for tests that leave them as they are."""
    from bonsai_ops.host import vae

    return load(pack), load_text(pack), vae.load_vae(pack)


@pytest.fixture
def bench(comfy: Any, pack: Path, parts: tuple, comfy_base_directory: Path, tmp_path: Path) -> Iterator[Bench]:
    comfy.model_management.unload_all_models()
    output = comfy_base_directory / "output"
    yield Bench(pack, *parts, output, tmp_path)
    comfy.model_management.unload_all_models()
    shutil.rmtree(output / "saving", ignore_errors=True)


def model_save(bench: Bench) -> None:
    path = bench.save("ModelSave", model=bench.model)
    assert torch.equal(bench.picture(load(path)), bench.picture())
    assert {name: json.loads(metadata(path)[name]) for name in NOTES} == NOTES


def checkpoint_save(bench: Bench) -> None:
    """Both our loaders read their part."""
    path = bench.save("CheckpointSave", model=bench.model, clip=bench.clip, vae=bench.vae)
    assert torch.equal(bench.picture(load(path), load_text(path)), bench.picture())
    assert any(name.startswith("vae.decoder.") for name in load_file(path))


def image_only_checkpoint_save(bench: Bench) -> None:
    path = bench.save("ImageOnlyCheckpointSave", model=bench.model, clip_vision=bench.vision(), vae=bench.vae)
    assert torch.equal(bench.picture(load(path)), bench.picture())


def clip_save(bench: Bench) -> None:
    path = bench.save("CLIPSave", clip=bench.clip)
    again = load_text(path)
    assert torch.equal(encoded(again)[0][0], encoded(bench.clip)[0][0])
    path = bench.save("CLIPSave", clip=again)
    assert torch.equal(encoded(load_text(path))[0][0], encoded(bench.clip)[0][0])


def merged_clip(bench: Bench) -> Any:
    """A text encoder that is dense, of two packed ones."""
    synthetic.write_text_encoder(bench.scratch / "text", TEXT, 9)
    merging = {"clip1": bench.clip, "clip2": load_text(bench.scratch / "text"), "ratio": 0.5}
    return run_node("comfy_extras.nodes_model_merging.CLIPMergeSimple", **merging)


def vae_save(bench: Bench) -> None:
    """The convolutional one of other widths than ComfyUI's, and the tiny one that ships."""
    from bonsai_ops.host.vae import load_vae as load_folder

    for name, vae in (("tiny", bench.vae), ("seedling", load_folder(SEEDLING))):
        again = load_vae(bench.save("VAESave", vae=vae), bench.scratch / name)
        assert torch.equal(decoded(again), decoded(vae)), name


def lora_save(bench: Bench) -> None:
    """The difference of two packs as a LoRA: that of their dense twins."""
    other = bench.scratch / "other.safetensors"
    synthetic.write_mlx(other, "binary", TRANSFORMER, 5)
    products = []
    for load_one in (load, lambda path: load_stock(read_dense(path))):
        one, two = load_one(bench.pack), load_one(other)
        difference = run_node("comfy_extras.nodes_model_merging.ModelSubtract", model1=one, model2=two, multiplier=0.5)
        path = bench.save("LoraSave", model_diff=difference, rank=4, lora_type="standard", bias_diff=False)
        layer = "diffusion_model.single_blocks.0.linear2.lora_{}.weight"
        up, down = (load_file(path)[layer.format(part)].float() for part in ("up", "down"))
        products.append(up @ down)
        assert not torch.equal(bench.picture(with_lora(load(bench.pack), as_lora(bench, path))), bench.picture())
    assert relative(*products) < 1e-3


def as_lora(bench: Bench, path: Path) -> str:
    """The name of a file that is put into models/loras."""
    folder = bench.output.parent / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / "saving.safetensors")
    return "saving.safetensors"


WAYS: dict[str, Callable[[Bench], None]] = {
    "ModelSave": model_save,
    "CheckpointSave": checkpoint_save,
    "ImageOnlyCheckpointSave": image_only_checkpoint_save,
    "CLIPSave": clip_save,
    "VAESave": vae_save,
    "LoraSave": lora_save,
}
WRITE_NO_MODEL: set[str] = set()
"""Nodes that take a MODEL, CLIP or VAE and write something else."""


def metadata(path: Path) -> dict[str, str]:
    from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile

    return SafetensorsFile(path).metadata


def test_every_node_that_saves_is_listed(comfy: Any) -> None:
    found = set()
    for name, node in nodes_by_id().items():
        inputs = node.INPUT_TYPES()
        kinds = [slot[0] for group in ("required", "optional") for slot in inputs.get(group, {}).values()]
        if getattr(node, "OUTPUT_NODE", False) and any(kind in kinds for kind in ("MODEL", "CLIP", "VAE")):
            found.add(name)
    assert {"ModelSave", "CheckpointSave", "CLIPSave", "VAESave"} <= found
    assert found <= {*WAYS, *WRITE_NO_MODEL}, "list these nodes in WAYS with a round trip"


@pytest.mark.parametrize("node", WAYS)
def test_round_trip(bench: Bench, node: str) -> None:
    WAYS[node](bench)


def test_save_bonsai_model_and_convert(bench: Bench) -> None:
    from bonsai_ops.host.save import save_bonsai_model, workflow_metadata

    ours, copy, again = (bench.scratch / f"{name}.safetensors" for name in ("ours", "copy", "again"))
    save_bonsai_model(bench.model, ours, extra=workflow_metadata({}, NOTES))
    assert convert.main([str(ours), str(copy)]) == 0
    assert convert.main([str(bench.save("ModelSave", model=bench.model)), str(again)]) == 0
    for path in (ours, copy, again):
        assert torch.equal(bench.picture(load(path)), bench.picture())


def test_a_latent(bench: Bench) -> None:
    """SaveLatent and LoadLatent: the samples of a packed model."""
    import nodes

    samples = bench.picture()
    path = bench.save("SaveLatent", samples={"samples": samples})
    inputs = bench.output.parent / "input"
    inputs.mkdir(exist_ok=True)
    shutil.copyfile(path, inputs / path.name)
    (found,) = nodes.LoadLatent().load(path.name)
    assert torch.equal(found["samples"], samples)


def sd3() -> Any:
    """A dense model of another family."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD3(dict(SD3))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5
    return comfy.model_patcher.ModelPatcher(model, load_device(), torch.device("cpu"))


def draw_sd3(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    states, pooled = torch.randn(1, 12, 64, generator=generator), torch.randn(1, 96, generator=generator)
    positive = [[states, {"pooled_output": pooled}]]
    return draw(model, positive=positive, negative=positive, start={"samples": torch.zeros(1, 16, 8, 8)}, steps=1)


def test_a_patched_model_of_another_family(bench: Bench) -> None:
    """Save Bonsai Model, convert and ModelSave: what no record described was refused as no FLUX.2."""
    from bonsai_ops.host.patch import PatchOptions, patch_model
    from bonsai_ops.host.save import save_bonsai_model

    patched, _ = patch_model(sd3(), PatchOptions(group_size=64), None, None)
    ours, copy, again = (bench.scratch / f"{name}.safetensors" for name in ("ours", "copy", "again"))
    save_bonsai_model(patched, ours)
    saved = bench.save("ModelSave", model=patched)
    assert convert.main([str(ours), str(copy)]) == convert.main([str(saved), str(again)]) == 0
    for path in (ours, copy, saved, again):
        assert torch.equal(draw_sd3(load(path)), draw_sd3(patched)), path.name


def flux() -> Any:
    import comfy.model_patcher
    import comfy.supported_models
    from families import FLUX

    config = comfy.supported_models.Flux(dict(FLUX))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    for tensor in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
        tensor.data = torch.ones(tensor.shape)
    return comfy.model_patcher.ModelPatcher(model, load_device(), torch.device("cpu"))


@pytest.mark.parametrize("family", [sd3, flux])  # recognised by ComfyUI, made from our record
def test_a_patched_model_with_a_tensor_of_another_shape(bench: Bench, family: Callable[[], Any]) -> None:
    """ComfyUI's class decides what shape a norm has; its RuntimeError came through."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from bonsai_ops.host.patch import PatchOptions, patch_model
    from bonsai_ops.host.save import save_bonsai_model

    patched, _ = patch_model(family(), PatchOptions(group_size=64), None, None)
    path, other = bench.scratch / "whole.safetensors", bench.scratch / "other.safetensors"
    save_bonsai_model(patched, path)
    tensors = load_file(path)
    name = next(key for key in tensors if re.search(r"block.*(ln_k|key_norm)\.(weight|scale)$", key))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    said = r"other\.safetensors.* does not fit this ComfyUI \(size mismatch for .*(ln_k|key_norm)"
    for change in (lambda t: t.unsqueeze(0), lambda t: t[:-1].clone(), lambda t: t.repeat(2)):
        save_file({**tensors, name: change(tensors[name])}, other, metadata)
        with pytest.raises(PackError, match=said):
            load(other)


def test_a_merged_text_encoder(bench: Bench) -> None:
    merged = merged_clip(bench)
    truth = encoded(merged)[0][0]
    assert relative(truth, encoded(bench.clip)[0][0]) > 1e-2
    for node, inputs in (("CLIPSave", {}), ("CheckpointSave", {"model": bench.model, "vae": bench.vae})):
        assert torch.equal(encoded(load_text(bench.save(node, clip=merged, **inputs)))[0][0], truth)


def test_a_checkpoint_with_a_part_of_anothers(bench: Bench) -> None:
    """A dense model beside our text encoder: that is read, and the model refused with the node that loads it."""
    stock = load_stock(read_dense(bench.pack))
    path = bench.save("CheckpointSave", model=stock, clip=bench.clip, vae=bench.vae)
    assert torch.equal(encoded(load_text(path))[0][0], encoded(bench.clip)[0][0])
    with pytest.raises(PackError, match=r'has no packed layer\. .*"Load Checkpoint"'):
        load(path)


@pytest.mark.parametrize("scheme", ["zero_point", "ternary"])
def test_text_encoders_of_every_scheme(bench: Bench, scheme: str) -> None:
    """zero_point is what HQQ packs are; its layers look like those of MLX but for the record."""
    from random_weights import random_weight

    from bonsai_ops.weights import qwen3
    from bonsai_ops.weights.formats import native

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    codec = "trit5" if scheme == "ternary" else "nibble"
    weights: dict[str, Any] = {}
    for name, shape in qwen3.expected_shapes(sizes | {"vocab_size": 151936, "num_hidden_layers": 27}).items():
        matrix = len(shape) == 2 and "embed" not in name
        weights[name] = random_weight(scheme, codec, *shape, 64) if matrix else torch.ones(shape).bfloat16()
    weights["model.embed_tokens.weight"].normal_(generator=torch.Generator().manual_seed(0))
    file = bench.scratch / "text.safetensors"
    native.write(file, weights, native.make_record(weights, {}, native.TEXT_ENCODER))
    clip = load_text(file)
    assert torch.equal(encoded(load_text(bench.save("CLIPSave", clip=clip)))[0][0], encoded(clip)[0][0])
    with pytest.raises(PackError, match=r"is a language model .* \"Load Bonsai Text Encoder\""):
        load(bench.save("CLIPSave", clip=clip))


def nothing_written(bench: Bench, message: str, node: str, **inputs: Any) -> None:
    before = bench.files()
    with pytest.raises(ValueError, match=message):
        bench.save(node, **inputs)
    assert bench.files() == before


def test_loras_are_refused(bench: Bench, lora_file: Callable[..., str]) -> None:
    """On the model or on the text encoder: neither can be merged into codes."""
    import nodes

    layer = "diffusion_model.single_blocks.0.linear2"
    text = "text_encoders.qwen3_4b.transformer.model.layers.3.self_attn.q_proj"
    name = lora_file(low_rank({layer: (128, 512), text: (128, 128)}))
    model, clip = nodes.LoraLoader().load_lora(bench.model, bench.clip, name, 0.5, 0.5)
    nothing_written(bench, "LoRA.*Save", "ModelSave", model=model)
    nothing_written(bench, "LoRA.*Save", "CLIPSave", clip=clip)
    for one, other in ((model, bench.clip), (bench.model, clip)):
        nothing_written(bench, "LoRA.*Save", "CheckpointSave", model=one, clip=other, vae=bench.vae)
    clip_save(bench)


@pytest.mark.parametrize("place", ["dense", "scale"])
def test_what_is_not_finite_is_refused(bench: Bench, place: str) -> None:
    """It was saved, and refused when it was loaded."""
    from bonsai_ops.host.layout import unwrap
    from bonsai_ops.host.save import save_bonsai_model

    bench.model, bench.clip = load(bench.pack), load_text(bench.pack)
    transformer, encoder = bench.model.model.diffusion_model, bench.clip.cond_stage_model.qwen3_4b.transformer.model
    if place == "dense":
        tensors = [transformer.img_in.weight, encoder.layers[2].input_layernorm.weight]
    else:
        layers = (transformer.single_blocks[0].linear1, encoder.layers[2].mlp.up_proj)
        tensors = [unwrap(layer.weight).scale for layer in layers]
    for tensor in tensors:
        with torch.no_grad():
            tensor.view(-1)[1] = float("nan")
    nothing_written(bench, r"(single_blocks|img_in).*not finite", "ModelSave", model=bench.model)
    nothing_written(bench, r"layers\.2.*not finite", "CLIPSave", clip=bench.clip)
    nothing_written(bench, "not finite", "CheckpointSave", model=bench.model, clip=bench.clip, vae=bench.vae)
    with pytest.raises(ValueError, match=r"(single_blocks|img_in).*not finite"):
        save_bonsai_model(bench.model, bench.scratch / "x.safetensors")
    assert not (bench.scratch / "x.safetensors").exists()
