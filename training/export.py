"""The trained parts -> the pack that ships, in the layouts of the published packs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bonsai_ops import convert

from . import lora, text_encoder, transformer, vae

FOLDER, LORA = "bonsai/seedling", "loras/seedling_night.safetensors"
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
BINARY_FILE = "binary.safetensors"
TEXT_ENCODER_FOLDER = "text_encoder-mlx-4bit"


def pack(work: Path, comfyui: Path, models: Path) -> None:
    """Writes every part that is trained: the ternary transformer as the pack's own, the binary one beside it."""
    folder = models / FOLDER
    vae.export(work, folder / "vae")
    export_text_encoder(work, comfyui, folder / TEXT_ENCODER_FOLDER)
    for scheme, name in (("ternary", TRANSFORMER_FILE), ("binary", BINARY_FILE)):
        if (work / f"{scheme}.pt").is_file():
            export_transformer(work, scheme, folder / name)
    if (work / lora.FILE).is_file():
        lora.export(work, models / LORA)


def export_transformer(work: Path, scheme: str, target: Path) -> None:
    """A native file: the packed values as the forward pass used them, everything else in bf16."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary) / f"seedling-{scheme}.safetensors"
        save_file(unpacked(transformer.load(work, scheme), scheme), dense)
        if convert.main([str(dense), str(target), "--overwrite"]):
            raise SystemExit(f"{target} was not written")


def unpacked(model: torch.nn.Module, scheme: str) -> dict[str, torch.Tensor]:
    """bf16 tensors with diffusers' names, exactly the values of the packed model."""
    packed = {name for name, _ in transformer.packed_layers(model)}
    tensors = {}
    for name, value in transformer.state_dict(model).items():
        if name.removesuffix(".weight") in packed and scheme != "dense":
            value = transformer.rounded(value, scheme)
        tensors[name] = value.detach().bfloat16().contiguous()
    return tensors


def export_text_encoder(work: Path, comfyui: Path, folder: Path) -> None:
    """MLX's 4-bit layout with a trimmed vocabulary (bonsai_ops/weights/formats/mlx.py)."""
    encoder, vocabulary = text_encoder.load(work, text_encoder.tokenizer(comfyui))
    tensors: dict[str, torch.Tensor] = {}
    matrices = {id(m) for m in encoder.matrices()}
    for name, module in encoder.model.named_modules():
        if "parametrizations" in name:
            continue
        if id(module) in matrices:
            codes, scale, bias = text_encoder.quantize(module.parametrizations.weight.original)
            layer = f"model.{name}"
            tensors[f"{layer}.weight"] = words(codes)
            tensors[f"{layer}.scales"], tensors[f"{layer}.biases"] = scale, bias
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            tensors[f"model.{name}.weight"] = module.weight.detach().bfloat16()
    tensors["model.embed_tokens.token_ids"] = torch.tensor(vocabulary.ids, dtype=torch.int32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {"quantization": {"bits": text_encoder.BITS, "group_size": text_encoder.GROUP}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def words(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes uint8 [N, K] -> uint32 [N, K / 8], least significant first."""
    shifted = codes.long().unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(2).to(torch.uint32)
