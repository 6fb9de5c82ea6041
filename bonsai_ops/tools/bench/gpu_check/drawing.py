"""Random models of the 4B's shapes in ComfyUI, and their sampling steps timed."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import synthetic
from ..inside.sampling import random_condition, sample
from ..inside.step import in_bf16
from .check import Check

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ....weights.flux2 import Geometry

CODEC = "trit5"
MOST_KERNELS = 14


def draw(check: Check, model: ModelPatcher, size: int, count: int) -> tuple[torch.Tensor, list[float], float]:
    """(latent on the CPU, seconds of each of `count` steps after a first one, seconds of the first)."""
    ends: list[float] = []
    sigmas = torch.linspace(1, 0, count + 2)
    begun = time.perf_counter()
    with torch.inference_mode():
        out = sample(
            model, size, sigmas, random_condition(model), check.device, lambda: ends.append(time.perf_counter())
        )
    return out.float().cpu(), [b - a for a, b in itertools.pairwise(ends)], ends[0] - begun


def measured(check: Check, name: str, model: ModelPatcher, size: int, count: int) -> torch.Tensor:
    """Notes seconds a step and peak memory; the latent."""
    if check.peaks:
        check.peaks.reset()
    latent, steps, first = draw(check, model, size, count)
    figures: dict[str, Any] = {
        "step_s": round(statistics.median(steps), 4),
        "steps": [round(seconds, 4) for seconds in steps],
        "first_s": round(first, 2),
        "device_peak_mb": round(check.peaks.peak() / 1e6) if check.peaks else None,
        "torch_peak_mb": round(check.peaks.torch_peak() / 1e6) if check.peaks else None,
        "finite": bool(torch.isfinite(latent).all()),
    }
    check.note(f"{name} {size}", figures)
    return latent


def busy(check: Check, name: str, model: ModelPatcher, size: int) -> None:
    """Notes the time that kernels take of two steps, and the kernels that take most."""
    if not check.on_gpu:
        return
    from torch.profiler import ProfilerActivity, profile

    with check.guarded(f"profile {name}"):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            draw(check, model, size, 1)
        rows = [
            (event.key[:60], round(event.self_device_time_total / 1000, 2), event.count)
            for event in found.key_averages()
            if event.self_device_time_total > 0 and event.device_type.name == "CUDA"
        ]
        rows.sort(key=lambda row: -row[1])
        total = round(sum(ms for _, ms, _ in rows), 2)
        figures = {"all": total, "launches": sum(count for *_, count in rows), "top": rows[:MOST_KERNELS]}
        check.note(f"{name} {size} kernels_ms_of_2_steps", figures)


def geometry(check: Check) -> Geometry:
    """The 4B model's on a GPU, else a tiny one."""
    return synthetic.KLEIN_4B if check.on_gpu else synthetic.TINY


def pack_file(check: Check) -> Path:
    """A native file of such a model, made on the device first if it is not there."""
    file = check.settings.work / f"{CODEC}_{check.device}.safetensors"
    if not file.is_file():
        synthetic.write_native(file, CODEC, geometry(check), check.device)
    return file


def load_ours(check: Check, **options: str) -> ModelPatcher:
    """Our loader on that file."""
    from ....host.loader import load_bonsai_model

    return load_bonsai_model(pack_file(check), options)


def load_dense(check: Check) -> ModelPatcher:
    """A dense model of the same shapes that computes in bf16."""
    import comfy.sd

    weights = synthetic.dense_weights(geometry(check), device=check.device)
    return in_bf16(comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.bfloat16}))


def unload() -> None:
    """Takes every model off the device."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
