"""Patch to BitLinear and Recover BitLinear on the dense seedling, as users run them: ComfyUI's class, 512 tokens.

The stage `fidelity` trains diffusers' class on 48 text tokens, in batches of 16, to compare many ways. Here it is the
nodes' own functions with their defaults, measured on prompts and noise that nothing was calibrated or trained on.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from bonsai_ops.host.schedule import official_sigmas
from bonsai_ops.tools.bench.inside.comfyui import set_up
from bonsai_ops.weights.formats.dense import LevelsTensor
from bonsai_ops.weights.read import open_transformer

from . import export, fidelity, transformer
from .captions import caption
from .measure import accuracy, held_out
from .modes import PACK, STEPS, Drawn
from .rows import Rows
from .scene import random_scene
from .walk import Start, distances, sampled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FILE = "node.json"
SIDE, RANK = 128, 32
RECIPES = ("ternary", "binary")
CALIBRATED, MEASURED = 24, 24
"""Prompts that calibrate, in one conditioning, and held-out ones for the distances."""
PLAN = {"points": 320, "steps": 200, "batch": 8, "learning_rate": 1e-3}
"""The defaults of the node, which tests/unit/test_training.py compares."""


def show(work: Path, comfyui: Path, seconds: float = math.inf) -> bool:
    """Measures what is missing; needs the stage `dense`. True when all is there."""
    set_up(comfyui, arguments=["--base-directory", str(work)])
    rows, started = Rows(work / FILE), time.monotonic()
    missing = [recipe for recipe in RECIPES if not {_name(recipe, False), _name(recipe, True)} <= rows.keys()]
    if "dense" in rows and not missing:
        return True
    with torch.inference_mode():
        seedling = Seedling(work)
        if "dense" not in rows:
            rows.add("dense", {"bits": 16.0, **seedling.measured(seedling.model)})
            print(_line("dense", rows["dense"]), flush=True)
        for recipe in missing:
            if time.monotonic() - started > seconds:
                return False
            for name, row in seedling.rows(recipe):
                rows.add(name, row)
                print(_line(name, row), flush=True)
    return True


def table(rows: Mapping[str, Mapping]) -> Iterator[str]:
    """The rows that there are as lines of Markdown."""
    yield "| | bits a weight | velocity | latent | attributes right | pictures right in all five | sampled, trained |"
    yield "| --- " * 7 + "|"
    yield from (_line(name, row) for name, row in rows.items())


def _name(recipe: str, recovered: bool) -> str:
    return f"{recipe}, calibrated, rank {RANK}" + ", recovered" * recovered


def _line(name: str, row: Mapping) -> str:
    shares = row["attributes"]
    right = f"{100 * fidelity.mean(shares):.1f} % | {100 * shares['all']:.1f} %"
    took = f"{row['sampling']:.0f} s, {row['training']:.0f} s" if "training" in row else ""
    bold = f"**{name}**" if took else name
    return f"| {bold} | {row['bits']:.2f} | {row['velocity']:.3f} | {row['latent']:.3f} | {right} | {took} |"


class Seedling:
    """The dense model in ComfyUI, its points, and what went into its layers."""

    def __init__(self, work: Path) -> None:
        from bonsai_ops.host.patch import PatchOptions, patch_model
        from bonsai_ops.host.patch.calibrate import sample_recorded
        from bonsai_ops.host.sampling import Sampling
        from bonsai_ops.host.text_encoder import load_bonsai_text_encoder
        from bonsai_ops.host.vae import load_vae

        self.clip, self.vae, self.model = load_bonsai_text_encoder(PACK), load_vae(PACK), dense_model(work)
        self.latent = torch.zeros(1, 128, SIDE // 16, SIDE // 16)
        self.sigmas = official_sigmas(self.latent[0, 0].numel(), STEPS, 1.0)
        self.truth = [
            sampled(self.model, Start(self.encoded(prompt), 700 + number, self.latent, self.sigmas))
            for number, (_, prompt) in enumerate(held_out(MEASURED))
        ]
        calibration = Sampling(
            positive=[entry for prompt in captions("calibration", CALIBRATED) for entry in self.encoded(prompt)],
            negative=[],
            latent={"samples": self.latent},
            seed=0,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )
        self.statistics = sample_recorded(self.model, calibration, "full")[0].layers
        _, plain = patch_model(self.model, PatchOptions(dry_run=True))
        self.weights = sum(layer.weights for layer in plain.packed)
        self.rest = plain.nbytes - sum(layer.nbytes for layer in plain.packed)

    def encoded(self, prompt: str) -> list:
        """As CLIP Text Encode does it."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def measured(self, model: ModelPatcher) -> dict:
        """Distances from the dense model, and what the judge sees in 96 pictures."""
        shares = accuracy(Drawn(self.clip, model, self.vae).paint, SIDE, SIDE)
        return {**distances(model, self.truth), "attributes": shares}

    def rows(self, recipe: str) -> Iterator[tuple[str, dict]]:
        """(name, row) before and after. sampling, training: seconds. steps: the step whose state was the best."""
        from bonsai_ops.host.patch import PatchOptions, patch_model
        from bonsai_ops.host.patch.recover import Plan, Recovery, recover

        begun = time.monotonic()
        packed, report = patch_model(self.model, PatchOptions(recipe, rank=RANK), self.statistics)
        size = {"bits": 8 * (report.nbytes - self.rest) / self.weights}
        packing = time.monotonic() - begun
        yield _name(recipe, False), {**size, **self.measured(packed), "packing": packing}
        plan = Plan(PLAN["steps"], PLAN["learning_rate"], PLAN["batch"])
        prompts = [self.encoded(prompt) for prompt in captions("recovery 0", PLAN["points"] // STEPS)]
        wanted = Recovery(prompts, {"samples": self.latent}, self.sigmas, PLAN["points"], plan)
        better, found = recover(self.model, packed, wanted)
        sampling, training = found.seconds
        told = {"sampling": sampling, "training": training, "step": found.tuned.best.step}
        yield _name(recipe, True), {**size, **self.measured(better), **told}


def captions(seed: str, count: int) -> list[str]:
    """Prompts of random scenes, as those that the seedling learned from."""
    rng = random.Random(seed)
    return [caption(random_scene(rng), rng)[0] for _ in range(count)]


def dense_model(work: Path) -> ModelPatcher:
    """The dense seedling as ComfyUI loads a file of it, computing in fp32."""
    import comfy.sd

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "seedling-dense.safetensors"
        save_file(export.unpacked(transformer.load(work, "dense"), "dense"), file)
        entries = open_transformer(file).entries.items()  # those of layers would ask for levels
        dense = {name: entry.dense if isinstance(entry, LevelsTensor) else entry for name, entry in entries}
        tensors = {name: entry.weight().float() for name, entry in dense.items()}
    return comfy.sd.load_diffusion_model_state_dict(tensors, {"dtype": torch.float32})
