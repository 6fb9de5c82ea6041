"""Write a gemlite pack (formats.md section 3 and 5b) with gemlite's own packer and hqq's own quantizer.

    transformer-gemlite-int2/ or -int1/   state_dict.pt, config.json, quantization_config.json, gemlite_autotune.json
    text_encoder-hqq-4bit/                qmodel.pt, config.json, tokenizer/
    vae/                                  copied
    manifest.json

state_dict.pt is one flat dict: `<name>.{W_q, scales, zeros, metadata, orig_shape}` per packed linear and
`<name>.weight` bf16 for the rest. gemlite 0.6 also keeps a `meta_scale` per layer, which `pack_codes` returns; the
published packs have none, so it is left out of them.
"""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from bonsai_ops.tools.bench.gemlite_import import import_gemlite

from .tiny_klein import GROUP, VARIANTS, is_quantized, write_json, write_manifest

LEAVES = ("W_q", "scales", "zeros", "metadata", "orig_shape")
BITS = {"ternary": 2, "binary": 1}
FORMAT = {"ternary": "gemlite-int2-ternary-g128", "binary": "gemlite-int1-g128"}
TRANSFORMER_FOLDER = {"ternary": "transformer-gemlite-int2", "binary": "transformer-gemlite-int1"}
TEXT_ENCODER_FOLDER = "text_encoder-hqq-4bit"


def codes_and_scale(weight: torch.Tensor, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Split weight [N, K] into codes [N, K] uint8 and s [N, K/128] fp32.

    Ternary codes are 0, 1, 2 for -s, 0, +s; binary codes 0, 1 for -s, +s. Raises ValueError if the weight holds
    anything else.
    """
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, columns // GROUP, GROUP)
    scale = grouped.abs().amax(dim=2, keepdim=True)
    sign = grouped.sign()
    if not torch.equal(sign * scale, grouped) or (variant == "binary" and bool((sign == 0).any())):
        raise ValueError(f"the weight of shape {tuple(weight.shape)} is not {variant} in groups of {GROUP}")
    codes = sign + 1 if variant == "ternary" else (sign + 1) / 2
    return codes.to(torch.uint8).reshape(rows, columns), scale[..., 0]


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int | None,
    bits: int,
    group: int | None = GROUP,
    bitwidth: int = 8,
    **options: object,
) -> dict[str, torch.Tensor]:
    """gemlite's own state_dict() of a layer with codes uint8 [N, K] and (code - zero) * scale, scales [N, groups].

    Group-wise tensors of zeros become zeros to add, unless `options` of gemlite's `pack` say otherwise.
    """
    gemlite = import_gemlite()
    rows, columns = codes.shape
    layer = gemlite.GemLiteLinear(
        W_nbits=bits,
        group_size=group,
        in_features=columns,
        out_features=rows,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    options = {"bias": None, "packing_bitwidth": bitwidth, **options}
    layer.pack(codes, scales.reshape(-1, 1), zeros, **options)
    return {leaf: tensor.detach().clone() for leaf, tensor in layer.state_dict().items()}


def pack_linear(weight: torch.Tensor, variant: str, meta_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Pack weight [N, K] with gemlite: the five tensors of one layer, by leaf name.

    `meta_dtype` is the dtype of scales and zeros: float32 in the published packs, float16 as gemlite's helpers store.
    K must exceed 128: gemlite packs a single group as channel-wise scales, another formula.
    """
    columns = weight.shape[1]
    if columns <= GROUP:
        raise ValueError(f"K is {columns}; gemlite packs group-wise only with more than one group of {GROUP}")
    codes, scale = codes_and_scale(weight, variant)
    # gemlite takes (code - zero) * scale and turns it into code * scale + (-zero * scale), its W_group_mode 4.
    step, zero = (scale, 1.0) if variant == "ternary" else (2 * scale, 0.5)
    scales = step.to(meta_dtype)
    state = pack_codes(codes, scales, torch.full_like(scales, zero).reshape(-1, 1), BITS[variant])
    return {leaf: state[leaf] for leaf in LEAVES}


def dequantize(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weight [N, K] fp32 by gemlite's own unpacker and its own kernel formula for W_group_mode.

    The formula is the body of gemlite's Triton function `dequantize`, run on torch tensors.
    """
    import_gemlite()
    from gemlite.bitpack import unpack_over_cols_torch
    from gemlite.triton_kernels.utils import dequantize as kernel

    bits, group, mode = (int(leaves["metadata"][i]) for i in (1, 2, 10))
    columns = int(leaves["orig_shape"][1])
    codes = unpack_over_cols_torch(leaves["W_q"].t().contiguous(), bits, columns)
    triton_language = SimpleNamespace(fma=lambda a, b, c: a * b + c)
    formula = types.FunctionType(kernel.fn.__code__, {**kernel.fn.__globals__, "tl": triton_language})
    scales = leaves["scales"].float().t().repeat_interleave(group, dim=1)
    zeros = leaves["zeros"].float().t().repeat_interleave(group, dim=1)
    return formula(codes, scales, zeros, 0, torch.float32, 0, 1, mode, False)


def hqq_text_encoder(source: Path, target: Path) -> None:
    """Quantize source/ (Qwen3ForCausalLM) to 4 bit, groups of 64 along K, with hqq; write qmodel.pt and config.json."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float16)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(target))


def write_gemlite_pack(
    unpacked_folder: Path,
    out_folder: Path,
    variant: str,
    *,
    meta_dtype: torch.dtype = torch.float32,
    text_encoder: bool = True,
) -> None:
    """Repack a folder of `tiny_klein.write_pipeline` as a gemlite pack.

    `text_encoder` False leaves text_encoder-hqq-4bit/ out.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {VARIANTS}")
    unpacked_folder, out_folder = Path(unpacked_folder), Path(out_folder)
    target = out_folder / TRANSFORMER_FOLDER[variant]
    target.mkdir(parents=True, exist_ok=True)
    source = unpacked_folder / "transformer"
    state: dict[str, torch.Tensor] = {}
    packed = 0
    for name, tensor in load_file(source / "diffusion_pytorch_model.safetensors").items():
        if is_quantized(name):
            layer = name.removesuffix(".weight")
            state.update({f"{layer}.{leaf}": t for leaf, t in pack_linear(tensor, variant, meta_dtype).items()})
            packed += 1
        else:
            state[name] = tensor
    torch.save(state, target / "state_dict.pt")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"enable_time_sign_embed": False, "musubi_block_swap_device": "cpu", "musubi_blocks_to_swap": 0}
    write_json(target / "config.json", config)
    skipped = sum(1 for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2)
    quantization = {
        "format": FORMAT[variant],
        "bits": BITS[variant],
        "group_size": GROUP,
        "packing_bitwidth": 8,
        "input_dtype": "fp16",
        "output_dtype": "fp16",
        "quantized_count": packed,
        "skipped_count": skipped,
        "skip_patterns": [],
    }
    if variant == "ternary":
        quantization["solver"] = "ternary"
    write_json(target / "quantization_config.json", quantization)
    write_json(target / "gemlite_autotune.json", {"GEMV": {}, "GEMV_REVSPLITK": {}, "GEMV_SPLITK": {}, "GEMM": {}})

    if text_encoder:
        hqq_text_encoder(unpacked_folder / "text_encoder", out_folder / TEXT_ENCODER_FOLDER)
        if (unpacked_folder / "tokenizer").is_dir():
            shutil.copytree(
                unpacked_folder / "tokenizer", out_folder / TEXT_ENCODER_FOLDER / "tokenizer", dirs_exist_ok=True
            )
    shutil.copytree(unpacked_folder / "vae", out_folder / "vae", dirs_exist_ok=True)
    write_manifest(out_folder, f"{variant} g128 (gemlite)")
