"""Random models of the 4B's shapes in ComfyUI, and their sampling steps timed."""

from __future__ import annotations

import gc
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....weights import flux2
from ....weights.formats import native
from ... import synthetic
from ..inside.sampling import random_condition, sample
from .check import Check, packed

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CODEC = "trit5"
MOST_KERNELS = 14


class Memory(threading.Thread):
    """Highest use of the device's memory by everyone, sampled; `peak` in bytes."""

    def __init__(self, check: Check) -> None:
        super().__init__(daemon=True)
        self.check, self.peak, self.stopped = check, 0, False

    def run(self) -> None:
        while not self.stopped and self.check.on_gpu:
            self.peak = max(self.peak, self.check.used())
            time.sleep(0.01)


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
    watch = Memory(check)
    watch.start()
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    latent, steps, first = draw(check, model, size, count)
    watch.stopped = True
    figures: dict[str, Any] = {
        "step_s": round(statistics.median(steps), 4),
        "steps": [round(seconds, 4) for seconds in steps],
        "first_s": round(first, 2),
        "device_peak_mb": watch.peak >> 20,
        "torch_peak_mb": torch.cuda.max_memory_allocated() >> 20 if check.on_gpu else 0,
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


def weights_of(check: Check, codec: str | None) -> dict[str, Any]:
    """{name: weight} of a random model of the real shapes on the CPU, made on the device; codec None: all dense."""
    torch.manual_seed(1)
    found: dict[str, Any] = {}
    for name, shape in flux2.expected_shapes(synthetic.KLEIN_4B if check.on_gpu else synthetic.TINY).items():
        if codec and flux2.is_block_linear(name):
            found[name] = packed(*shape, codec, check.device).to("cpu")
        else:
            values = torch.randn(shape, device=check.device)
            found[name] = (1 + 0.1 * values if len(shape) == 1 else values / shape[1] ** 0.5).bfloat16().cpu()
    return found


def pack_file(check: Check) -> Path:
    """A native file of such a model, written first if it is not there."""
    file = check.settings.work / f"{CODEC}_{check.device}.safetensors"
    if not file.is_file():
        weights = weights_of(check, CODEC)
        native.write(file, weights, native.make_record(weights), overwrite=True)
    return file


def load_ours(check: Check, **options: str) -> ModelPatcher:
    """Our loader on that file."""
    from ....host.loader import load_bonsai_model

    return load_bonsai_model(pack_file(check), options)


def load_dense(check: Check) -> ModelPatcher:
    """A dense model of the same shapes that computes in bf16."""
    import comfy.sd

    options = {"dtype": torch.bfloat16}
    model = comfy.sd.load_diffusion_model_state_dict(weights_of(check, None), model_options=options)
    model.model.manual_cast_dtype = None
    return model


def unload() -> None:
    """Takes every model off the device."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
