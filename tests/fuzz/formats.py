"""The readers, each with a tiny valid file or folder that it takes."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import flux2, qwen3
from bonsai_ops.weights.formats import native
from bonsai_ops.weights.formats.gguf import BLOCKS
from bonsai_ops.weights.formats.native_record import RECORD_TENSOR
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

SMALL = flux2.Geometry(hidden=128, context=128, in_channels=128, double_blocks=1, single_blocks=1)
TEXT = {
    "vocab_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 27,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
NAME = "diffusion_pytorch_model.safetensors"
VAE_SIZES = (32, 32, 32, 32)


@dataclass(frozen=True)
class Format:
    """write(folder) makes a valid one. target: what of it is read, the folder itself if empty. read(path, mapped)."""

    write: Callable[[Path], None]
    target: str
    read: Callable[[Path, bool], object]
    needs_comfyui: bool = False


def transformer(path: Path, mapped: bool) -> None:
    read_weights(open_transformer(path, mapped))


def text_encoder(path: Path, mapped: bool) -> None:
    read_weights(open_text_encoder(path, mapped)[0])


def vae(path: Path, mapped: bool) -> None:
    from bonsai_ops.host.vae import load_vae

    _map(mapped)
    load_vae(path)


def model(path: Path, mapped: bool) -> None:
    from bonsai_ops.host.loader import load_bonsai_model

    _map(mapped)
    load_bonsai_model(path, {"compute_dtype": "fp32"})


def clip(path: Path, mapped: bool) -> None:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder

    _map(mapped)
    load_bonsai_text_encoder(path)


def pack(path: Path, mapped: bool) -> None:
    from bonsai_ops.host.pack import load_pack

    _map(mapped)
    load_pack(path, {"compute_dtype": "fp32"})


def _map(mapped: bool) -> None:
    """Has ComfyUI read files as with or without --disable-mmap."""
    from comfy.cli_args import args

    args.disable_mmap = not mapped


def _weights(folder: Path) -> dict[str, PackedWeight | torch.Tensor]:
    synthetic.write_mlx(folder / "x" / NAME, "ternary", SMALL)
    weights = read_weights(open_transformer(folder / "x" / NAME))
    shutil.rmtree(folder / "x")
    return weights


def write_native(folder: Path, rank: int = 0) -> None:
    weights = _weights(folder)
    for name, weight in weights.items():
        if rank and isinstance(weight, PackedWeight):
            rows, columns = weight.shape
            weights[name] = replace(weight, up=torch.ones(rows, rank), down=torch.ones(rank, columns))
    native.write(folder / "w.safetensors", weights, native.make_record(weights, {"file": "x"}))


def write_checkpoint(folder: Path) -> None:
    """As ComfyUI saves one: its prefix before our names, the record as a tensor, and parts of other models."""
    weights = _weights(folder)
    tensors = native.to_tensors(weights) | {RECORD_TENSOR: native.make_record(weights, {"file": "x"}).to_tensor()}
    whole = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole | {"vae.a": torch.ones(3)}, folder / "w.safetensors")


def write_native_text(folder: Path) -> None:
    write_mlx_text(folder / "x")
    weights = read_weights(open_text_encoder(folder / "x")[0])
    shutil.rmtree(folder / "x")
    record = native.make_record(weights, {"file": "x"}, native.TEXT_ENCODER)
    native.write(folder / "model.safetensors", weights, record)


def write_unpacked(folder: Path) -> None:
    values = {
        n: w.dequantize(torch.bfloat16) if isinstance(w, PackedWeight) else w for n, w in _weights(folder).items()
    }
    save_file(values, folder / "w.safetensors")


def write_gemlite_safetensors(folder: Path) -> None:
    synthetic.write_gemlite(folder / "x.pt", "ternary", SMALL)
    save_file(torch.load(folder / "x.pt", weights_only=True), folder / NAME)
    (folder / "x.pt").unlink()
    settings = {"quant_method": "gemlite", "modules_to_not_convert": ["x_embedder"], "bits": 2, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings, "num_layers": 1}))


def write_shards(folder: Path) -> None:
    synthetic.write_mlx(folder / NAME, "ternary", SMALL)
    tensors = load_file(folder / NAME)
    names, stem = sorted(tensors), NAME.removesuffix(".safetensors")
    parts = {f"{stem}-0000{i}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / f"{NAME}.index.json").write_text(json.dumps(index))
    (folder / NAME).unlink()


def write_gguf(folder: Path, kind: int) -> None:
    """Names of BFL, matrices in one kind of block, whose bytes are all zero, the rest in fp16."""
    geometry = flux2.Geometry(hidden=256, context=256, in_channels=128, double_blocks=1, single_blocks=1)
    header, data, count = b"", b"", 0
    for name, shape in flux2.expected_shapes(geometry).items():
        packed = flux2.is_block_linear(name)
        values = torch.Size(shape).numel()
        raw = bytes(values // BLOCKS[kind].size * BLOCKS[kind].nbytes if packed else 2 * values)
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind if packed else 1, len(data))
        data += raw + bytes(-len(raw) % 32)
        count += 1
    pairs = _text("general.architecture") + struct.pack("<I", 8) + _text("flux")
    pairs += _text("a.list") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b")
    pairs += _text("general.alignment") + struct.pack("<II", 4, 32)
    raw = b"GGUF" + struct.pack("<IQQ", 3, count, 3) + pairs + header
    (folder / "w.gguf").write_bytes(raw + bytes(-len(raw) % 32) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_hqq(folder: Path) -> None:
    """qmodel.pt: a table a module; what is 4 bits has metadata, plain or spelled as tensors."""
    modules: dict[str, dict] = {}
    for name, shape in qwen3.expected_shapes(TEXT).items():
        module = name.removesuffix(".weight")
        if len(shape) == 1 or "embed" in name:
            modules[module] = {"weight": torch.zeros(shape, dtype=torch.float16)}
            continue
        groups = shape[0] * shape[1] // 64
        codes = torch.nn.Parameter(torch.zeros(groups // 2, 64, dtype=torch.uint8), requires_grad=False)
        modules[module] = {
            "W_q": codes,
            "scale": torch.ones(groups, 1, dtype=torch.float16),
            "zero": torch.ones(groups, 1, dtype=torch.float16),
            "nbits": 4,
            "group_size": 64,
            "axis": torch.tensor(1),
            "shape": torch.Size(shape),
            "packing": "4bit_u8",
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": torch.float16,
        }
    torch.save(modules, folder / "qmodel.pt")


def write_dense_text(folder: Path) -> None:
    shapes = qwen3.expected_shapes(TEXT)
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 27, "hidden_size": 128}))


def write_mlx_text(folder: Path) -> None:
    sizes = synthetic.TextGeometry(hidden=128, mlp=128, heads=1, key_heads=1, layers=27, vocabulary=64)
    synthetic.write_text_encoder(folder, sizes)


def write_release(folder: Path) -> None:
    synthetic.write_mlx(folder / "transformer-packed-mflux" / NAME, "ternary", SMALL)
    write_mlx_text(folder / "text_encoder-mlx-4bit")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')


def read_release(path: Path, mapped: bool) -> None:
    transformer(path, mapped)
    text_encoder(path, mapped)


def write_vae(folder: Path, told: bool = True) -> None:
    synthetic.write_vae(folder / "vae", VAE_SIZES)
    if not told:
        (folder / "vae" / "config.json").unlink(missing_ok=True)


def write_tiny_vae(folder: Path) -> None:
    from comfy.taesd.taesd import TAESD

    tensors = {name: torch.zeros_like(t) for name, t in TAESD(latent_channels=32).state_dict().items() if t.ndim}
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / NAME)


def write_pack(folder: Path) -> None:
    write_release(folder)
    write_vae(folder)


def write_family(folder: Path) -> None:
    """Another architecture, patched and saved."""
    import comfy.model_patcher
    import comfy.supported_models
    from families import FLUX

    from bonsai_ops.host.patch import PatchOptions, patch_model
    from bonsai_ops.host.save import save_bonsai_model

    config = comfy.supported_models.Flux(dict(FLUX))
    config.set_inference_dtype(torch.float32, None)
    dense = config.get_model({}, "")
    for tensor in (*dense.diffusion_model.parameters(), *dense.diffusion_model.buffers()):
        tensor.data = torch.ones(tensor.shape)
    patcher = comfy.model_patcher.ModelPatcher(dense, torch.device("cpu"), torch.device("cpu"))
    save_bonsai_model(patch_model(patcher, PatchOptions(group_size=64), None, None)[0], folder / "w.safetensors")


def write_lora(folder: Path) -> None:
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 128), f"{layer}.lora_B.weight": torch.ones(384, 4)}
    save_file(tensors, folder / "lora.safetensors", {"ss_network_dim": "4"})


FORMATS: dict[str, Format] = {
    "mlx": Format(lambda f: synthetic.write_mlx(f / NAME, "ternary", SMALL), NAME, transformer),
    "binary": Format(lambda f: synthetic.write_mlx(f / NAME, "binary", SMALL), NAME, transformer),
    "gemlite": Format(
        lambda f: synthetic.write_gemlite(f / "state_dict.pt", "ternary", SMALL), "state_dict.pt", transformer
    ),
    "gemlite-safetensors": Format(write_gemlite_safetensors, NAME, transformer),
    "unpacked": Format(write_unpacked, "w.safetensors", transformer),
    "native": Format(write_native, "w.safetensors", transformer),
    **{
        f"gguf-{block.name.lower()}": Format(partial(write_gguf, kind=kind), "w.gguf", transformer)
        for kind, block in BLOCKS.items()
    },
    "checkpoint": Format(write_checkpoint, "w.safetensors", transformer),
    "residual": Format(partial(write_native, rank=2), "w.safetensors", transformer),
    "hqq": Format(write_hqq, "qmodel.pt", text_encoder),
    "text-mlx": Format(write_mlx_text, "model.safetensors", text_encoder),
    "text-native": Format(write_native_text, "model.safetensors", text_encoder),
    "text-unpacked": Format(write_dense_text, "model.safetensors", text_encoder),
    "shards": Format(write_shards, f"{NAME[:-12]}-00001-of-00003.safetensors", transformer),
    "release": Format(write_release, "", read_release),
    "lora": Format(write_lora, "lora.safetensors", transformer),
    "vae": Format(write_vae, "", vae, needs_comfyui=True),
    "vae-alone": Format(partial(write_vae, told=False), "", vae, needs_comfyui=True),
    "vae-tiny": Format(write_tiny_vae, "", vae, needs_comfyui=True),
    "model": Format(write_native, "w.safetensors", model, needs_comfyui=True),
    "clip": Format(write_mlx_text, "model.safetensors", clip, needs_comfyui=True),
    "clip-hqq": Format(write_hqq, "qmodel.pt", clip, needs_comfyui=True),
    "pack": Format(write_pack, "", pack, needs_comfyui=True),
    "family": Format(write_family, "w.safetensors", model, needs_comfyui=True),
}


def copied(source: Path, target: Path) -> None:
    """The files of a seed in a new folder, which may be changed."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    os.chmod(target, 0o755)
