"""How close packed models come to a dense one of another architecture: Z-Image's, small, with random weights.

ComfyUI's own class, Patch to BitLinear and Recover BitLinear, as users have them. Random weights have no picture to
lose: only the velocity and the last latent are compared, from the same noise. Their values are Gaussian, without the
few large ones that make trained weights hard to round, and without the structure that makes residuals worth more.

Every row is kept in other.json as soon as it is measured and not measured again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bonsai_ops.tools.bench.inside.comfyui import set_up

from .rows import Rows
from .walk import Start, distances, sampled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FILE, PICTURE = "other.json", "other.png"
KIND = "ZImage"
CONFIG = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 512,
    "cap_feat_dim": 256,
    "n_layers": 4,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [32, 48, 48],
    "axes_lens": [64, 64, 64],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}
"""Eight of the published model's 34 blocks, at 512 of its 3840 channels."""
LATENT, TEXT = (1, 16, 8, 8), 12
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
PROMPTS, CALIBRATED, MEASURED = 24, 24, 8
"""Prompts, which are random text states, that a recovery learns from, that calibrate, and for the distances."""
STEPS, BATCH, POINTS, LEARNING_RATE = 100, 8, 96, 1e-3
RANKS = (32, 8)


@dataclass(frozen=True)
class Way:
    """How a packed model is made: a recipe of Patch to BitLinear, or mix and its bits a weight."""

    recipe: str
    rank: int = 0
    calibrated: bool = True
    recovered: bool = False

    @property
    def name(self) -> str:
        parts = [self.recipe, "calibrated" if self.calibrated else "rounded"]
        return ", ".join([*parts, *([f"rank {self.rank}"] if self.rank else []), *(["recovered"] * self.recovered)])


def ways() -> Iterator[Way]:
    """All rows."""
    for recipe in ("ternary", "binary"):
        yield from (Way(recipe, calibrated=False), Way(recipe))
        for rank in RANKS:
            yield from (Way(recipe, rank), Way(recipe, rank, recovered=True))
    yield from (Way(recipe) for recipe in ("mix 2.5", "mix 3.5", "4bit", "8bit"))


def show(work: Path, comfyui: Path, seconds: float = math.inf) -> bool:
    """Measures what is missing. True when all is there."""
    set_up(comfyui, arguments=["--base-directory", str(work)])
    rows = Rows(work / FILE)
    started = time.monotonic()
    with torch.inference_mode():
        other = Other()
        for way in sorted(ways(), key=lambda way: way.recovered):
            if way.name in rows:
                continue
            if time.monotonic() - started > seconds:
                return False
            begun = time.monotonic()
            rows.add(way.name, {**other.measured(way), "seconds": time.monotonic() - begun})
            print(_line(way, rows[way.name]), flush=True)
    return True


def table(rows: Mapping[str, Mapping]) -> Iterator[str]:
    """The rows that there are as lines of Markdown."""
    yield "| | bits a weight | velocity | latent |"
    yield "| --- " * 4 + "|"
    yield from (_line(way, rows[way.name]) for way in ways() if way.name in rows)


def _line(way: Way, row: Mapping) -> str:
    name = f"**{way.name}**" if way.recovered else way.name
    return f"| {name} | {row['bits']:.2f} | {row['velocity']:.3f} | {row['latent']:.3f} |"


class Other:
    """The dense model, its points, and what went into its layers."""

    def __init__(self) -> None:
        from bonsai_ops.host.patch import PatchOptions, patch_model
        from bonsai_ops.host.patch.calibrate import sample_recorded
        from bonsai_ops.host.sampling import Sampling

        self.model = random_model()
        held_out = range(1000, 1000 + MEASURED)
        self.truth = [sampled(self.model, start(number)) for number in held_out]
        states = [prompt(number) for number in range(2000, 2000 + CALIBRATED)]
        sampling = Sampling(
            positive=[entry for one in states for entry in one],
            negative=[],
            latent={"samples": torch.zeros(LATENT)},
            seed=0,
            steps=len(SIGMAS) - 1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )
        self.statistics = sample_recorded(self.model, sampling, "full")[0].layers
        _, plain = patch_model(self.model, PatchOptions(dry_run=True))
        self.weights = sum(layer.weights for layer in plain.packed)
        self.rest = plain.nbytes - sum(layer.nbytes for layer in plain.packed)

    def measured(self, way: Way) -> dict[str, float]:
        """{"bits", "velocity", "latent"}: bits a packed weight, relative errors (root mean square)."""
        packed, bits = self._packed(way)
        return {"bits": bits, **distances(packed, self.truth)}

    def _packed(self, way: Way) -> tuple[ModelPatcher, float]:
        from bonsai_ops.host.patch import PatchOptions, patch_model
        from bonsai_ops.host.patch.recover import Plan, Recovery, recover

        if way.recipe.startswith("mix"):
            size = round(self.rest + self.weights * float(way.recipe.split()[1]) / 8)
            options = PatchOptions(target_bytes=size)
        else:
            options = PatchOptions(way.recipe, rank=way.rank)
        model, report = patch_model(self.model, options, self.statistics if way.calibrated else None)
        if way.recovered:
            latent, plan = {"samples": torch.zeros(LATENT)}, Plan(STEPS, LEARNING_RATE, BATCH)
            prompts = [prompt(number) for number in range(PROMPTS)]
            model, _ = recover(self.model, model, Recovery(prompts, latent, torch.tensor(SIGMAS), POINTS, plan))
        return model, 8 * (report.nbytes - self.rest) / self.weights


def random_model(kind: str = KIND, configuration: Mapping[str, Any] = CONFIG) -> ModelPatcher:
    """ComfyUI's ModelPatcher around its own class, in fp32, with weights that keep activations near 1.

    kind: a class in comfy.supported_models.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, kind)(dict(configuration))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.diffusion_model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            tensor.copy_(0.1 * noise + name.endswith(("weight", "scale")))
        else:
            tensor.copy_(noise / math.sqrt(max(1, tensor[0].numel())))
    return comfy.model_patcher.CoreModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def prompt(number: int) -> list:
    """A CONDITIONING of random text states."""
    states = torch.randn(1, TEXT, CONFIG["cap_feat_dim"], generator=torch.Generator().manual_seed(number))
    return [[states, {"pooled_output": None}]]


def start(number: int) -> Start:
    """The prompt and the noise of this number."""
    return Start(prompt(number), number, torch.zeros(LATENT), torch.tensor(SIGMAS))
