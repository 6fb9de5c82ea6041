"""The seedling's pictures on the device against those of the CPU in fp32, from the prompt to the pixels."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .check import Check

SEEDLING = Path("bonsai_ops/models/bonsai/seedling")
PROMPTS = (
    "one orange bonsai in a black pot, mist, fallen leaves",
    "a starry night, three little trees with golden foliage in blue pots, snowy",
)
SIZES = ((128, 128), (256, 256))
DTYPES = ("auto", "fp32", "fp16")
THREADS = 4
PATIENCE = 30
"""Seconds to wait for the CPU's pictures."""
TEXT = "text "
"""How the names of text encodings begin in what `paint` returns."""


def run(check: Check, part: str) -> None:
    """part: truth, the CPU's pictures, or empty: the device's, compared with them."""
    on_gpu = (check.settings.asked or check.device) != "cpu"
    sizes = SIZES if on_gpu else SIZES[:1]
    truth = check.settings.work / "truth.npz"
    if part == "truth":
        torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
        truth.unlink(missing_ok=True)
        pictures = paint(check, sizes, "fp32")
        np.savez(truth.with_suffix(".tmp.npz"), **pictures)
        truth.with_suffix(".tmp.npz").replace(truth)
        check.note("done", True)
        return
    pictures = {}
    for dtype in DTYPES if on_gpu else DTYPES[:1]:
        with check.guarded(dtype):
            pictures[dtype] = paint(check, sizes, dtype)
    deadline = time.monotonic() + PATIENCE
    while not truth.is_file() and time.monotonic() < deadline:
        time.sleep(1)
    if not truth.is_file():
        check.note("not compared", "the CPU's pictures are not there: run the stage kernels before, which makes them")
        return
    with np.load(truth) as file:
        wanted = dict(file)
    for dtype, found in pictures.items():
        check.note(f"psnr {dtype} against fp32 on the CPU", compared(found, wanted))
    with check.guarded("png"):
        largest = f"{sizes[-1][0]}x{sizes[-1][1]}"
        names = [name for name in pictures["auto"] if name.endswith(largest)]
        rows = [np.concatenate([wanted[name], pictures["auto"][name]], 1) for name in names]
        Image.fromarray(np.concatenate(rows, 0)).save(check.settings.out / "seedling_cpu_left_gpu_right.png")


def paint(check: Check, sizes: tuple[tuple[int, int], ...], dtype: str) -> dict[str, np.ndarray]:
    """{name: picture [H, W, 3] uint8, or text encoding fp32} for every prompt and size."""
    from ....host.inventory import attached_inventory
    from ....host.loader import load_bonsai_model
    from ....host.sampling import sample_official
    from ....host.text_encoder import load_bonsai_text_encoder
    from ....host.vae import load_vae

    folder = check.settings.project / SEEDLING
    begun = time.perf_counter()
    found, seconds = {}, []
    with torch.inference_mode():
        clip, vae = load_bonsai_text_encoder(folder, compute_dtype=dtype), load_vae(folder)
        model = load_bonsai_model(folder, {"compute_dtype": dtype})
        check.note(f"{dtype} load_s", time.perf_counter() - begun, show=False)
        for prompt in PROMPTS:
            begun = time.perf_counter()
            condition = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
            encoded = time.perf_counter() - begun
            found[f"{TEXT}{prompt}"] = condition[0][0].float().cpu().numpy()
            for width, height in sizes:
                begun = time.perf_counter()
                latent = {"samples": torch.zeros(1, 128, height // 16, width // 16)}
                out = sample_official(model, condition, latent, 0, 4, 1.0)["samples"]
                pixels = (vae.decode(out)[0].float().cpu() * 255).round().clamp(0, 255).byte().numpy()
                found[f"{prompt} {width}x{height}"] = pixels
                seconds.append([round(encoded, 3), round(time.perf_counter() - begun, 3)])
    check.note(f"{dtype} seconds (text, picture)", seconds, show=False)
    loaded = attached_inventory(model)
    check.note(f"{dtype} backend", [loaded.backend, loaded.mode, loaded.dtype, dict(loaded.declined)])
    return found


def compared(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """{short name: PSNR of a picture in dB (99: the same), or relative error of a text encoding}."""
    figures = {}
    for name, values in found.items():
        a, b = values.astype(float), wanted[name].astype(float)
        if name.startswith(TEXT):
            figures[name[:9]] = float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2e}")
        else:
            error = float(((a - b) ** 2).mean())
            figures[name[:6] + name[-8:]] = 99.0 if error == 0 else round(10 * np.log10(255**2 / error), 1)
    return figures
