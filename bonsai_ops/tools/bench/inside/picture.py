"""One picture, a process of its own (session.py): picture {"kind", "file", "text", "folder", "size", "prompt", ..}.

kind: bonsai loads the three parts as the pack loader does, and holds them to the end. stock loads the dense files with
ComfyUI's own loaders, and lets go of the text encoder before it loads the transformer. size: (width, height). keep: a
file for the states that errors.py compares, or None.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..energy import find_energy
from ..peaks import make_peaks
from ..picture import STEPS
from .sampling import sample
from .start import in_worker, start, synchronise


def main(argv: list[str]) -> int:
    """Prints the row that picture.py describes."""
    return in_worker(_measure, start(argv))


class _Parts:
    """Seconds and peak memory of parts that follow one another, a part more than once counts together."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.highest: dict[str, int] = {}
        self.device, self.peaks, self._since = device, make_peaks(device), time.perf_counter()

    def ended(self, part: str) -> None:
        """A part has ended and the next one begins."""
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self.highest[part] = max(self.highest.get(part, 0), self.peaks.peak())
        self.peaks.reset()
        self._since = now

    def figures(self) -> dict[str, float]:
        """{"<part>_s", "<part>_peak_bytes", "peak_bytes"}."""
        seconds = {f"{part}_s": value for part, value in self.seconds.items()}
        highest = {f"{part}_peak_bytes": value for part, value in self.highest.items()}
        return {**seconds, **highest, "peak_bytes": max(self.highest.values())}


def _measure(options: dict) -> int:
    (width, height), device = options["size"], options["device"]

    from ....host.schedule import official_sigmas

    load_text, load_rest = (_ours if options["kind"] == "bonsai" else _stock)(options)
    energy, parts, ends, velocities = find_energy(device), _Parts(device), [], []
    with torch.inference_mode():
        before = energy.read()
        clip = load_text()
        if options["kind"] == "bonsai":
            model, vae = load_rest()
        parts.ended("load")
        condition = clip.encode_from_tokens_scheduled(clip.tokenize(options["prompt"]))
        parts.ended("text_encoder")
        if options["kind"] == "stock":
            del clip
            _let_go()
            model, vae = load_rest()
            parts.ended("load")
        started = time.perf_counter()
        sigmas = official_sigmas((width // 16) * (height // 16), STEPS)
        drawn = model, (width, height), sigmas, condition, device
        latent = sample(*drawn, lambda: ends.append(time.perf_counter()), velocities)
        parts.ended("steps")
        image = vae.decode(latent)
        parts.ended("vae")
        joules = energy.between(before, energy.read())
    if tuple(image.shape[-3:]) != (height, width, 3) or not bool(torch.isfinite(image).all()):
        raise ValueError(f"the picture has shape {tuple(image.shape)}, expected {(height, width, 3)} of finite values")
    if options["keep"]:
        states = {"text": condition[0][0], "velocity": velocities[0], "latent": latent}
        save_file({name: state.float().cpu().contiguous() for name, state in states.items()}, options["keep"])
    row = {
        **parts.figures(),
        "step_s": [b - a for a, b in itertools.pairwise((started, *ends))],
        "joules": joules,
        "no_joules": energy.why_not,
        "own_peak_bytes": parts.peaks.own_peak(),
        "torch_peak_bytes": parts.peaks.torch_peak(),
    }
    print(json.dumps(row))
    return 0


def _ours(options: dict) -> tuple[Callable[[], Any], Callable[[], tuple[Any, Any]]]:
    from ....host.loader import load_bonsai_model
    from ....host.text_encoder import load_bonsai_text_encoder
    from ....host.vae import load_vae

    def rest() -> tuple[Any, Any]:
        return load_bonsai_model(options["file"], options["options"]), load_vae(Path(options["folder"]))

    dtype = options["options"]["compute_dtype"]
    return lambda: load_bonsai_text_encoder(options["text"], compute_dtype=dtype), rest


def _stock(options: dict) -> tuple[Callable[[], Any], Callable[[], tuple[Any, Any]]]:
    import comfy.sd
    import comfy.utils

    from ....host.vae import load_vae

    def rest() -> tuple[Any, Any]:
        return comfy.sd.load_diffusion_model(options["file"]), load_vae(Path(options["folder"]))

    kind = comfy.sd.CLIPType.FLUX2
    return lambda: comfy.sd.load_clip([options["text"]], clip_type=kind), rest


def _let_go() -> None:
    import gc

    import comfy.model_management

    gc.collect()
    comfy.model_management.cleanup_models()
