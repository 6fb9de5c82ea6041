"""The VAE: a tiny autoencoder of the TAESD family, which ComfyUI runs with its own class, narrow and without norms.

Modules stand at the places and under the names of `comfy.taesd.taesd.TAESD`; where the seedling has no block stands the
ReLU that a block of zeros is, and its channels are fewer: bonsai_ops/host/vae.py fills both up with zeros. Latents
[B, 32, H/8, W/8] are normalized by running statistics, which `export` folds into the last convolution of the encoder,
and made robust against the small errors of a sampler by noise of LATENT_NOISE standard deviations.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import dataset
from .checkpoint import Checkpoint
from .muon import Muon
from .speed import compiled, narrow

WIDTHS = (24, 48, 64, 64)
"""Channels at full size and after each halving."""
ENCODER_BLOCKS, DECODER_BLOCKS = (0, 1, 1, 2), (1, 1, 2, 3)
"""Residual blocks at full size and after each halving."""
STOCK_BLOCKS = (1, 3, 3, 3)
LATENT_CHANNELS = 32
LATENT_NOISE = 0.05
MOMENTUM = 0.99
BATCH, SIDE = 4, 128
"""Pictures of a step and their side."""
STEPS, DECODER_STEPS = 2500, 9000
ENCODED = 8
"""Pictures a batch of `encode_all`."""
DECODER_RATE, RATE = 5e-4, 2e-4
"""Peak learning rates: Muon's for the decoder's convolutions, AdamW's for everything else."""


class Block(nn.Module):
    """Three convolutions beside an identity, then a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width, start=0)
        )
        self.fuse = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fuse(self.conv(x) + x)


class Clamp(nn.Module):
    """Keeps latents within 3 standard deviations, smoothly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def conv(before: int, after: int, start: float = 2.0, **options: object) -> nn.Conv2d:
    """A 3x3 convolution whose weights begin with variance start / inputs."""
    layer = nn.Conv2d(before, after, 3, padding=1, **options)
    with torch.no_grad():
        layer.weight.normal_(0, math.sqrt(start / (9 * before)))
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def _blocks(level: int, counts: tuple[int, ...]) -> list[nn.Module]:
    """`counts[level]` blocks and, for the rest of the stock number, what blocks of zeros do."""
    count = counts[level]
    return [*(Block(WIDTHS[level]) for _ in range(count)), *(nn.ReLU() for _ in range(STOCK_BLOCKS[level] - count))]


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W] in -1 .. 1 <-> normalized latents [B, 32, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        encoder = [conv(3, WIDTHS[0]), *_blocks(0, ENCODER_BLOCKS)]
        for level in (1, 2, 3):
            encoder += [
                conv(WIDTHS[level - 1], WIDTHS[level], stride=2, bias=False),
                *_blocks(level, ENCODER_BLOCKS),
            ]
        decoder = [Clamp(), conv(LATENT_CHANNELS, WIDTHS[3]), nn.ReLU()]
        for level in (3, 2, 1):
            decoder += [
                *_blocks(level, DECODER_BLOCKS),
                nn.Upsample(scale_factor=2),
                conv(WIDTHS[level], WIDTHS[level - 1], bias=False),
            ]
        self.taesd_encoder = nn.Sequential(*encoder, conv(WIDTHS[3], LATENT_CHANNELS, start=1))
        self.taesd_decoder = nn.Sequential(*decoder, *_blocks(0, DECODER_BLOCKS), conv(WIDTHS[0], 3, start=1))
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("deviation", torch.ones(LATENT_CHANNELS))

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        return self.normalize(self.taesd_encoder(picture * 0.5 + 0.5))

    def normalize(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.taesd_decoder(latent).sub(0.5).mul(2)

    @torch.no_grad()
    def start_linear(self, pictures: np.ndarray) -> None:
        """Makes both halves the best linear ones that fit into them, found by least squares on uint8 [B, H, W, 3].

        Encoder: the first 32 principal components of blocks of 8 x 8 pixels. Decoder: from there to components of
        blocks of 4 x 4, 2 x 2 and one pixel. Channels come in pairs x, -x, so that the ReLUs lose nothing.
        """
        target = to_model(pictures) * 0.5 + 0.5
        encoder = [layer for layer in self.taesd_encoder if isinstance(layer, nn.Conv2d)]
        for layer in encoder:
            layer.weight.mul_(0.1)
        first, *halvings, last = encoder
        first.weight[:3] = torch.eye(3)[:, :, None, None] * _tap(1, 1)
        for layer, channels in zip(halvings, (3, 12), strict=False):
            layer.weight[: 4 * channels] = 0
            for i in range(4):
                part = layer.weight[i * channels : (i + 1) * channels, :channels]
                part += torch.eye(channels)[:, :, None, None] * _tap(1 + i // 2, 1 + i % 2)
        halvings[2].weight.zero_()
        parts = _components(_blocks_of(target, 3), LATENT_CHANNELS).split(48, 1)
        for i, part in enumerate(parts):
            halvings[2].weight[:, :48] += _mirrored(part)[:, :, None, None] * _tap(1 + i // 2, 1 + i % 2)
        raw = _blocks_of(target, 3).permute(0, 2, 3, 1) @ torch.cat(parts, 1).T  # [B, h, w, 32]
        spread = raw.flatten(0, 2).std(0)
        # Turned at random, components of unit variance have no long tails for Clamp to cut.
        turn = torch.linalg.qr(torch.randn(LATENT_CHANNELS, LATENT_CHANNELS))[0] / spread
        last.weight.copy_(_unmirrored(turn)[:, :, None, None] * _tap(1, 1))
        latent = self.taesd_encoder(target)
        self.follow_statistics(latent, 0.0)

        decoder = [layer for layer in self.taesd_decoder if isinstance(layer, nn.Conv2d)]
        for layer in decoder:
            layer.weight.mul_(0.1)
        clamped = F.pad(self.taesd_decoder[0](self.normalize(latent)).permute(0, 2, 3, 1), (0, 1), value=1.0)
        inverse = torch.linalg.lstsq(clamped.flatten(0, 2), raw.flatten(0, 2)).solution.T
        decoder[0].weight.copy_(_mirrored(inverse[:, :-1])[:, :, None, None] * _tap(1, 1))
        decoder[0].bias.copy_(torch.stack([inverse[:, -1], -inverse[:, -1]], 1).flatten())
        signal = (clamped @ inverse.T).permute(0, 3, 1, 2)
        for level, layer in zip((2, 1, 0), decoder[1:4], strict=True):
            wanted = _blocks_of(target, level)
            if wanted.shape[1] > layer.out_channels // 2:
                basis = _components(wanted, layer.out_channels // 2)
                wanted = torch.einsum("kc,bchw->bkhw", basis, wanted)
            fine = F.interpolate(signal, scale_factor=2)
            kernel = _fit(fine, wanted)
            count, used = wanted.shape[1], signal.shape[1]
            layer.weight[:, : 2 * used] = 0
            layer.weight[0 : 2 * count : 2, 0 : 2 * used : 2] = kernel
            layer.weight[0 : 2 * count : 2, 1 : 2 * used : 2] = -kernel
            layer.weight[1 : 2 * count : 2] = -layer.weight[0 : 2 * count : 2]
            signal = F.conv2d(fine, kernel, padding=1)
        decoder[4].weight.zero_()
        for channel in range(3):
            decoder[4].weight[channel, 2 * channel, 1, 1] = 1
            decoder[4].weight[channel, 2 * channel + 1, 1, 1] = -1

    @torch.no_grad()
    def follow_statistics(self, raw: torch.Tensor, keep: float) -> None:
        """Moves the running statistics towards those of a batch of what the encoder gave."""
        raw = raw.float()
        self.mean.lerp_(raw.mean((0, 2, 3)), 1 - keep)
        self.deviation.lerp_(raw.std((0, 2, 3)).clamp(min=1e-3), 1 - keep)


def _tap(y: int, x: int) -> torch.Tensor:
    """A 3x3 kernel of zeros with a one at (y, x)."""
    kernel = torch.zeros(3, 3)
    kernel[y, x] = 1
    return kernel


def _blocks_of(pictures: torch.Tensor, halvings: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, 4^halvings C, ...]: 2 x 2 pixels to channels (dy, dx, c), as often as asked."""
    for _ in range(halvings):
        pictures = F.pixel_unshuffle(pictures, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
    return pictures


def _components(values: torch.Tensor, count: int) -> torch.Tensor:
    """The first principal components [count, C] of [B, C, H, W], not centred."""
    rows = values.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :count].T.contiguous()


def _mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """Rows r -> r, -r."""
    return torch.stack([matrix, -matrix], 1).flatten(0, 1)


def _unmirrored(matrix: torch.Tensor) -> torch.Tensor:
    """Columns that take x from the ReLUs of x and -x."""
    return _mirrored(matrix.T).T


def _fit(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The 3x3 kernel [D, C, 3, 3] that comes nearest to wanted [B, D, H, W] from values [B, C, H, W]."""
    gram, product = 0.0, 0.0
    for value, target in zip(values.split(20), wanted.split(20), strict=True):
        rows = F.unfold(value, 3, padding=1).transpose(1, 2).flatten(0, 1)
        gram = gram + rows.T @ rows
        product = product + rows.T @ target.flatten(2).transpose(1, 2).flatten(0, 1)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, product).T.unflatten(1, (-1, 3, 3))


class _Noisy(nn.Module):
    """Pictures through the model with noise on the latents: (reconstruction, latents before they are normalized)."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw = self.model.taesd_encoder(picture * 0.5 + 0.5)
        latent = self.model.normalize(raw)
        return self.model.decode(latent + LATENT_NOISE * torch.randn_like(latent)), raw


def to_model(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1 .. 1."""
    values = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return values.to(memory_format=torch.channels_last)


def to_picture(values: torch.Tensor) -> np.ndarray:
    """The inverse of `to_model`, rounded."""
    return ((values.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train(work: Path, seconds: float = math.inf) -> bool:
    """Trains both halves, from the last checkpoint if there is one, for at most `seconds`; True when all is done."""
    return _train(work, "vae", None, STEPS, seconds)


def train_decoder(work: Path, seconds: float = math.inf) -> bool:
    """Trains the decoder on, with the encoder as `train` left it."""
    return _train(work, "vae_decoder", work / "vae.pt", DECODER_STEPS, seconds)


def _train(work: Path, name: str, start: Path | None, steps: int, seconds: float) -> bool:
    torch.manual_seed(0)
    model = Autoencoder()
    small, _ = dataset.load(work, 128, 128)
    large, _ = dataset.load(work, 256, 256)
    model.start_linear(np.array(small[:300]))
    if start is not None:
        Checkpoint(start, model=model).load()
        model.taesd_encoder.requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)
    kernels = [p for p in model.taesd_decoder.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not k for k in kernels)]
    muon, adam = Muon(kernels, DECODER_RATE), torch.optim.AdamW(others, RATE, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(work / f"{name}.pt", model=model, muon=muon, adam=adam)
    noisy = compiled(_Noisy(model))
    step, began = checkpoint.load(), time.monotonic()
    torch.manual_seed(step)
    recent: list[float] = []
    while step < steps:
        for optimizer, peak in ((muon, DECODER_RATE), (adam, RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
        target = to_model(_batch(step, small, large))
        with narrow():
            picture, raw = noisy(target)
        difference = picture.float() - target
        loss = difference.square().mean() * 4 + difference.abs().mean() + _edges(difference)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        if start is None:
            model.follow_statistics(raw.detach(), min(MOMENTUM, step / (step + 10)))
        step += 1
        recent.append(difference.square().mean().item())
        over = time.monotonic() - began > seconds
        if step % 100 == 0 or over:
            decibels = -10 * math.log10(sum(recent) / len(recent) / 4)
            print(f"{name} step {step}: {decibels:.2f} dB, {time.monotonic() - began:.0f} s", flush=True)
            recent.clear()
        if step % 250 == 0 or step == steps or over:
            checkpoint.save(step)
        if over:
            break
    return step >= steps


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


def load(work: Path) -> Autoencoder:
    """The trained model in evaluation mode, with the decoder of `train_decoder` if there is one."""
    model = Autoencoder()
    path = work / "vae_decoder.pt"
    Checkpoint(path if path.is_file() else work / "vae.pt", model=model).load()
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(model: Autoencoder, pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> normalized latents [B, 128, H/16, W/16]."""
    return F.pixel_unshuffle(model.encode(to_model(pictures)), 2)


@torch.inference_mode()
def decode(model: Autoencoder, latents: torch.Tensor) -> np.ndarray:
    """Normalized latents [B, 128, h, w] -> uint8 pictures."""
    return to_picture(model.decode(F.pixel_shuffle(latents, 2).to(memory_format=torch.channels_last)))


def encode_all(work: Path, processes: int = 2) -> None:
    """Writes the normalized latents of every drawing: latents-WxH.npy, float16 [count, 128, h, w]."""
    missing = [size for size in dataset.SIZES if not _latents(work, *size).is_file()]
    missing.sort(key=lambda size: -dataset.SIZES[size] * size[0] * size[1])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for width, height in pool.imap_unordered(_encode_size, [(work, size) for size in missing]):
            print(f"latents of {width}x{height}", flush=True)


def _latents(work: Path, width: int, height: int) -> Path:
    return work / f"latents-{width}x{height}.npy"


def _encode_size(job: tuple[Path, tuple[int, int]]) -> tuple[int, int]:
    work, size = job
    torch.set_num_threads(1)
    run = compiled(_Encode(load(work)))
    pictures, _ = dataset.load(work, *size)
    rows = []
    for i in range(0, len(pictures), ENCODED):
        part = np.zeros((ENCODED, *pictures.shape[1:]), np.uint8)
        part[: len(pictures[i : i + ENCODED])] = pictures[i : i + ENCODED]
        with torch.inference_mode(), narrow():
            latent = F.pixel_unshuffle(run(to_model(part)).float(), 2)
        rows.append(latent[: len(pictures) - i].half().numpy())
    np.save(_latents(work, *size), np.concatenate(rows))
    return size


class _Encode(nn.Module):
    """`Autoencoder.encode` as a module."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.model.encode(picture)


@torch.inference_mode()
def psnr(model: Autoencoder, pictures: np.ndarray) -> float:
    """Mean reconstruction PSNR in dB over uint8 pictures [B, H, W, 3]."""
    values = []
    for i in range(0, len(pictures), 16):
        target = to_model(pictures[i : i + 16])
        again = model.decode(model.encode(target)).clamp(-1, 1)
        values += [10 * math.log10(4 / e) for e in (again - target).square().mean((1, 2, 3)).tolist()]
    return sum(values) / len(values)


def export(work: Path, folder: Path) -> None:
    """The file bonsai_ops/host/vae.py reads, in bf16: TAESD's names, this model's widths."""
    from safetensors.torch import save_file

    model = load(work)
    last = model.taesd_encoder[-1]
    with torch.no_grad():
        last.weight.div_(model.deviation.view(-1, 1, 1, 1))
        last.bias.sub_(model.mean).div_(model.deviation)
    tensors = {
        name: value.detach().bfloat16().contiguous()
        for name, value in model.state_dict().items()
        if name not in ("mean", "deviation")
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "TAESD", "latent_channels": LATENT_CHANNELS}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
