"""One way of the step and LoRA benchmarks, a process of its own:

    python -m bonsai_ops.bench.run_step COMFYUI WAY FILE SIZE RANK

Samples without and, if RANK is above 0, with a LoRA of that rank on every linear layer of the blocks. Prints one line
of JSON: median seconds of the steps after a first one, without and with it, bytes of the weights, peak resident set.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time

STEPS = 3
ROUNDS = 2


def main(argv: list[str]) -> int:
    """Loads the model, samples and prints the figures."""
    comfyui, way, file, size, rank = argv
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import torch

    from ..loader import load_bonsai_model
    from .report import peak_rss

    with torch.inference_mode():
        if way == "ours":
            model = load_bonsai_model(file)
        elif way == "dense_bf16":
            model = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.bfloat16})
            model.model.manual_cast_dtype = None
        else:
            model = comfy.sd.load_diffusion_model(file)
        weights = sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())
        if int(rank):
            patched = _with_lora(model, int(rank))
            rounds = [(_steps(model, int(size)), _steps(patched, int(size))) for _ in range(ROUNDS)]
            plain, lora = (statistics.median(itertools.chain(*runs)) for runs in zip(*rounds, strict=True))
        else:
            plain, lora = statistics.median(_steps(model, int(size))), None
    print(json.dumps({"seconds": plain, "lora_seconds": lora, "bytes": weights, "peak_rss": peak_rss()}))
    return 0


def _steps(model: object, size: int) -> list[float]:
    """Seconds of STEPS sampling steps; one more goes before them."""
    import comfy.sample
    import comfy.samplers
    import torch

    ends: list[float] = []
    latent = torch.zeros(1, 128, size // 16, size // 16)
    embeds = torch.randn(1, 512, 7680, generator=torch.Generator().manual_seed(0))
    condition = [[embeds, {"pooled_output": None}]]
    comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, 0),
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.linspace(1, 0, STEPS + 2),
        condition,
        condition,
        latent,
        callback=lambda *_: ends.append(time.perf_counter()),
        disable_pbar=True,
    )
    return [b - a for a, b in itertools.pairwise(ends)]


def _with_lora(model: object, rank: int) -> object:
    """A clone with a LoRA of small random values on every linear layer of the blocks, by ComfyUI's own code."""
    import comfy.sd
    import torch

    from .. import klein
    from ..synthetic import KLEIN_4B

    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, shape in klein.expected_shapes(KLEIN_4B).items():
        if klein.is_block_linear(name):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = 0.01 * torch.randn(rank, shape[1], generator=generator).bfloat16()
            lora[f"{layer}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank, generator=generator).bfloat16()
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
