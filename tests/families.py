"""ComfyUI's own model classes, small and with random weights: dense, patched and sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from twins import absent, draw, load_device

CONTEXT = 64
POOLED = {"flux": 32, "sdxl": 1280, "sd3": 96}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": POOLED["flux"],
    "context_in_dim": CONTEXT,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "context_in_dim": CONTEXT,
    "hidden_size": 128,
    "mlp_ratio": 3.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
}
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "context_dim": CONTEXT,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": POOLED["sd3"],
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT, "out_features": 128},
    },
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
}
ZIMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": CONTEXT,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [64, 64, 64],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 1.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": CONTEXT,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 1,
    "ffn_dim": 256,
    "num_layers": 1,
    "text_dim": CONTEXT,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """An architecture: class in comfy.supported_models, configuration, latent, names of a packed and a kept layer."""

    model: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    layer: str
    kept: str
    packed: int


KINDS = {
    "flux": Kind("Flux", FLUX, (1, 16, 8, 8), "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", 10),
    "flux2": Kind("Flux2", FLUX2, (1, 128, 4, 4), "single_blocks.0.linear1", "single_stream_modulation.lin", 10),
    "sdxl": Kind(
        "SDXL",
        SDXL,
        (1, 4, 8, 8),
        "middle_block.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.1.0.emb_layers.1",
        48,
    ),
    "sd3": Kind("SD3", SD3, (1, 16, 8, 8), "joint_blocks.0.x_block.mlp.fc1", "final_layer.linear", 13),
    "zimage": Kind("ZImage", ZIMAGE, (1, 16, 8, 8), "layers.0.attention.qkv", "layers.0.adaLN_modulation.0", 30),
    "qwen": Kind(
        "QwenImage",
        QWEN,
        (1, 16, 1, 8, 8),
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.img_mod.1",
        12,
    ),
    "wan": Kind("WAN21_T2V", WAN, (1, 16, 1, 8, 8), "blocks.0.self_attn.q", "head.head", 10),
}


def random_tensors(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that keep activations near 1."""
    from bonsai_ops.host.tensors import tensors_of

    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in tensors_of(model.diffusion_model).items():
        noise = torch.randn(tensor.shape, generator=generator)
        norm = tensor.ndim == 1 and name.endswith(("weight", "scale"))
        values[name] = 1 + 0.1 * noise if norm else noise / max(1, tensor[0].numel()) ** 0.5
        if tensor.ndim == 1 and not norm:
            values[name] = 0.1 * noise
    return values


def stock(kind: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    """ComfyUI's ModelPatcher around its own class of this kind, in fp32: random weights, or these."""
    import comfy.model_patcher
    import comfy.supported_models

    config_class = getattr(comfy.supported_models, KINDS[kind].model, None)
    if config_class is None:
        absent(KINDS[kind].model)
    config = config_class(dict(KINDS[kind].config))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    values = random_tensors(model) if tensors is None else tensors
    model.diffusion_model.load_state_dict({n: t.clone() for n, t in values.items()}, strict=False)
    return comfy.model_patcher.CoreModelPatcher(model, load_device(), torch.device("cpu"))


def sample(kind: str, model: Any, steps: int = 1) -> torch.Tensor:
    """What KSampler draws from an empty latent of this kind."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 12, CONTEXT, generator=generator)
    pooled = torch.randn(1, POOLED.get(kind, 8), generator=generator)
    positive = [[states, {"pooled_output": pooled, "guidance": 3.5}]]
    start = {"samples": torch.zeros(KINDS[kind].latent)}
    return draw(model, positive=positive, negative=positive, start=start, steps=steps)


def patch(model: Any, **options: Any) -> tuple[Any, Any]:
    """Patch to BitLinear: (packed model, report)."""
    from bonsai_ops.host.patch import PatchOptions, patch_model

    statistics, progress = options.pop("statistics", None), options.pop("progress", None)
    return patch_model(model, PatchOptions(**options), statistics, progress)
