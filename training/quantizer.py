"""The quantizer of Patch to BitLinear on trained weights: the seedling's dense model, layer by layer.

Prints, for three levels and for two: the error of the weights against rounding by the mean magnitude, and the error of
the layers' outputs on inputs that the calibration did not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from bonsai_ops.quantize import Recorder, Settings, Statistics, quantize_layer
from bonsai_ops.quantize.layer import squared_error

from . import transformer
from .measure import held_out
from .speed import frozen

SIZE, PROMPTS, RANK = (128, 128), 24, 32


def show(work: Path, comfyui: Path) -> None:
    """Prints the table; needs the stage `dense`."""
    model = frozen(transformer.load(work, "dense"))
    feed = transformer.Feed(work, comfyui)
    prompts = [prompt for _, prompt in held_out(2 * PROMPTS)]
    known, fresh = (statistics(model, feed, part) for part in (prompts[:PROMPTS], prompts[PROMPTS:]))
    weights = {name: layer.weight.detach().float() for name, layer in transformer.packed_layers(model)}
    for scheme in ("ternary", "binary"):
        ways = {
            "mean magnitude": lambda w, name, scheme=scheme: mean_magnitude(w, scheme),
            "optimal": lambda w, name, scheme=scheme: dense_of(w, Settings(scheme), None),
            "power": lambda w, name, scheme=scheme: dense_of(w, Settings(scheme), Statistics(known[name].power)),
            "full": lambda w, name, scheme=scheme: dense_of(w, Settings(scheme), known[name]),
            f"full, rank {RANK}": lambda w, name, scheme=scheme: dense_of(w, Settings(scheme, rank=RANK), known[name]),
        }
        for way, quantize in ways.items():
            sums = torch.zeros(4, dtype=torch.float64)
            for name, weight in weights.items():
                difference = weight - quantize(weight, name)
                sums += torch.tensor(list(_errors(difference, weight, fresh[name])), dtype=torch.float64)
            relative, output = (math.sqrt(sums[i] / sums[i + 1]) for i in (0, 2))
            print(f"{scheme:8} {way:16} weights {relative:.4f}  outputs {output:.4f}", flush=True)


def _errors(difference: torch.Tensor, weight: torch.Tensor, inputs: Statistics) -> Iterator[float]:
    for known in (None, inputs):
        for value in (difference, weight):
            yield float(squared_error(value, known).sum())


def dense_of(weight: torch.Tensor, settings: Settings, known: Statistics | None) -> torch.Tensor:
    """The values of the quantized weight."""
    return quantize_layer(weight, settings, known).weight.dequantize()


def mean_magnitude(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """Rounding as BitNet does it, a group at a time: the scale is mean |w|."""
    grouped = weight.unflatten(1, (-1, transformer.GROUP))
    scale = grouped.abs().mean(2, keepdim=True).clamp(min=1e-8)
    levels = (grouped / scale).round().clamp(-1, 1) if scheme == "ternary" else torch.where(grouped >= 0, 1.0, -1.0)
    return (levels * scale).flatten(1)


def statistics(model: torch.nn.Module, feed: transformer.Feed, prompts: list[str]) -> dict[str, Statistics]:
    """{layer: what went into it} while the model samples the prompts."""
    recorder = Recorder("full")
    with recorder.recording(transformer.packed_layers(model)):
        transformer.sample(model, feed.encode(prompts, transformer.SHORT_TEXT), *SIZE, list(range(len(prompts))))
    return recorder.result()
