"""Write an MLX pack (formats.md sections 4 and 5c) with mlx's own quantizer and bit packing.

    transformer-packed-mflux/   diffusion_pytorch_model.safetensors, config.json, quantization_config.json
    text_encoder-mlx-4bit/      model.safetensors, config.json
    vae/ tokenizer/ scheduler/  copied
    model_index.json  manifest.json

Per packed linear: `<name>.weight` uint32 [N, K*bits/32], `<name>.scales` and `<name>.biases` bf16 [N, K/128], with
w = scales * code + biases, the first code in the lowest bits.

mx.quantize(bits=1) keeps a binary weight exactly (scales 2s, biases -s) as long as both signs occur in a group. At 2
bits it does not keep a ternary one: for extremes -s and +s it picks scales -s/2 and biases s, so that -s needs code 4,
is clamped to 3 and comes back as -s/2. `quantizer="exact"` therefore lets mlx pack the bits of codes that are computed
here; `quantizer="mlx"` keeps mx.quantize's own codes, scales and biases and writes the weights they stand for as a
reference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .gemlite_pack import BITS, codes_and_scale
from .tiny_klein import GROUP, VARIANTS, is_quantized, write_json, write_manifest

TRANSFORMER_FOLDER = "transformer-packed-mflux"
TEXT_ENCODER_FOLDER = "text_encoder-mlx-4bit"
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUANTIZERS = ("exact", "mlx")


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """The same bits as an mlx array (bf16 included)."""
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())


def to_torch(array: mx.array) -> torch.Tensor:
    """The same bits as a torch tensor (bf16 included)."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def pack_codes(codes: np.ndarray, bits: int) -> mx.array:
    """Pack codes [N, K] of `bits` bits into uint32 [N, K*bits/32] with mx.quantize.

    mx.quantize chooses its own codes from the extremes of a group, so every word of codes is quantized beside a word
    that holds both extremes; that word is dropped afterwards.
    """
    per_word = 32 // bits
    top = 2**bits - 1
    rows, columns = codes.shape
    words = codes.reshape(rows, columns // per_word, per_word).astype(np.float32)
    guard = np.broadcast_to(np.where(np.arange(per_word) % 2 == 0, 0.0, float(top)), words.shape)
    # Code minus top: the extreme of larger magnitude is then -top, from where mlx counts upwards in steps of one.
    crafted = mx.array((np.concatenate([guard, words], axis=2) - top).astype(np.float32))
    packed, scales, biases = mx.quantize(crafted.reshape(rows, -1), group_size=2 * per_word, bits=bits)
    if not (bool(mx.all(scales == 1)) and bool(mx.all(biases == -top))):
        raise RuntimeError(f"mx.quantize chose other codes than asked for at {bits} bits; pack_codes needs a new trick")
    return packed.reshape(rows, -1, 2)[:, :, 1]


def pack_linear(weight: torch.Tensor, variant: str) -> dict[str, mx.array]:
    """Exact pack of weight [N, K] bf16: `weight` uint32, `scales` and `biases` bf16 (ternary s, -s; binary 2s, -s)."""
    codes, scale = codes_and_scale(weight, variant)
    step = scale if variant == "ternary" else 2 * scale
    return {
        "weight": pack_codes(codes.numpy(), BITS[variant]),
        "scales": to_mlx(step.to(torch.bfloat16)),
        "biases": to_mlx((-scale).to(torch.bfloat16)),
    }


def quantize_linear(weight: torch.Tensor, bits: int, group: int = GROUP) -> dict[str, mx.array]:
    """mx.quantize's own result for weight [N, K]."""
    packed, scales, biases = mx.quantize(to_mlx(weight), group_size=group, bits=bits)
    return {"weight": packed, "scales": scales, "biases": biases}


def dequantize(parts: dict[str, mx.array], bits: int, group: int = GROUP) -> torch.Tensor:
    """Weight [N, K] fp32 by mx.dequantize with scales and biases widened to fp32, that is without bf16 rounding."""
    scales, biases = parts["scales"].astype(mx.float32), parts["biases"].astype(mx.float32)
    return to_torch(mx.dequantize(parts["weight"], scales, biases, group_size=group, bits=bits))


def mlx_text_encoder(source: Path, target: Path) -> None:
    """Quantize source/model.safetensors to 4 bit in groups of 64 (every 2-D tensor, embeddings too)."""
    target.mkdir(parents=True, exist_ok=True)
    state: dict[str, mx.array] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2:
            layer = name.removesuffix(".weight")
            state.update({f"{layer}.{leaf}": a for leaf, a in quantize_linear(tensor, 4, 64).items()})
        else:
            state[name] = to_mlx(tensor)
    mx.save_safetensors(str(target / "model.safetensors"), state, metadata={"format": "mlx"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization"] = {"bits": 4, "group_size": 64}
    write_json(target / "config.json", config)


def write_mlx_pack(
    unpacked_folder: Path,
    out_folder: Path,
    variant: str,
    *,
    quantizer: str = "exact",
    reference_folder: Path | None = None,
    text_encoder: bool = True,
) -> None:
    """Repack a folder of `tiny_klein.write_pipeline` as an MLX pack.

    `quantizer` "exact" needs weights of `variant` and keeps them to the bit. "mlx" takes any weights, packs what
    mx.quantize makes of them at the variant's bits and needs `reference_folder`: an unpacked pipeline whose linears are
    the values that the pack stands for (bf16 where all are exact in bf16, else float32).
    """
    if variant not in VARIANTS or quantizer not in QUANTIZERS:
        raise ValueError(f"variant {variant!r} or quantizer {quantizer!r} is not one of {VARIANTS}, {QUANTIZERS}")
    if (quantizer == "mlx") != (reference_folder is not None):
        raise ValueError("reference_folder goes with quantizer='mlx' and only with it")
    unpacked_folder, out_folder = Path(unpacked_folder), Path(out_folder)
    target = out_folder / TRANSFORMER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    bits = BITS[variant]
    state: dict[str, mx.array] = {}
    truth: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(unpacked_folder / "transformer" / WEIGHTS).items():
        if is_quantized(name):
            parts = pack_linear(tensor, variant) if quantizer == "exact" else quantize_linear(tensor, bits)
            layer = name.removesuffix(".weight")
            state.update({f"{layer}.{leaf}": array for leaf, array in parts.items()})
            truth[name] = dequantize(parts, bits)
        else:
            state[name] = to_mlx(tensor)
            truth[name] = tensor
    mx.save_safetensors(str(target / WEIGHTS), state, metadata={"format": "mlx"})
    shutil.copyfile(unpacked_folder / "transformer" / "config.json", target / "config.json")
    write_json(
        target / "quantization_config.json", {"bits": bits, "group_size": GROUP, "skip_patterns": [], "mode": "affine"}
    )
    if reference_folder is not None:
        _write_reference(unpacked_folder, Path(reference_folder), truth)

    if text_encoder:
        mlx_text_encoder(unpacked_folder / "text_encoder", out_folder / TEXT_ENCODER_FOLDER)
    for part in ("vae", "tokenizer", "scheduler"):
        if (unpacked_folder / part).is_dir():
            shutil.copytree(unpacked_folder / part, out_folder / part, dirs_exist_ok=True)
    shutil.copyfile(unpacked_folder / "model_index.json", out_folder / "model_index.json")
    write_manifest(out_folder, f"{variant} g128 (mlx)")


def _write_reference(unpacked_folder: Path, folder: Path, truth: dict[str, torch.Tensor]) -> None:
    exact = all(torch.equal(tensor.bfloat16().float(), tensor.float()) for tensor in truth.values())
    dtype = torch.bfloat16 if exact else torch.float32
    shutil.copytree(unpacked_folder, folder, dirs_exist_ok=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in truth.items()},
        folder / "transformer" / WEIGHTS,
        metadata={"format": "pt"},
    )
    write_manifest(folder, "values of an mx.quantize pack")
