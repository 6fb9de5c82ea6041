"""The VAE: diffusers' AutoencoderKLFlux2, narrow, trained on the drawings.

Latents are made robust against the small errors of a sampler by noise of LATENT_NOISE standard deviations during
training. The running statistics of the packed latents (`bn.*`, what FLUX.2 normalizes with) are measured at the end.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2

from . import dataset
from .checkpoint import Checkpoint
from .speed import compiled, follow

WIDTHS = (64, 64, 64, 64)
"""At least two channels for each of the 32 groups of a norm: a group of one forgets how bright its channel was."""
LAYERS = 1
LATENT_CHANNELS = 32
LATENT_NOISE = 0.06
BATCH, SIDE = 2, 128
"""Pictures of a step and their side. Smaller crops teach less: the norms see too little of a picture in them."""
STEPS = 5000
EMA = 0.995
ENCODED = 8
"""Pictures a batch of `encode_all`."""
RATE = 1e-3


STATISTICS = "vae_statistics.pt"


def build() -> AutoencoderKLFlux2:
    """The untrained model."""
    levels = len(WIDTHS)
    model = AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=WIDTHS,
        layers_per_block=LAYERS,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=256,
    )
    for module in model.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = _FloatGroupNorm
    _start_linear(model)
    return model


@torch.no_grad()
def _start_linear(model: AutoencoderKLFlux2) -> None:
    """An almost linear network that neither shrinks nor grows its signal.

    Residual branches begin with nothing; the convolutions between them keep the variance (torch's own start divides it
    by three at each of the dozen layers). Before the last norms channels come in pairs x, -x: a norm takes the mean of
    each group of two away, and with it how bright a picture is, but theirs is zero.
    """
    encoder, decoder = model.encoder, model.decoder
    for name, module in model.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight.zero_()
        elif name.endswith(("conv_in", "conv_out", "samplers.0.conv", "quant_conv")):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            module.bias.zero_()
    for last in (encoder.down_blocks[-2].downsamplers[0].conv, decoder.up_blocks[-2].upsamplers[0].conv):
        last.weight[1::2] = -last.weight[::2]


class _FloatGroupNorm(torch.nn.GroupNorm):
    """In fp32: the bf16 backward of torch's CPU kernel takes longer than all convolutions together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def to_model(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1 .. 1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_picture(values: torch.Tensor) -> np.ndarray:
    """The inverse of `to_model`, rounded."""
    return ((values.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train(work: Path, seconds: float = math.inf) -> bool:
    """Trains, from the last checkpoint if there is one, for at most `seconds`; True when all STEPS are done."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(work / "vae.pt", model=model, average=average, optimizer=optimizer)
    noisy = compiled(_Noisy(model))
    step, started = checkpoint.load(), time.monotonic()
    small, _ = dataset.load(work, 128, 128)
    large, _ = dataset.load(work, 256, 256)
    while step < STEPS:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, STEPS, RATE)
        target = to_model(_batch(step, small, large)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            picture, mean = noisy(target)
        difference = picture.float() - target
        loss = (
            difference.square().mean() * 4
            + difference.abs().mean()
            + _edges(difference)
            + 1e-4 * mean.float().square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(average, model, EMA, step)
        step += 1
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / difference.square().mean().item())
            print(
                f"vae step {step}: loss {loss.item():.4f}, {psnr:.2f} dB, {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if step % 250 == 0 or step == STEPS or time.monotonic() - started > seconds:
            checkpoint.save(step)
        if time.monotonic() - started > seconds:
            break
    return step >= STEPS


class _Noisy(torch.nn.Module):
    """Pictures through the model with noise on the latents: (reconstruction, latents)."""

    def __init__(self, model: AutoencoderKLFlux2) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.model.encode(picture).latent_dist.mean
        spread = mean.detach().float().std(dim=(0, 2, 3), keepdim=True)
        return self.model.decode(mean + LATENT_NOISE * spread * torch.randn_like(mean)).sample, mean


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then cosine to a fiftieth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _batch(step: int, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Small drawings and, one in four, crops of large ones, half mirrored: uint8 [BATCH, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(step)
    rows = []
    for _ in range(BATCH):
        source = large if rng.random() < 0.25 else small
        picture = source[rng.integers(len(source))]
        y, x = (int(rng.integers(n - SIDE + 1)) for n in picture.shape[:2])
        crop = picture[y : y + SIDE, x : x + SIDE]
        rows.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(rows)


def _edges(difference: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of neighbouring differences: keeps edges sharp."""
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    return across + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()


def load(work: Path) -> AutoencoderKLFlux2:
    """The trained model in evaluation mode."""
    model = build()
    Checkpoint(work / "vae.pt", average=model).load()
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(model: AutoencoderKLFlux2, pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> latents [B, 128, H/16, W/16], not normalized."""
    mean = model.encode(to_model(pictures).to(memory_format=torch.channels_last)).latent_dist.mean
    return F.pixel_unshuffle(mean, 2)


@torch.inference_mode()
def decode(model: AutoencoderKLFlux2, latents: torch.Tensor) -> np.ndarray:
    """Normalized latents [B, 128, h, w] -> uint8 pictures."""
    mean, deviation = statistics_of(model)
    return to_picture(model.decode(F.pixel_shuffle(latents * deviation + mean, 2)).sample)


def statistics_of(model: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) [1, 128, 1, 1] that normalize packed latents."""
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)


def measure_statistics(model: AutoencoderKLFlux2, work: Path) -> None:
    """Sets the model's running statistics from drawings of every size."""
    total, squares, count = torch.zeros(128), torch.zeros(128), 0
    for width, height in dataset.SIZES:
        pictures, _ = dataset.load(work, width, height)
        for i in range(0, 320, 32):
            values = encode(model, pictures[i : i + 32]).double()
            total += values.sum((0, 2, 3)).float()
            squares += values.square().sum((0, 2, 3)).float()
            count += values[:, 0].numel()
    mean = total / count
    model.bn.running_mean.copy_(mean)
    model.bn.running_var.copy_(squares / count - mean.square())


def load_statistics(work: Path) -> dict[str, torch.Tensor]:
    """What `encode_all` measured."""
    return torch.load(work / STATISTICS, weights_only=True)


def encode_all(work: Path) -> None:
    """Writes the normalized latents of every drawing: latents-WxH.npy, float16 [count, 128, h, w]."""
    model = load(work)
    with torch.inference_mode():
        measure_statistics(model, work)
    torch.save({n: b.clone() for n, b in model.bn.state_dict().items()}, work / STATISTICS)
    mean, deviation = statistics_of(model)
    for width, height in dataset.SIZES:
        pictures, _ = dataset.load(work, width, height)
        path = work / f"latents-{width}x{height}.npy"
        if path.is_file():
            continue
        rows, run = [], compiled(_Mean(model))
        for i in range(0, len(pictures), ENCODED):
            part = np.zeros((ENCODED, *pictures.shape[1:]), np.uint8)
            part[: len(pictures[i : i + ENCODED])] = pictures[i : i + ENCODED]
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                raw = F.pixel_unshuffle(run(to_model(part).to(memory_format=torch.channels_last)).float(), 2)
            rows.append(((raw - mean) / deviation)[: len(pictures) - i].half().numpy())
        np.save(path, np.concatenate(rows))
        print(f"latents of {width}x{height}", flush=True)


class _Mean(torch.nn.Module):
    """Pictures -> the mean of their latents."""

    def __init__(self, model: AutoencoderKLFlux2) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.model.encode(picture).latent_dist.mean


@torch.inference_mode()
def psnr(model: AutoencoderKLFlux2, pictures: np.ndarray) -> float:
    """Mean reconstruction PSNR in dB over uint8 pictures [B, H, W, 3]."""
    values = []
    for i in range(0, len(pictures), 16):
        target = to_model(pictures[i : i + 16])
        again = model.decode(model.encode(target).latent_dist.mean).sample.clamp(-1, 1)
        values += [10 * math.log10(4 / e) for e in (again - target).square().mean((1, 2, 3)).tolist()]
    return sum(values) / len(values)


def export(work: Path, folder: Path) -> None:
    """diffusers' files in bf16: vae/config.json and vae/diffusion_pytorch_model.safetensors."""
    from safetensors.torch import save_file

    model = load(work)
    model.bn.load_state_dict(load_statistics(work))
    tensors = {
        name: value.detach().contiguous() if name.startswith("bn.") else value.detach().bfloat16().contiguous()
        for name, value in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    kept = ("block_out_channels", "latent_channels", "layers_per_block")
    (folder / "config.json").write_text(json.dumps({n: model.config[n] for n in kept}, indent=1), encoding="utf-8")
