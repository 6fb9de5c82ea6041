"""The transformer: diffusers' Flux2Transformer2DModel in Klein's shape, ternary or binary while it learns.

Flow matching: x = (1 - sigma) latent + sigma noise, the model predicts noise - latent. Half of the sigmas are those of
the official schedule at 4 steps, the others uniform after its shift. The linears of the blocks keep an fp32 master and
compute with its packed values (straight-through estimator).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch.nn.utils import parametrize

from bonsai_ops.host.schedule import official_sigmas, shift_mu
from bonsai_ops.kernels import cpu_has_fast_bf16

from . import captions, dataset, text_encoder
from .checkpoint import Checkpoint
from .muon import Muon
from .speed import compiled, follow, frozen, narrow
from .vae import rate

HEADS, DOUBLE, SINGLE = 2, 2, 4
GROUP = 128
SHARES = {(128, 128): 0.38, (192, 128): 0.20, (128, 192): 0.10, (256, 256): 0.32}
"""{(width, height): chance of a training step}; sizes whose latents are not there yet are left out."""
SAMPLING_STEPS = 4
TOKENS = 4096
"""Text and image tokens of one training step."""
SHORT_TEXT, FULL_TEXT, FULL_TEXT_SHARE = 48, 512, 0.06
"""Text tokens of a step. The host always gives FULL_TEXT, mostly padding: square pictures see that now and then."""
RATES = {"ternary": 1.2e-3, "binary": 1.2e-3, "dense": 4e-4}
"""Peak learning rates of Muon, for the packed layers, and of AdamW, for everything else."""
EMA = 0.998
SCHEMES = ("dense", "ternary", "binary")


def build() -> Flux2Transformer2DModel:
    """The untrained model."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=128,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * text_encoder.HIDDEN,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
                if "modulation" in name or name.startswith(("norm_out", "proj_out")):
                    parameter.mul_(0.1)
    return model


def packed_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """(name, linear) of the layers that the packs pack: those inside the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(
            ("transformer_blocks.", "single_transformer_blocks.")
        ):
            yield name, module


def quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(values -1, 0, +1 [N, K / 128, 128], scales [N, K / 128] exact in bf16) of a master weight [N, K].

    Ternary: zero below 0.7 mean|w| (Ternary Weight Networks, Li et al. 2016), scale the mean of the rest's |w|, the
    least-squares scale for those signs. Binary: the sign and mean|w|.
    """
    grouped = weight.detach().float().unflatten(1, (-1, GROUP))
    size = grouped.abs()
    if scheme == "binary":
        signs = torch.where(grouped >= 0, 1.0, -1.0)
        scale = size.mean(2)
    else:
        kept = size > 0.7 * size.mean(2, keepdim=True)
        signs = grouped.sign() * kept
        scale = (size * kept).sum(2) / kept.sum(2).clamp(min=1)
    return signs, scale.bfloat16().float()


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """The values [N, K] that a master weight has when it is packed."""
    signs, scale = quantize(weight, scheme)
    return (signs * scale[..., None]).flatten(1)


class Packed(torch.nn.Module):
    """Parametrization: the packed values forward, the identity backward; `scheme` dense does nothing."""

    scheme = "dense"

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.scheme == "dense":
            return weight
        return weight + (rounded(weight, self.scheme) - weight).detach()


def parametrized(scheme: str) -> tuple[Flux2Transformer2DModel, Packed]:
    """An untrained model whose packed layers go through one Packed of `scheme`."""
    model, packing = build(), Packed()
    packing.scheme = scheme
    for _, layer in list(packed_layers(model)):
        parametrize.register_parametrization(layer, "weight", packing)
    return model, packing


def positions(width: int, height: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image ids [L, 4], text ids [text, 4]) for a picture of width x height pixels."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(height // 16), torch.arange(width // 16), zero)
    return image, torch.cartesian_prod(zero, zero, zero, torch.arange(text))


def predict(
    model: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, width: int, height: int
) -> torch.Tensor:
    """Velocity [B, L, 128] for tokens x [B, L, 128] at sigma [B], with text [B, T, 384]."""
    image_ids, text_ids = positions(width, height, text.shape[1])
    return model(
        hidden_states=x,
        encoder_hidden_states=text,
        timestep=sigma,
        img_ids=image_ids,
        txt_ids=text_ids,
        guidance=None,
        return_dict=False,
    )[0]


class Forward:
    """`predict` of one model, compiled once for each shape."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.shapes = model, {}

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, width: int, height: int
    ) -> torch.Tensor:
        key = (*x.shape, *text.shape, width, height)
        if key not in self.shapes:
            self.shapes[key] = compiled(_Sized(self.model, width, height))
        return self.shapes[key](x, sigma, text)


class _Sized(torch.nn.Module):
    """`predict` for pictures of one size."""

    def __init__(self, model: torch.nn.Module, width: int, height: int) -> None:
        super().__init__()
        self.model, self.size = model, (width, height)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return predict(self.model, x, sigma, text, *self.size)


def importance(latents: np.ndarray, pictures: np.ndarray) -> torch.Tensor:
    """Root [32, 32] of a metric in which errors of latents count by half as much as they change pixels.

    Latents have unit variance in every direction, but few directions hold most of a picture: colours and shapes. From
    the linear map of latents [B, 128, h, w] to blocks of 8 x 8 pixels of uint8 [B, H, W, 3] that fits best.
    """
    values = F.pixel_shuffle(torch.from_numpy(latents.astype(np.float32)), 2).permute(0, 2, 3, 1).flatten(0, 2)
    blocks = F.pixel_unshuffle(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), 8)
    values = values - values.mean(0)
    linear = torch.linalg.lstsq(values, blocks.permute(0, 2, 3, 1).flatten(0, 2)).solution
    metric = linear @ linear.T
    size, directions = torch.linalg.eigh(0.5 * metric / metric.diagonal().mean() + 0.5 * torch.eye(len(metric)))
    return directions * size.clamp(min=0).sqrt() @ directions.T


def weighted_error(difference: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Mean square of velocities' differences [B, L, 128] in the metric of `importance`."""
    return (difference.unflatten(2, (-1, 4)).transpose(2, 3) @ root).square().mean()


class Feed:
    """Endless training batches: latents of one size, fresh captions, noise and sigmas, decided by the step alone."""

    def __init__(self, work: Path, comfyui: Path) -> None:
        self.tokenizer = text_encoder.tokenizer(comfyui)
        encoder, self.vocabulary = text_encoder.load(work, self.tokenizer)
        self.encoder = frozen(encoder)
        self.latents, self.scenes = {}, {}
        for size in SHARES:
            if not (work / f"latents-{size[0]}x{size[1]}.npy").is_file():
                continue
            self.latents[size] = np.load(work / f"latents-{size[0]}x{size[1]}.npy", mmap_mode="r")
            pictures, self.scenes[size] = dataset.load(work, *size)
            if size == (128, 128):
                self.importance = importance(np.array(self.latents[size][:600]), np.array(pictures[:600]))

    def batch(self, step: int) -> tuple:
        """(width, height, x0 [B, L, 128], text [B, T, 384], sigma [B], noise)."""
        rng = random.Random(step)
        generator = torch.Generator().manual_seed(step)
        width, height = rng.choices(list(self.latents), [SHARES[size] for size in self.latents])[0]
        length = FULL_TEXT if width == height and rng.random() < FULL_TEXT_SHARE else SHORT_TEXT
        tokens = width * height // 256
        count = max(4, round(TOKENS / (tokens + length)))
        chosen = rng.sample(range(len(self.scenes[width, height])), count)
        latents = torch.from_numpy(self.latents[width, height][sorted(chosen)]).float()
        texts = [captions.caption(self.scenes[width, height][i], rng)[0] for i in sorted(chosen)]
        sigma = self.sigmas(tokens, count, generator)
        x0 = latents.flatten(2).transpose(1, 2)
        return width, height, x0, self.encode(texts, length), sigma, torch.randn(x0.shape, generator=generator)

    @staticmethod
    def sigmas(tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count]: half official ones, half uniform ones after the same shift, spread evenly."""
        official = official_sigmas(tokens, SAMPLING_STEPS)[:-1]
        picked = official[torch.randint(0, len(official), (count,), generator=generator)]
        uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        growth = math.exp(shift_mu(tokens, SAMPLING_STEPS))
        shifted = growth / (growth + 1 / uniform.clamp(1e-4, 1) - 1)
        return torch.where(torch.rand(count, generator=generator) < 0.5, picked, shifted)

    @torch.no_grad()
    def encode(self, texts: list[str], length: int) -> torch.Tensor:
        """[B, length, 384] for prompts."""
        rows, lengths = zip(*(self.vocabulary.encode(self.tokenizer, text, length) for text in texts), strict=True)
        with narrow():
            return self.encoder(torch.tensor(rows), torch.tensor(lengths)).float()


def optimizers(model: torch.nn.Module, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the masters of the packed layers of a `parametrized` model, AdamW for all other parameters."""
    masters = [layer.parametrizations.weight.original for _, layer in packed_layers(model)]
    packed = {id(master) for master in masters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in packed]
    adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return Muon(masters, lr, dtype=torch.bfloat16 if cpu_has_fast_bf16() else torch.float32), adam


def train(
    work: Path, comfyui: Path, scheme: str, steps: int, seconds: float = math.inf, start: Path | None = None
) -> bool:
    """Trains `scheme` for `steps` steps, from its checkpoint or else from the states in `start`; True when done."""
    torch.manual_seed(0)
    model, _ = parametrized(scheme)
    average = copy.deepcopy(model)
    muon, adam = optimizers(model, RATES[scheme])
    checkpoint = Checkpoint(work / f"{scheme}.pt", model=model, average=average, muon=muon, adam=adam)
    step, started = checkpoint.load(), time.monotonic()
    if step == 0 and start is not None:
        Checkpoint(start, average=model).load()
        average.load_state_dict(model.state_dict())
    feed = Feed(work, comfyui)
    forward = Forward(model)
    recent: list[float] = []
    while step < steps:
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = rate(step, steps, RATES[scheme])
        width, height, x0, text, sigma, noise = feed.batch(step)
        s = sigma[:, None, None]
        with narrow():
            velocity = forward((1 - s) * x0 + s * noise, sigma, text, width, height)
        loss = weighted_error(velocity.float() - (noise - x0), feed.importance)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        follow(average, model, EMA, step)
        step += 1
        recent.append(loss.item())
        over = time.monotonic() - started > seconds
        if step % 50 == 0 or over:
            print(
                f"{scheme} step {step}: loss {sum(recent) / len(recent):.4f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            recent.clear()
        if step % 50 == 0 or step == steps or over:
            checkpoint.save(step)
        if over:
            break
    return step >= steps


@torch.no_grad()
def sample(
    model: torch.nn.Module, text: torch.Tensor, width: int, height: int, seeds: list[int], steps: int = SAMPLING_STEPS
) -> torch.Tensor:
    """Normalized latents [B, 128, height/16, width/16] by Euler steps of the official schedule."""
    tokens = width * height // 256
    sigmas = official_sigmas(tokens, steps)
    x = torch.stack([torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for now, then in itertools.pairwise(sigmas):
        with narrow():
            velocity = predict(model, x, now.expand(len(seeds)), text, width, height).float()
        x = x + (then - now) * velocity
    return x.transpose(1, 2).unflatten(2, (height // 16, width // 16))


def load(work: Path, scheme: str) -> Flux2Transformer2DModel:
    """The averaged model of a checkpoint."""
    model, _ = parametrized(scheme)
    Checkpoint(work / f"{scheme}.pt", average=model).load()
    return model.eval().requires_grad_(False)


def state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors under their plain names, masters for packed layers."""
    return {n.replace(".parametrizations.weight.original", ".weight"): t for n, t in model.state_dict().items()}


def describe(model: torch.nn.Module) -> str:
    """Parameters, packed and others, as JSON."""
    packed = sum(layer.weight.numel() for _, layer in packed_layers(model))
    return json.dumps({"packed": packed, "dense": sum(p.numel() for p in model.parameters()) - packed})
