"""What a processor's bf16 and the mode a8 cost the seedling that ships, beside fp32 throughout.

In a real ComfyUI, as its loaders and the sampler node draw: prompts of combinations that the seedling never saw, with
the seeds of `measure.SEEDS`. The judge reads the pictures, which are compared with those in fp32 from the same noise.
A size is kept in modes.json as soon as it is measured and not measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bonsai_ops.tools.bench.inside.comfyui import set_up
from bonsai_ops.tools.environment import PLUGIN

from .measure import accuracy
from .rows import Rows
from .scene import JUDGED

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

FILE = "modes.json"
PACK = PLUGIN / "bonsai_ops" / "models" / "bonsai" / "seedling"
SIZES = ((128, 128), (192, 128))
WAYS = {"fp32": {"compute_dtype": "fp32"}, "exact": {}, "a8": {"mode": "a8"}}
"""{name: options of the transformer's loader}; the first is the truth, and its text encoder computes in fp32 too."""
TRUTH = next(iter(WAYS))
STEPS = 4


def show(work: Path, comfyui: Path) -> None:
    """Measures and prints what is missing."""
    set_up(comfyui)
    rows = Rows(work / FILE)
    for width, height in SIZES:
        size = f"{width}x{height}"
        if size in rows:
            continue
        truth, found = _drawn(TRUTH), {}
        for name in WAYS:
            drawn = truth if name == TRUTH else _drawn(name)
            row = {"attributes": accuracy(drawn.paint, width, height), "pictures": len(drawn.pictures)}
            found[name] = row | ({} if drawn is truth else drawn.distances(truth))
            print(f"{size} {name}: {json.dumps(found[name])}", flush=True)
        rows.add(size, found)


def table(rows: Mapping[str, Mapping[str, Mapping]]) -> Iterator[str]:
    """The rows as lines of Markdown."""
    yield f"| | text states | latent | PSNR | {' | '.join(JUDGED)} | pictures right in all five |"
    yield "| --- " * (5 + len(JUDGED)) + "|"
    for size, ways in rows.items():
        for name, row in ways.items():
            far = ("", "", "")
            if "latent" in row:
                far = (f"{100 * row['text']:.2f} %", f"{100 * row['latent']:.2f} %", f"{row['psnr']:.1f} dB")
            right = (f"{100 * row['attributes'][each]:.1f} %" for each in (*JUDGED, "all"))
            yield "| " + " | ".join((f"{size}, {name}", *far, *right)) + " |"


@torch.inference_mode()
def _drawn(name: str) -> Drawn:
    """By one of WAYS."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
    from bonsai_ops.host.vae import load_vae

    clip = load_bonsai_text_encoder(PACK, compute_dtype=WAYS[name].get("compute_dtype", "auto"))
    return Drawn(clip, load_bonsai_model(PACK, WAYS[name]), load_vae(PACK))


class Drawn:
    """What a CLIP, a MODEL and a VAE draw: {prompt: its conditioning}, latents [128, h, w] and pictures [H, W, 3] from
    0 to 1."""

    def __init__(self, clip: CLIP, model: ModelPatcher, vae: VAE) -> None:
        self._clip, self._model, self._vae = clip, model, vae
        self.conditions: dict[str, list] = {}
        self.latents: list[torch.Tensor] = []
        self.pictures: list[torch.Tensor] = []

    @torch.inference_mode()
    def paint(self, prompts: list[str], width: int, height: int, seed: int) -> np.ndarray:
        """A `measure.Painter`."""
        from bonsai_ops.host.sampling import sample_official

        for number, prompt in enumerate(prompts):
            if prompt not in self.conditions:
                tokens = self._clip.tokenize(prompt)
                self.conditions[prompt] = self._clip.encode_from_tokens_scheduled(tokens)
            condition = self.conditions[prompt]
            empty = {"samples": torch.zeros(1, 128, height // 16, width // 16)}
            latent = sample_official(self._model, condition, empty, 1000 * seed + number, STEPS, 1.0)["samples"]
            self.latents.append(latent[0])
            self.pictures.append(self._vae.decode(latent)[0])
        drawn = torch.stack(self.pictures[-len(prompts) :])
        return (255 * drawn).round().clamp(0, 255).byte().numpy()

    def distances(self, truth: Drawn) -> dict[str, float]:
        """Relative errors of text states and last latents, and PSNR of the pictures in dB, of all at once."""
        texts = ([condition[0][0] for condition in way.conditions.values()] for way in (self, truth))
        pairs = (tuple(texts), (self.latents, truth.latents), (self.pictures, truth.pictures))
        (text, _), (latent, _), (_, square) = (_distance(torch.stack(a), torch.stack(b)) for a, b in pairs)
        return {"text": text, "latent": latent, "psnr": -10 * math.log10(square)}


def _distance(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(|found - truth| / |truth|, mean square of the difference)."""
    difference = found.double() - truth.double()
    return float(difference.norm() / truth.double().norm()), float(difference.square().mean())
