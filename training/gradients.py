"""Gradients that ComfyUI's Train LoRA works with, stock and behind Right Gradients, against the true ones.

The loss is that of Train LoRA with MSE at one point: a latent z and a noise e of seed 0 at sigma 0.7, and the mean of
(v(0.3 z + 0.7 e) - (e - z))^2 over the values of the velocity v. For the dense seedling z is a drawing and the text its
caption, both held out of its training; small models with random weights get a random z and random text states. All in
fp32 on a CPU, at checkpoint depths 0 (none) to 3, by the checkpoints of Train LoRA.

The truth is the stock model in float64 without checkpoints, where PyTorch copies what is about to be written into
while a backward pass needs it (`allow_mutation_on_saved_tensors`). What is compared is the weights of the blocks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bonsai_ops.tools.bench.inside.comfyui import set_up

from .drawing import draw
from .measure import held_out
from .modes import PACK
from .node import SIDE, dense_model
from .other import random_model
from .rows import Rows

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FILE = "gradients.json"
DEPTHS = (0, 1, 2, 3)
SEED, SIGMA = 0, 0.7
TEXT, STATES = 12, 64
FLUX = {"depth": 2, "depth_single_blocks": 4, "hidden_size": 128, "num_heads": 1, "context_in_dim": STATES}
KINDS: Mapping[str, tuple[str, dict, tuple[int, ...]]] = {
    "FLUX.1, 2 + 4 blocks, random weights": (
        "Flux",
        {
            **FLUX,
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 32,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        (1, 16, 8, 8),
    ),
    "FLUX.2, 2 + 4 blocks, random weights": (
        "Flux2",
        {
            **FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "mlp_ratio": 3.0,
            "axes_dim": [32, 32, 32, 32],
            "theta": 2000,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "guidance_embed": False,
            "txt_ids_dims": [3],
        },
        (1, 128, 4, 4),
    ),
    "LTX, 4 blocks, random weights": (
        "LTXV",
        {
            "image_model": "ltxv",
            "in_channels": 16,
            "cross_attention_dim": 128,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_channels": STATES,
            "num_layers": 4,
        },
        (1, 16, 1, 4, 4),
    ),
}
"""{name: (class in comfy.supported_models, its configuration, latent)}."""
SEEDLING = "the dense seedling (FLUX.2)"


@dataclass(frozen=True)
class Point:
    """Arguments of a transformer, and the velocity that the loss asks for."""

    inputs: Mapping[str, Any]
    target: torch.Tensor

    def to(self, dtype: torch.dtype) -> Point:
        inputs = {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in self.inputs.items()}
        return Point(inputs, self.target.to(dtype))


def show(work: Path, comfyui: Path) -> None:
    """Measures what is missing; the seedling needs the stage `dense`."""
    set_up(comfyui, arguments=["--base-directory", str(work)])
    import comfy.model_management

    comfy.model_management.in_training = True  # no kernels without a backward pass
    rows = Rows(work / FILE)
    if SEEDLING not in rows:
        model = dense_model(work)
        rows.add(SEEDLING, measured(model, _drawn(model)))
    for name, (kind, config, latent) in KINDS.items():
        if name not in rows:
            model = random_model(kind, config)
            text = torch.randn(1, TEXT, STATES, generator=torch.Generator().manual_seed(SEED + 1))
            rows.add(
                name,
                measured(
                    model, point(model, torch.randn(latent, generator=torch.Generator().manual_seed(SEED + 2)), text)
                ),
            )
    print("\n".join(table(rows)), flush=True)


def table(rows: Mapping[str, Mapping]) -> Iterator[str]:
    """The rows that there are as lines of Markdown."""
    yield "| model | no checkpoints | depth 1 | depth 2 | depth 3 | error behind the node |"
    yield "| --- " * 6 + "|"
    for name, row in rows.items():
        yield f"| {name} | " + " | ".join(cells(row)) + " |"


def cells(row: Mapping[str, Any]) -> Iterator[str]:
    """The cosine at each depth, or that it raises; last, the largest error behind the node."""
    for found in row["stock"].values():
        cosine = found.get("cosine")
        yield "raises" if cosine is None else f"{cosine:.{2 if cosine < 0.99 else 3}f}"
    yield f"{max(found['error'] for found in row['right'].values()):.1e}".replace("e-0", "e-")


def measured(model: ModelPatcher, at: Point) -> dict[str, dict[str, dict]]:
    """{"stock" or "right": {depth: {"cosine", "error"} or {"raises": the first line of what was raised}}}.

    error: relative, root mean square. The model's layers are right afterwards.
    """
    from bonsai_ops.host.gradients import with_right_gradients

    exact = copy.deepcopy(model.model.diffusion_model).double()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        truth = _gradients(exact, at.to(torch.float64), 0)
    stock = {str(depth): _compared(model.model.diffusion_model, at, depth, truth) for depth in DEPTHS}
    right = with_right_gradients(model).model.diffusion_model
    return {"stock": stock, "right": {str(depth): _compared(right, at, depth, truth) for depth in DEPTHS}}


def point(model: ModelPatcher, latent: torch.Tensor, text: torch.Tensor) -> Point:
    """Between this latent, as the model has it, and a noise. text: states [1, tokens, width]."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(latent.shape, generator=generator)
    pooled = torch.randn(1, model.model.model_config.unet_config.get("vec_in_dim") or 8, generator=generator)
    known = {"cross_attn": text, "pooled_output": pooled, "guidance": 3.5, "frame_rate": 25}
    conditions = model.model.extra_conds(noise=noise, device=noise.device, **known)
    inputs = {n: c.process_cond(batch_size=1, device=noise.device, area=None).cond for n, c in conditions.items()}
    inputs["context"] = inputs.pop("c_crossattn")
    inputs.setdefault("attention_mask", None)
    inputs["x"] = (1 - SIGMA) * latent + SIGMA * noise
    inputs["timestep"] = model.model.model_sampling.timestep(torch.tensor([SIGMA])).float()
    return Point(inputs, noise - latent)


def _drawn(model: ModelPatcher) -> Point:
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae

    ((scene, prompt),) = held_out(1)
    pixels = torch.from_numpy(np.asarray(draw(scene, SIDE, SIDE), np.float32) / 255)[None]
    clip = load_bonsai_text_encoder(PACK)
    with torch.inference_mode():
        latent = model.model.process_latent_in(load_vae(PACK).encode(pixels))
        ((text, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return point(model, latent.clone(), text.clone())


def _compared(transformer: torch.nn.Module, at: Point, depth: int, truth: torch.Tensor) -> dict[str, Any]:
    try:
        found = _gradients(transformer, at, depth).double()
    except RuntimeError as error:
        return {"raises": str(error).splitlines()[0]}
    cosine = torch.nn.functional.cosine_similarity(found, truth, dim=0)
    return {"cosine": float(cosine), "error": float((found - truth).norm() / truth.norm())}


def _gradients(transformer: torch.nn.Module, at: Point, depth: int) -> torch.Tensor:
    """Those of the weights of the blocks, in a row."""
    from bonsai_ops.host.gradients import outer_blocks

    weights = [w for block in outer_blocks(transformer) for w in block.parameters() if w.is_floating_point()]
    for parameter in transformer.parameters():
        parameter.requires_grad_(True).grad = None
    inputs = dict(at.inputs)
    with _checkpoints(transformer, depth):
        velocity = transformer(inputs.pop("x"), inputs.pop("timestep"), **inputs, transformer_options={})
        (velocity - at.target).square().mean().backward()
    return torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])


@contextlib.contextmanager
def _checkpoints(transformer: torch.nn.Module, depth: int) -> Iterator[None]:
    """Train LoRA's at this depth, 0 for none."""
    train = importlib.import_module("comfy_extras.nodes_train")
    modules = train.find_modules_at_depth(transformer, depth=depth) if depth else []
    for module in modules:
        train.patch(module)
    try:
        yield
    finally:
        for module in modules:
            train.unpatch(module)
