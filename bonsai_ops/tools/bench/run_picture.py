"""Our picture, a process of its own (host.py): run_picture {"file", "text", "folder", "size", "prompt", "options"}.

Loads the three parts as the pack loader does, makes one picture and prints the seconds of every part.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from . import host
from .energy import find_energy
from .picture import STEPS


def main(argv: list[str]) -> int:
    """Prints the row that picture.py describes."""
    return host.in_worker(_measure, host.start(argv))


def _measure(options: dict) -> int:
    size, device = options["size"], options["device"]
    import torch

    from ...host.loader import load_bonsai_model
    from ...host.text_encoder import load_bonsai_text_encoder
    from ...host.vae import load_vae

    energy = find_energy(device)
    with torch.inference_mode():
        started = time.perf_counter()
        model = load_bonsai_model(options["file"], options["options"])
        clip = load_bonsai_text_encoder(options["text"])
        vae = load_vae(Path(options["folder"]))
        loaded, before = time.perf_counter(), energy.read()
        condition = clip.encode_from_tokens_scheduled(clip.tokenize(options["prompt"]))
        host.synchronise(device)
        encoded = time.perf_counter()
        latent, ends = _sample(model, condition, size, device)
        sampled = time.perf_counter()
        image = vae.decode(latent)
        host.synchronise(device)
        decoded = time.perf_counter()
        joules = energy.between(before, energy.read())
    if tuple(image.shape[-3:]) != (size, size, 3) or not bool(torch.isfinite(image).all()):
        raise ValueError(f"the picture has shape {tuple(image.shape)}, expected {(size, size, 3)} of finite values")
    row = {
        "load_s": loaded - started,
        "text_encoder_s": encoded - loaded,
        "steps_s": sampled - encoded,
        "step_s": [b - a for a, b in itertools.pairwise((encoded, *ends))],
        "vae_s": decoded - sampled,
        "joules": joules,
        "no_joules": energy.why_not,
        "peak_bytes": host.peak_bytes(device),
    }
    print(json.dumps(row))
    return 0


def _sample(model: object, condition: list, size: int, device: str) -> tuple[object, list[float]]:
    """(latent, moments at which the steps ended) of the official schedule; the first step holds the preparation."""
    import comfy.sample
    import comfy.samplers
    import torch

    from ...host.schedule import official_sigmas

    ends: list[float] = []

    def note(*_: object) -> None:
        host.synchronise(device)
        ends.append(time.perf_counter())

    latent = torch.zeros(1, 128, size // 16, size // 16)
    sampled = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, 0),
        1.0,
        comfy.samplers.sampler_object("euler"),
        official_sigmas(latent.shape[-1] * latent.shape[-2], STEPS),
        condition,
        condition,
        latent,
        callback=note,
        disable_pbar=True,
    )
    return sampled, ends


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
