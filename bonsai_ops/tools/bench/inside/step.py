"""One way of the step and LoRA benchmarks, a process of its own (session.py): step {"model", "file", "size", "rank"}.

rank 0: says when it has loaded, samples for every line that it reads, and prints seconds and joules of each step after
a first one; at the end bytes of the weights and peak memory. The line IN_PARTS asks for attention in parts, which ours
has on a CPU whatever it reads. Otherwise samples without and with a LoRA of that rank on every linear layer of the
blocks, and prints median seconds of both.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from ..energy import Energy, find_energy
from ..peaks import make_peaks
from .sampling import random_condition, sample
from .start import in_worker, start

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

STEPS = 2
ROUNDS = 2
IN_PARTS = "in parts"


def main(argv: list[str]) -> int:
    """Loads the model, samples and prints the figures."""
    return in_worker(_measure, start(argv))


def _measure(options: dict) -> int:
    size, rank, device = options["size"], options["rank"], options["device"]
    energy, peaks = find_energy(device), make_peaks(device)
    with torch.inference_mode():
        model = load(options["model"], options["file"], options["options"])
        figures = {"bytes": sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())}
        if rank:
            patched = with_lora(model, rank)
            rounds = [
                ([s for s, _ in steps(model, size, device)], [s for s, _ in steps(patched, size, device)])
                for _ in range(ROUNDS)
            ]
            plain, lora = (statistics.median(itertools.chain(*runs)) for runs in zip(*rounds, strict=True))
            figures |= {"seconds": plain, "lora_seconds": lora}
        else:
            in_parts = _attending_in_parts(model)
            peaks.pause()  # others use the same device
            print(json.dumps({"loaded": options["file"]}), flush=True)
            for line in sys.stdin:
                peaks.resume()
                asked = in_parts if line.strip() == IN_PARTS else model
                done = steps(asked, size, device, energy)
                peaks.pause()
                print(json.dumps({"steps": done}), flush=True)
    report = model.get_attachment("bonsai")
    figures |= {
        "no_joules": energy.why_not,
        "peak": peaks.peak(),
        "torch_peak": peaks.torch_peak(),
        "dynamic": options["host"].get("dynamic", False),
        "mode": getattr(report, "mode", "exact"),
        "declined": dict(report.declined) if report else {},
    }
    print(json.dumps(figures))
    return 0


def load(kind: str, file: str, options: dict | None = None) -> ModelPatcher:
    """The model: ours, dense computing in bf16 (dense_bf16), or as ComfyUI loads it (stock). options: of our loader."""
    import comfy.sd

    from ....host.loader import load_bonsai_model

    if kind == "ours":
        return load_bonsai_model(file, options)
    if kind == "dense_bf16":
        return in_bf16(comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.bfloat16}))
    return comfy.sd.load_diffusion_model(file)


def in_bf16(model: ModelPatcher) -> ModelPatcher:
    """A dense model loaded as bf16 that also computes in it, which ComfyUI has not for every device."""
    model.model.manual_cast_dtype = None
    return model


def steps(
    model: ModelPatcher, size: int, device: str, energy: Energy | None = None, count: int = STEPS, last: Any = None
) -> list[tuple[float, float | None]]:
    """(seconds, joules) of `count` sampling steps; one more goes before them. `last`: a context around the last."""
    ends: list[tuple[float, list[float]]] = []

    def note() -> None:
        if last is not None and len(ends) == count:
            last.__exit__(None, None, None)
        ends.append((time.perf_counter(), energy.read() if energy else []))
        if last is not None and len(ends) == count:
            last.__enter__()

    sample(model, size, torch.linspace(1, 0, count + 2), random_condition(model), device, note)
    done = []
    for (begun, before), (ended, after) in itertools.pairwise(ends):
        spent = energy.between(before, after) if energy else None
        done.append((ended - begun, spent))
    return done


def _attending_in_parts(model: ModelPatcher) -> ModelPatcher:
    """A clone that does on a CPU."""
    from ....host.attention import attend_in_parts

    clone = model.clone()
    attend_in_parts(clone)
    return clone


def with_lora(model: ModelPatcher, rank: int) -> ModelPatcher:
    """A clone with a LoRA of small random values on every linear layer of the blocks, by ComfyUI's own code."""
    import comfy.sd

    from ....weights import flux2

    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if flux2.is_block_linear(f"{name}.weight"):
            rows, columns = module.weight.shape
            layer = f"diffusion_model.{name}"
            lora[f"{layer}.lora_A.weight"] = 0.01 * torch.randn(rank, columns, generator=generator).bfloat16()
            lora[f"{layer}.lora_B.weight"] = 0.01 * torch.randn(rows, rank, generator=generator).bfloat16()
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
