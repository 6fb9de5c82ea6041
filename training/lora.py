"""A LoRA for the seedling: night scenes, whatever the prompt leaves open. Trained on the packed ternary weights."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrize

from . import captions, transformer
from .checkpoint import Checkpoint
from .speed import narrow
from .vae import rate

RANK, STEPS, RATE, SIZE, BATCH = 4, 200, 2e-3, (128, 128), 24
ATTRIBUTE, VALUE = "background", "night"
PREFIX = "single_transformer_blocks."
FILE = "lora.pt"


class Branch(torch.nn.Module):
    """Parametrization: W + up down."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(RANK, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def attach(model: torch.nn.Module) -> torch.nn.ModuleDict:
    """Puts a branch beside each packed layer of the single blocks; {layer name with - for the dots: branch}."""
    branches = torch.nn.ModuleDict()
    for name, layer in list(transformer.packed_layers(model)):
        if name.startswith(PREFIX):
            branches[name.replace(".", "-")] = branch = Branch(layer.weight)
            parametrize.register_parametrization(layer, "weight", branch)
    return branches


def train(work: Path, comfyui: Path, seconds: float = math.inf) -> bool:
    """Trains from the last checkpoint; True when all STEPS are done."""
    torch.manual_seed(0)
    model = transformer.load(work, "ternary")
    branches = attach(model)
    optimizer = torch.optim.AdamW(branches.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint = Checkpoint(work / FILE, branches=branches, optimizer=optimizer)
    step, started = checkpoint.load(), time.monotonic()
    feed, forward = transformer.Feed(work, comfyui), transformer.Forward(model)
    chosen = [i for i, scene in enumerate(feed.scenes[SIZE]) if getattr(scene, ATTRIBUTE) == VALUE]
    tokens = SIZE[0] * SIZE[1] // 256
    while step < STEPS:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, STEPS, RATE, warmup=20)
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        rows = sorted(rng.sample(chosen, BATCH))
        scenes = [feed.scenes[SIZE][i] for i in rows]
        text = feed.encode([captions.caption(s, rng, silent=(ATTRIBUTE,))[0] for s in scenes], transformer.SHORT_TEXT)
        x0 = torch.from_numpy(feed.latents[SIZE][rows]).float().flatten(2).transpose(1, 2)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = feed.sigmas(tokens, BATCH, generator)
        s = sigma[:, None, None]
        with narrow():
            velocity = forward((1 - s) * x0 + s * noise, sigma, text, *SIZE)
        loss = transformer.weighted_error(velocity.float() - (noise - x0), feed.importance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        over = time.monotonic() - started > seconds
        if step % 25 == 0 or over:
            print(f"lora step {step}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
        if step % 100 == 0 or step == STEPS or over:
            checkpoint.save(step)
        if over:
            break
    return step >= STEPS


def load(work: Path) -> torch.nn.Module:
    """The ternary model with the trained branches."""
    model = transformer.load(work, "ternary")
    Checkpoint(work / FILE, branches=attach(model)).load()
    return model.eval().requires_grad_(False)


def export(work: Path, target: Path) -> None:
    """The LoRA with diffusers' names, bf16."""
    branches = attach(transformer.load(work, "ternary"))
    Checkpoint(work / FILE, branches=branches).load()
    tensors = {}
    for name, branch in branches.items():
        layer = "transformer." + name.replace("-", ".")
        tensors[f"{layer}.lora_A.weight"] = branch.down.detach().bfloat16().contiguous()
        tensors[f"{layer}.lora_B.weight"] = branch.up.detach().bfloat16().contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target)
