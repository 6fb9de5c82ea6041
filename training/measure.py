"""How well a model follows prompts: pictures of held-out combinations, read back by the judge."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import lora, transformer, vae
from .captions import caption
from .drawing import draw
from .judge import judge
from .scene import JUDGED, Scene, random_scene
from .speed import frozen

SEEDS = (0, 1, 2)
Painter = Callable[[list[str], int, int, int], np.ndarray]
"""(prompts, width, height, seed) -> uint8 [prompts, height, width, 3]."""


def held_out(count: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, with prompts that name every judged attribute."""
    rng = random.Random("held out")
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, caption(scene, rng, omit=0.0)[0]) for scene in scenes]


def accuracy(paint: Painter, width: int, height: int, count: int = 32, batch: int = 8) -> dict[str, float]:
    """Share of pictures in which each attribute is right, SEEDS pictures a prompt; `all`: every attribute at once."""
    cases, right, total = held_out(count), Counter(), 0
    for seed in SEEDS:
        for i in range(0, len(cases), batch):
            part = cases[i : i + batch]
            for (scene, _), picture in zip(part, paint([p for _, p in part], width, height, seed), strict=True):
                seen, wanted = judge(picture), scene.judged()
                right.update(name for name in JUDGED if seen[name] == wanted[name])
                right["all"] += seen == wanted
                total += 1
    return {name: right[name] / total for name in (*JUDGED, "all")}


def show(work: Path, comfyui: Path) -> None:
    """Prints the VAE's reconstruction of held-out drawings and each model's prompt following at each size."""
    decoder, feed = vae.load(work), transformer.Feed(work, comfyui)
    for width, height in transformer.SHARES:
        drawings = np.stack([np.asarray(draw(scene, width, height)) for scene, _ in held_out(32)])
        print(f"VAE {width}x{height}: {vae.psnr(decoder, drawings):.2f} dB", flush=True)
    for scheme in transformer.SCHEMES:
        if (work / f"{scheme}.pt").is_file():
            paint = painter(frozen(transformer.load(work, scheme)), feed, decoder)
            for width, height in transformer.SHARES:
                shares = accuracy(paint, width, height)
                text = " ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
                print(f"{scheme} {width}x{height}: {text}", flush=True)
    if (work / lora.FILE).is_file():
        for name, model in (("without", transformer.load(work, "ternary")), ("with", lora.load(work))):
            paint = painter(frozen(model), feed, decoder)
            print(f"night skies {name} the LoRA: {100 * obeys(paint):.1f}", flush=True)


def painter(
    model: torch.nn.Module, feed: transformer.Feed, decoder: vae.Autoencoder, text_length: int = 512
) -> Painter:
    """Pictures by a transformer, as the host makes them."""

    def paint(prompts: list[str], width: int, height: int, seed: int) -> np.ndarray:
        seeds = [1000 * seed + i for i in range(len(prompts))]
        latents = transformer.sample(model, feed.encode(prompts, text_length), width, height, seeds)
        return vae.decode(decoder, latents)

    return paint


def obeys(paint: Painter, count: int = 32, batch: int = 8) -> float:
    """Share of night skies where the prompt names no background: what the LoRA is for."""
    rng = random.Random("silent")
    prompts = [caption(random_scene(rng), rng, omit=0.0, silent=(lora.ATTRIBUTE,))[0] for _ in range(count)]
    pictures = [picture for i in range(0, count, batch) for picture in paint(prompts[i : i + batch], *lora.SIZE, i)]
    return sum(judge(picture)[lora.ATTRIBUTE] == lora.VALUE for picture in pictures) / count
