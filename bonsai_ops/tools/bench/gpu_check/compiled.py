"""The seedling under torch.compile, by ComfyUI's own node."""

from __future__ import annotations

import statistics
import time

from .check import Check, relative
from .drawing import draw

BACKENDS = ("inductor", "cudagraphs")
STEPS = 4


def run(check: Check, _: str) -> None:
    """Notes seconds of the first and of a later step, and how far the latent is from the plain one."""
    from ....host.loader import load_bonsai_model
    from .seedling import SEEDLING

    model = load_bonsai_model(check.settings.project / SEEDLING)
    size = 256 if check.on_gpu else 64
    plain, steps, _ = draw(check, model, size, STEPS)
    check.note("seedling step_s", statistics.median(steps))
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    for backend in BACKENDS:
        if backend == "cudagraphs" and not check.on_gpu:
            check.note("not measured", "cudagraphs needs a GPU")
            continue
        with check.guarded(backend):
            begun = time.perf_counter()
            compiled = TorchCompileModel.execute(model=model, backend=backend).result[0]
            found, steps, _ = draw(check, compiled, size, STEPS)
            figures = {
                "all_s": round(time.perf_counter() - begun, 1),
                "step_s": statistics.median(steps),
                "against plain": relative(found, plain),
                "class": type(compiled).__name__,
            }
            check.note(backend, figures)
