"""One way of the step and LoRA benchmarks, a process of its own (host.py): run_step {"way", "file", "size", "rank"}.

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
from typing import Any

from . import host
from .energy import Energy, find_energy

STEPS = 2
ROUNDS = 2
IN_PARTS = "in parts"


def main(argv: list[str]) -> int:
    """Loads the model, samples and prints the figures."""
    return host.in_worker(_measure, host.start(argv))


def _measure(options: dict) -> int:
    size, rank, device = options["size"], options["rank"], options["device"]
    import torch

    energy = find_energy(device)
    with torch.inference_mode():
        model = load(options["way"], options["file"], options["options"])
        figures = {"bytes": sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())}
        if rank:
            patched = _with_lora(model, rank)
            rounds = [
                ([s for s, _ in steps(model, size, device)], [s for s, _ in steps(patched, size, device)])
                for _ in range(ROUNDS)
            ]
            plain, lora = (statistics.median(itertools.chain(*runs)) for runs in zip(*rounds, strict=True))
            figures |= {"seconds": plain, "lora_seconds": lora}
        else:
            in_parts = _attending_in_parts(model)
            print(json.dumps({"loaded": options["file"]}), flush=True)
            for line in sys.stdin:
                asked = in_parts if line.strip() == IN_PARTS else model
                print(json.dumps({"steps": steps(asked, size, device, energy)}), flush=True)
    report = model.get_attachment("bonsai")
    figures |= {
        "no_joules": energy.why_not,
        "peak_rss": host.peak_bytes(device),
        "mode": getattr(report, "mode", "exact"),
        "declined": dict(report.declined) if report else {},
    }
    print(json.dumps(figures))
    return 0


def load(way: str, file: str, options: dict | None) -> object:
    """The model: ours (any ours_..), dense computing in bf16 (dense_bf16), or as stock ComfyUI loads it."""
    import comfy.sd
    import torch

    from ...host.loader import load_bonsai_model

    if way.startswith("ours"):
        return load_bonsai_model(file, options)
    if way == "dense_bf16":
        model = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.bfloat16})
        model.model.manual_cast_dtype = None
        return model
    return comfy.sd.load_diffusion_model(file)


def steps(
    model: object, size: int, device: str, energy: Energy | None = None, count: int = STEPS, last: Any = None
) -> list[tuple[float, float | None]]:
    """(seconds, joules) of `count` sampling steps; one more goes before them. `last`: a context around the last."""
    import comfy.sample
    import comfy.samplers
    import torch

    ends: list[tuple[float, list[float]]] = []
    latent = torch.zeros(1, 128, size // 16, size // 16)
    channels = model.model.model_config.unet_config["context_in_dim"]
    embeds = torch.randn(1, 512, channels, generator=torch.Generator().manual_seed(0))
    condition = [[embeds, {"pooled_output": None}]]

    def note(*_: object) -> None:
        host.synchronise(device)
        if last is not None and len(ends) == count:
            last.__exit__(None, None, None)
        ends.append((time.perf_counter(), energy.read() if energy else []))
        if last is not None and len(ends) == count:
            last.__enter__()

    comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, 0),
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.linspace(1, 0, count + 2),
        condition,
        condition,
        latent,
        callback=note,
        disable_pbar=True,
    )
    done = []
    for (start, before), (end, after) in itertools.pairwise(ends):
        spent = energy.between(before, after) if energy else None
        done.append((end - start, spent))
    return done


def _attending_in_parts(model: object) -> object:
    """A clone that does on a CPU."""
    from ...host.attention import attend_in_parts

    clone = model.clone()
    attend_in_parts(clone)
    return clone


def _with_lora(model: object, rank: int) -> object:
    """A clone with a LoRA of small random values on every linear layer of the blocks, by ComfyUI's own code."""
    import comfy.sd
    import torch

    from ...weights import flux2

    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if flux2.is_block_linear(f"{name}.weight"):
            rows, columns = module.weight.shape
            layer = f"diffusion_model.{name}"
            lora[f"{layer}.lora_A.weight"] = 0.01 * torch.randn(rank, columns, generator=generator).bfloat16()
            lora[f"{layer}.lora_B.weight"] = 0.01 * torch.randn(rows, rank, generator=generator).bfloat16()
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
