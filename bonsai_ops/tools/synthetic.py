"""Packs with random weights and real shapes: for the benchmark, the tests and the demo. They draw noise, not pictures.

write_mlx, write_gemlite, write_dense   one transformer file of any size in that format
write_text_encoder, write_vae           the folder of one of them, of any size (MLX 4-bit; diffusers names)
write_pipeline                          a whole pack folder: transformer, text encoder, VAE (MLX layout); tiny or not
write_native                            one transformer file in our single-file form
random_weight, dense_weights            a packed weight; all weights of a dense transformer

Those that take a device make the numbers there: on one thread of a CPU the 4B model takes minutes. The same seed gives
other numbers on another kind of device.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..weights import codec as codecs
from ..weights import flux2
from ..weights.formats import native
from ..weights.packed_weight import PackedWeight

GROUP_SIZE = 128
KLEIN_4B = flux2.Geometry(hidden=3072, context=7680, in_channels=128, double_blocks=5, single_blocks=20)
TINY = flux2.Geometry(hidden=256, context=768, in_channels=128, double_blocks=1, single_blocks=2)
BITS = {"binary": 1, "ternary": 2}


def dense_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bf16 values on the CPU that keep activations near 1: norms around 1, matrices N(0, 1 / columns)."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return (1 + 0.1 * values if len(shape) == 1 else values / math.sqrt(shape[1])).bfloat16().cpu()


def magnitudes(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Group scales [rows, columns / 128] on the CPU, exact in bf16, around 1 / sqrt(columns)."""
    spread = 0.75 + 0.5 * torch.rand(rows, columns // GROUP_SIZE, generator=generator, device=generator.device)
    return (spread * 1.2 / math.sqrt(columns)).bfloat16().float().cpu()


def _code_bytes(shape: tuple[int, int], bits: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [rows, columns * bits / 8] of random codes on the CPU; 2-bit codes are 0, 1 or 2."""
    size = (shape[0], shape[1] * bits // 8)
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=generator.device)
    return (raw if bits == 1 else raw & ~((raw & 0x55) << 1) & 0xFF).cpu()


def random_weight(
    codec: str,
    rows: int,
    columns: int,
    device: str = "cpu",
    scale_dtype: torch.dtype = torch.bfloat16,
    group_size: int = GROUP_SIZE,
) -> PackedWeight:
    """A binary (codec bit), affine (nibble, byte) or ternary weight [rows, columns] on the device, of random codes.

    Their bytes are such as the codec writes. Values are around 1 / sqrt(columns).
    """
    generator = torch.Generator(device).manual_seed(rows + columns)
    values = torch.arange(256, device=device)
    if codec == "trit5":
        values = torch.tensor([-(-v * 256 // 243) for v in range(243)], device=device)
    if codec == "crumb":
        values = values[(values & values >> 1 & 0x55) == 0]
    size = (codecs.get_codec(codec).byte_rows(rows), columns)
    codes = values.to(torch.uint8)[torch.randint(len(values), size, device=device, generator=generator)]
    spread = torch.rand(rows, columns // group_size, device=device, generator=generator) + 0.5
    scale = (spread / math.sqrt(columns)).to(scale_dtype)
    if codec in ("nibble", "byte"):
        middle = codecs.get_codec(codec).radix / 2
        scale = scale / middle
        return PackedWeight(codes, scale, (rows, columns), "affine", codec, group_size, -middle * scale)
    scheme = "binary" if codec == "bit" else "ternary"
    return PackedWeight(codes, scale, (rows, columns), scheme, codec, group_size)


def _diffusers(geometry: flux2.Geometry) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(diffusers name without .weight, shape, whether it is packed) of every tensor."""
    shapes = flux2.expected_shapes(geometry)
    for name, parts in flux2.diffusers_sources(geometry).items():
        shape = (shapes[name][0] // len(parts), *shapes[name][1:])
        for part in parts:
            yield part.removesuffix(".weight"), shape, flux2.is_block_linear(name)


def write_mlx(
    path: Path, variant: str, geometry: flux2.Geometry = KLEIN_4B, seed: int = 0, device: str = "cpu"
) -> None:
    """An MLX transformer file: formats/mlx.py has the bytes."""
    generator, bits = torch.Generator(device).manual_seed(seed), BITS[variant]
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, packed in _diffusers(geometry):
        if packed:
            tensors[f"{name}.weight"] = _code_bytes(shape, bits, generator).view(torch.uint32)
            size = magnitudes(*shape, generator)
            tensors[f"{name}.scales"] = (size if bits == 2 else 2 * size).bfloat16()
            tensors[f"{name}.biases"] = (-size).bfloat16()
        else:
            tensors[f"{name}.weight"] = dense_tensor(shape, generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    config = {"bits": bits, "group_size": GROUP_SIZE}
    (path.parent / "quantization_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_gemlite(path: Path, variant: str, geometry: flux2.Geometry = KLEIN_4B, seed: int = 0) -> None:
    """A gemlite state_dict.pt: formats/gemlite.py has the bytes. The same weights as `write_mlx` of that seed."""
    generator, bits = torch.Generator().manual_seed(seed), BITS[variant]
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, packed in _diffusers(geometry):
        if packed:
            tensors[f"{name}.W_q"] = _code_bytes(shape, bits, generator).t().contiguous()
            size = magnitudes(*shape, generator).t().contiguous()
            tensors[f"{name}.scales"] = size if bits == 2 else 2 * size
            tensors[f"{name}.zeros"] = -size
            tensors[f"{name}.metadata"] = torch.tensor(
                [0, bits, GROUP_SIZE, 2**bits - 1, 8 // bits, 1, 1, 0, 0, 0, 4, 1], dtype=torch.int32
            )
            tensors[f"{name}.orig_shape"] = torch.tensor(shape, dtype=torch.int32)
        else:
            tensors[f"{name}.weight"] = dense_tensor(shape, generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)


def write_native(path: Path, codec: str, geometry: flux2.Geometry = KLEIN_4B, device: str = "cpu") -> None:
    """A transformer file in our single-file form, its linear layers in one codec; formats/native.py has the bytes."""
    weights: dict[str, PackedWeight | torch.Tensor] = dict(dense_weights(geometry, device=device, packed=False))
    for name, shape in flux2.expected_shapes(geometry).items():
        if flux2.is_block_linear(name):
            weights[name] = random_weight(codec, *shape, device).to("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    native.write(path, weights, native.make_record(weights), overwrite=True)


def dense_weights(
    geometry: flux2.Geometry = KLEIN_4B, seed: int = 0, device: str = "cpu", packed: bool = True
) -> dict[str, torch.Tensor]:
    """{BFL name: bf16 weight on the CPU}; packed=False leaves out the linear layers that packs pack."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = flux2.expected_shapes(geometry).items()
    return {name: dense_tensor(s, generator) for name, s in shapes if packed or not flux2.is_block_linear(name)}


def write_dense(path: Path, geometry: flux2.Geometry = KLEIN_4B, seed: int = 0, device: str = "cpu") -> None:
    """A dense bf16 file with BFL names, as stock ComfyUI loads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dense_weights(geometry, seed, device), path)


@dataclass(frozen=True)
class TextGeometry:
    """Sizes of a Qwen3. Heads have 128 channels, as in the whole family."""

    hidden: int
    mlp: int
    heads: int
    key_heads: int
    layers: int = 28
    vocabulary: int = 151936


QWEN3_4B = TextGeometry(hidden=2560, mlp=9728, heads=32, key_heads=8, layers=36)
TINY_TEXT = TextGeometry(hidden=256, mlp=512, heads=2, key_heads=1)
TEXT_GROUP = 64
VAE_WIDTHS = (128, 256, 512, 512)
TINY_VAE_WIDTHS = (32, 64, 128, 128)
LATENT_CHANNELS = 32


def write_pipeline(
    folder: Path,
    variant: str = "ternary",
    seed: int = 0,
    geometry: flux2.Geometry = TINY,
    text: TextGeometry = TINY_TEXT,
    vae_widths: tuple[int, ...] = TINY_VAE_WIDTHS,
) -> None:
    """A whole pack in the MLX layout: what "Load Bonsai Pack" takes, about 45 MB. An existing one is replaced.

    With KLEIN_4B, QWEN3_4B and VAE_WIDTHS it has the sizes of the published one, 3.9 GB.
    """
    if folder.exists():
        shutil.rmtree(folder)
    write_mlx(folder / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors", variant, geometry, seed)
    write_text_encoder(folder / "text_encoder-mlx-4bit", text, seed + 1)
    write_vae(folder / "vae", vae_widths, seed + 2)


def write_text_encoder(folder: Path, geometry: TextGeometry = QWEN3_4B, seed: int = 1, device: str = "cpu") -> None:
    """A Qwen3 of random 4-bit codes whose hidden states stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden, mlp = geometry.hidden, geometry.mlp
    queries, keys = geometry.heads * 128, geometry.key_heads * 128
    tensors: dict[str, torch.Tensor] = {}

    def packed(name: str, rows: int, columns: int) -> None:
        size = (rows, columns // 8)
        words = torch.randint(-(2**31), 2**31, size, generator=generator, device=device).to(torch.int32).cpu()
        scale = torch.full((rows, columns // TEXT_GROUP), 1 / (4.6 * math.sqrt(columns))).bfloat16()
        tensors[f"{name}.weight"] = words.view(torch.uint32)
        tensors[f"{name}.scales"], tensors[f"{name}.biases"] = scale, (-7.5 * scale.float()).bfloat16()

    packed("model.embed_tokens", geometry.vocabulary, hidden)
    for i in range(geometry.layers):
        layer = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            packed(f"{layer}.{name}", rows, columns)
        for name, size in (
            ("self_attn.q_norm", 128),
            ("self_attn.k_norm", 128),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            tensors[f"{layer}.{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization": {"bits": 4, "group_size": TEXT_GROUP}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_vae(folder: Path, widths: tuple[int, ...] = VAE_WIDTHS, seed: int = 2, device: str = "cpu") -> None:
    """A FLUX.2 VAE of the published shape, narrower with other widths; diffusers names, random weights."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def layer(name: str, rows: int, columns: int, kernel: int = 0) -> None:
        shape = (rows, columns, kernel, kernel) if kernel else (rows, columns)
        values = torch.randn(shape, generator=generator, device=device) / math.sqrt(columns * max(kernel, 1) ** 2)
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = values.bfloat16().cpu(), torch.zeros(rows).bfloat16()

    def norm(name: str, channels: int) -> None:
        tensors[f"{name}.weight"] = torch.ones(channels, dtype=torch.bfloat16)
        tensors[f"{name}.bias"] = torch.zeros(channels, dtype=torch.bfloat16)

    def resnet(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3)
        norm(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3)
        if before != after:
            layer(f"{name}.conv_shortcut", after, before, 1)

    def middle(name: str, channels: int) -> None:
        norm(f"{name}.attentions.0.group_norm", channels)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.attentions.0.{part}", channels, channels)
        resnet(f"{name}.resnets.0", channels, channels)
        resnet(f"{name}.resnets.1", channels, channels)

    first, last = widths[0], widths[-1]
    layer("encoder.conv_in", first, 3, 3)
    before = first
    for i, width in enumerate(widths):
        for j in range(2):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
    middle("encoder.mid_block", last)
    norm("encoder.conv_norm_out", last)
    layer("encoder.conv_out", 2 * LATENT_CHANNELS, last, 3)
    layer("decoder.conv_in", last, LATENT_CHANNELS, 3)
    middle("decoder.mid_block", last)
    before = last
    for i, width in enumerate(reversed(widths)):
        for j in range(3):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", before, width)
            before = width
        if i < len(widths) - 1:
            layer(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
    norm("decoder.conv_norm_out", first)
    layer("decoder.conv_out", 3, first, 3)
    layer("quant_conv", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
    layer("post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1)
    tensors["bn.running_mean"], tensors["bn.running_var"] = torch.zeros(128), torch.ones(128)
    tensors["bn.num_batches_tracked"] = torch.tensor(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"block_out_channels": list(widths), "latent_channels": LATENT_CHANNELS, "layers_per_block": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
