"""A size of the benchmark of Recover BitLinear, a process of its own (session.py): recover {"file", "size", ..}.

Loads a dense file as bf16 through ComfyUI, which on a CPU computes with it in fp32, packs it as options say, and has
the node's work done on the fewest points: two steps of the dense model, one held out, and one step of training on the
other.
"""

from __future__ import annotations

import gc
import itertools
import json
import time

import torch

from ..peaks import make_peaks
from .sampling import empty_latent, random_condition
from .start import in_worker, start, synchronise

POINTS = 2


def main(argv: list[str]) -> int:
    """Prints {"dtype", "bytes", "residual_bytes", "sampled_s", "looked_s", "trained_s", "peak", "before", "after"}."""
    return in_worker(_measure, start(argv))


def _measure(options: dict) -> int:
    device = options["device"]
    peaks = make_peaks(device)
    import comfy.sd

    from ....host.patch import PatchOptions, patch_model
    from ....host.patch.recover import Plan, Recovery, recover

    with torch.inference_mode():
        dense = comfy.sd.load_diffusion_model(options["file"], model_options={"dtype": torch.bfloat16})
        packed, report = patch_model(dense, PatchOptions(recipe=options["recipe"], rank=options["rank"]))
        gc.collect()
        peaks.reset()
        times: list[float] = []

        def note(*_: int) -> None:
            synchronise(device)
            times.append(time.perf_counter())

        wanted = Recovery(
            [random_condition(dense)],
            {"samples": empty_latent(options["size"])},
            torch.linspace(1, 0, 2),
            POINTS,
            Plan(1, 1e-3, 1),
        )
        _, found = recover(dense, packed, wanted, note)
        note()
    # two steps of the dense model, a look at the held-out point, a step of training, a look again
    begun = [after - before for before, after in itertools.pairwise(times[:POINTS] + times[-4:])]
    figures = {
        "dtype": "fp32" if dense.model.get_dtype_inference() == torch.float32 else "bf16",
        "bytes": report.nbytes,
        "residual_bytes": found.nbytes,
        "sampled_s": begun[0],
        "looked_s": begun[-3],
        "trained_s": begun[-2],
        "peak": peaks.peak(),
        "before": found.tuned.before.held_out,
        "after": found.tuned.best.held_out,
    }
    print(json.dumps(figures))
    return 0
