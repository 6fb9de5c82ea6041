"""One way of the step benchmark: `python -m bonsai_ops.bench.run_step COMFYUI WAY FILE SIZE`, a process of its own.

Prints one line of JSON: median seconds of the steps after a first one, bytes of the weights, peak resident set.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time

STEPS = 3


def main(argv: list[str]) -> int:
    """Loads the model, samples STEPS + 1 steps and prints the figures."""
    comfyui, way, file, size = argv
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import torch

    from ..loader import load_bonsai_model
    from .report import peak_rss

    ends: list[float] = []
    with torch.inference_mode():
        if way == "ours":
            model = load_bonsai_model(file)
        elif way == "dense_bf16":
            model = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.bfloat16})
            model.model.manual_cast_dtype = None
        else:
            model = comfy.sd.load_diffusion_model(file)
        weights = sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())
        latent = torch.zeros(1, 128, int(size) // 16, int(size) // 16)
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
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends))
    print(json.dumps({"seconds": seconds, "bytes": weights, "peak_rss": peak_rss()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
