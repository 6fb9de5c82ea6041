"""Our picture, a process of its own (session.py): picture {"file", "text", "folder", "size", "prompt", "options"}.

Loads the three parts as the pack loader does, makes one picture and prints the seconds of every part.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch

from ..energy import find_energy
from ..peaks import make_peaks
from ..picture import STEPS
from .sampling import sample
from .start import in_worker, start, synchronise


def main(argv: list[str]) -> int:
    """Prints the row that picture.py describes."""
    return in_worker(_measure, start(argv))


def _measure(options: dict) -> int:
    size, device = options["size"], options["device"]

    from ....host.loader import load_bonsai_model
    from ....host.schedule import official_sigmas
    from ....host.text_encoder import load_bonsai_text_encoder
    from ....host.vae import load_vae

    energy, peaks = find_energy(device), make_peaks(device)
    with torch.inference_mode():
        started = time.perf_counter()
        model = load_bonsai_model(options["file"], options["options"])
        clip = load_bonsai_text_encoder(options["text"])
        vae = load_vae(Path(options["folder"]))
        loaded, before = time.perf_counter(), energy.read()
        condition = clip.encode_from_tokens_scheduled(clip.tokenize(options["prompt"]))
        synchronise(device)
        encoded = time.perf_counter()
        ends: list[float] = []
        sigmas = official_sigmas((size // 16) ** 2, STEPS)
        latent = sample(model, size, sigmas, condition, device, lambda: ends.append(time.perf_counter()))
        sampled = time.perf_counter()
        image = vae.decode(latent)
        synchronise(device)
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
        "peak_bytes": peaks.peak(),
        "torch_peak_bytes": peaks.torch_peak(),
    }
    print(json.dumps(row))
    return 0
