"""A model of the training benchmark, a process of its own (session.py): train {"model", "file", "size", "rank", ..}.

Samples a step, then trains by ComfyUI's own node on one random point with one random text, and prints the figures.
"""

from __future__ import annotations

import inspect
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .... import kernels
from ..peaks import make_peaks
from .sampling import TEXT_TOKENS, empty_latent, random_condition, sample
from .start import in_worker, start, synchronise
from .step import load

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

STEPS = 3
"""Of the training, if there is time; the first of several, which brings weights to their places, is not counted."""
COSTS = 4.0
"""Sampling steps that a training step takes at least about: forward twice, and backward."""
HIDDEN, WIDEST, BLOCKS = 3072, 27648, 25
"""Of the 4B model: channels, those of the widest result, blocks."""


def main(argv: list[str]) -> int:
    """Measures and prints {"bytes", "dtype", "step_s", "sampling_peak", "seconds", "peak", "trained", "why_not"}."""
    return in_worker(_measure, start(argv))


def _measure(options: dict) -> int:
    device, size = options["device"], options["size"]
    dtype = "bf16" if device != "cpu" or kernels.cpu_has_fast_bf16() else "fp32"
    figures = {"dtype": dtype, "bytes": 0, "step_s": None, "sampling_peak": None, "seconds": None, "peak": None}
    figures |= {"trained": None, "why_not": None}
    needs, free = needed(options["file"], size, device), _free(device)
    if needs > free:
        figures["why_not"] = f"it needs about {needs / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        print(json.dumps(figures))
        return 0
    peaks = make_peaks(device)
    try:
        with torch.inference_mode():
            model = load(options["model"], options["file"], options["options"])
            if options["model"] != "ours" and dtype == "fp32":
                model.model.manual_cast_dtype = torch.float32
            weights = model.model.diffusion_model.state_dict().values()
            figures["bytes"] = sum(tensor.nbytes for tensor in weights)
            figures["step_s"] = _sampling(model, size, device)
            figures["sampling_peak"] = peaks.peak()
            count = possible(options["budget"], figures["step_s"])
            if count < 1:
                figures["why_not"] = f"a step takes longer than the {options['budget']:.0f} s that are given"
            else:
                peaks.reset()
                figures |= _train(model, options["rank"], size, dtype, device, count)
                figures["peak"] = peaks.peak()
    except torch.OutOfMemoryError:
        figures["why_not"] = "the device's memory does not hold it"
    print(json.dumps(figures))
    return 0


def needed(file: str, size: int, device: str) -> int:
    """Bytes that training takes about: the file's weights, of which ComfyUI's newest node makes a copy, the inputs of
    all blocks, one block's results and their gradients, in fp32 on a CPU."""
    tokens = (size // 16) ** 2 + TEXT_TOKENS
    item = 4 if device == "cpu" else 2
    return 2 * Path(file).stat().st_size + item * tokens * (BLOCKS * HIDDEN + 6 * WIDEST)


def possible(budget: float, step_s: float) -> int:
    """Training steps, of at most STEPS, that take about `budget` seconds if a sampling step takes `step_s`."""
    return min(STEPS, int(budget / (COSTS * step_s)))


def _free(device: str) -> int:
    import comfy.model_management as management

    return int(management.get_free_memory(torch.device("cpu") if device == "cpu" else management.get_torch_device()))


class _Clock:
    """When ComfyUI began with a model, and the end of each step after it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def begin(self, *_: object) -> None:
        self.times = []
        self.note()

    def note(self, *_: object) -> None:
        synchronise(self._device)
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Mean of the steps after the first, or what the only one took."""
        spans = [after - before for before, after in itertools.pairwise(self.times)]
        return statistics.fmean(spans[1:] or spans)

    def on(self, model: ModelPatcher) -> ModelPatcher:
        """A clone that starts this clock."""
        import comfy.patcher_extension

        clone = model.clone()
        clone.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, self.begin)
        return clone


def _sampling(model: ModelPatcher, size: int, device: str) -> float:
    """Seconds of a sampling step: on a GPU of the second, on a CPU of the only one."""
    clock = _Clock(device)
    sigmas = torch.linspace(1, 0, 2 if device == "cpu" else 3)
    sample(clock.on(model), size, sigmas, random_condition(model), device, clock.note)
    return clock.seconds()


def _train(model: ModelPatcher, rank: int, size: int, dtype: str, device: str, count: int) -> dict[str, Any]:
    """{"seconds": of a step, "trained": values of the LoRA} by ComfyUI's Train LoRA."""
    import comfy_extras.nodes_train

    from ....host.gradients import with_right_gradients

    clock = _Clock(device)
    model = clock.on(with_right_gradients(model))
    node = comfy_extras.nodes_train.TrainLoraNode
    settings = _settings(model, rank, dtype, count)
    known = inspect.signature(node.execute).parameters
    hook = register_optimizer_step_post_hook(clock.note)
    try:
        inputs = {name: [value] for name, value in settings.items() if name in known}
        point = {"samples": torch.randn(empty_latent(size).shape, generator=torch.Generator().manual_seed(1))}
        lora = node.execute(**inputs, latents=[point], positive=[random_condition(model)]).result[0]
    finally:
        hook.remove()
    return {"seconds": clock.seconds(), "trained": sum(t.numel() for t in lora.values())}


def _settings(model: ModelPatcher, rank: int, dtype: str, count: int) -> dict[str, Any]:
    """The node's inputs; an older ComfyUI knows fewer."""
    return {
        "model": model,
        "batch_size": 1,
        "steps": count,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": dtype,
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 2,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
