"""Tensors of LoRA files for the tiny models of twins.py: the forms in which files name layers, and other adapters."""

from __future__ import annotations

import torch
from twins import HIDDEN, LINEAR1, PROJ, QKV, SHAPES, low_rank

MLP = 6 * HIDDEN
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (HIDDEN, HIDDEN),
    "transformer_blocks.0.attn.to_k": (HIDDEN, HIDDEN),
    "transformer_blocks.0.attn.to_v": (HIDDEN, HIDDEN),
    "transformer_blocks.1.attn.add_q_proj": (HIDDEN, HIDDEN),
    "transformer_blocks.1.attn.add_v_proj": (HIDDEN, HIDDEN),
    "transformer_blocks.1.attn.to_add_out": (HIDDEN, HIDDEN),
    "transformer_blocks.0.ff.linear_in": (MLP, HIDDEN),
    "transformer_blocks.1.ff_context.linear_out": (HIDDEN, MLP // 2),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (3 * HIDDEN + MLP, HIDDEN),
    "single_transformer_blocks.1.attn.to_out": (HIDDEN, HIDDEN + MLP // 2),
    "single_transformer_blocks.2.attn.to_q": (HIDDEN, HIDDEN),
    "single_transformer_blocks.2.attn.to_v": (HIDDEN, HIDDEN),
}
BFL = {key.removesuffix(".weight"): shape for key, shape in SHAPES.items()}
UP_DOWN, B_A = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")
FORMS = {
    "bfl": low_rank(BFL, names=B_A),
    "kohya": low_rank(
        {f"lora_unet_{k.removeprefix('diffusion_model.').replace('.', '_')}": s for k, s in BFL.items()},
        names=UP_DOWN,
        alpha=3.0,
    ),
    "diffusers": low_rank({f"transformer.{k}": s for k, s in DIFFUSERS.items()}, names=B_A),
    "onetrainer": low_rank(
        {f"lora_transformer_{k.replace('.', '_')}": s for k, s in DIFFUSERS.items()}, names=UP_DOWN, alpha=2.0
    ),
    "linear1_qkv": low_rank({"diffusion_model.single_blocks.1.linear1_qkv": (3 * HIDDEN, HIDDEN)}, names=UP_DOWN),
    "bf16": low_rank(BFL, names=B_A, dtype=torch.bfloat16),
    "norm_out": low_rank({"transformer.norm_out.linear": (2 * HIDDEN, HIDDEN)}, names=B_A),
}


def adapters() -> dict[str, dict[str, torch.Tensor]]:
    """{kind: tensors} of patches that are not plain LoRA, on one layer each or on several."""
    generator = torch.Generator().manual_seed(11)

    def values(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator)

    name, (rows, columns) = QKV.removesuffix(".weight"), SHAPES[QKV]
    other, (out, into) = LINEAR1.removesuffix(".weight"), SHAPES[LINEAR1]
    return {
        "dora": low_rank({name: (rows, columns)}, names=UP_DOWN, alpha=2.0)
        | {f"{name}.dora_scale": values(rows, 1).abs() + 0.5},
        "loha": {
            f"{name}.hada_w1_a": values(rows, 2),
            f"{name}.hada_w1_b": values(2, columns, size=0.2),
            f"{name}.hada_w2_a": values(rows, 2),
            f"{name}.hada_w2_b": values(2, columns, size=0.2),
            f"{name}.alpha": torch.tensor(2.0),
        },
        "lokr": {f"{other}.lokr_w1": values(3, 2, size=0.3), f"{other}.lokr_w2": values(out // 3, into // 2, size=0.3)},
        "diff": {f"{name}.diff": values(rows, columns, size=0.05), f"{other}.diff": values(out, into, size=0.05)},
        "set": {f"{PROJ.removesuffix('.weight')}.set_weight": values(HIDDEN, HIDDEN, size=0.1)},
        "locon": low_rank({f"{name}": (rows, columns)}, names=UP_DOWN)
        | {f"{name}.lora_mid.weight": values(4, 4, 1, 1, size=0.5)},
    }
