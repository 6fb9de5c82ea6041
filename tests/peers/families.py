"""A tiny Klein in every published layout, and what diffusers and transformers make of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import gemlite_pack, mlx_pack, reference, tiny_klein

PROMPT = "a bonsai tree in a blue pot, morning light"
WIDTH, HEIGHT, SEED = 192, 128, 7
GEOMETRIES = {
    "narrow": {"heads": 2, "depth": 1, "depth_single": 2, "te_hidden": 128},
    "wide": {"heads": 3, "depth": 2, "depth_single": 3},
}


@dataclass(frozen=True)
class Truth:
    """The peer's result: latent [1, 128, H/16, W/16] fp32, picture uint8 [H, W, 3], embeddings [1, 512, D] fp32."""

    latent: torch.Tensor
    picture: np.ndarray
    embeds: torch.Tensor


@dataclass(frozen=True)
class Family:
    """One tiny model in every published layout, made by the packers' own code. `variant`: binary or ternary."""

    variant: str
    unpacked: Path
    gemlite: Path
    mlx: Path
    truth: Truth

    @property
    def gemlite_file(self) -> Path:
        return next(self.gemlite.glob("transformer-gemlite-int*/state_dict.pt"))


def truth_of(folder: Path, embeds: torch.Tensor | None = None) -> Truth:
    """diffusers' pipeline on an unpacked folder, 4 steps, fp32."""
    prompt = PROMPT if embeds is None else None
    return Truth(*reference.reference_latent(folder, prompt, WIDTH, HEIGHT, 4, SEED, prompt_embeds=embeds))


def make_family(root: Path, variant: str, geometry: str, tokenizer: Path) -> Family:
    """Writes the model under `root`. geometry: one of GEOMETRIES; tokenizer: folder of Qwen's tokenizer files."""
    unpacked, gemlite, mlx = root / "unpacked", root / "gemlite", root / "mlx"
    tiny_klein.write_pipeline(unpacked, tokenizer=tokenizer, variant=variant, **GEOMETRIES[geometry])
    gemlite_pack.write_gemlite_pack(unpacked, gemlite, variant)
    mlx_pack.write_mlx_pack(unpacked, mlx, variant)
    return Family(variant, unpacked, gemlite, mlx, truth_of(unpacked))
