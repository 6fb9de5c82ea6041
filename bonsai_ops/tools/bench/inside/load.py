"""One row of the memory benchmark, a process of its own (session.py): load {"kind", "file"}.

kind: idle (load nothing), bonsai (our loader) or stock (ComfyUI's). After loading, every weight is read once, as a
first sampling step would, so that mapped files count in the peak.
"""

from __future__ import annotations

import json
import time

from .start import start


def main(argv: list[str]) -> int:
    """Loads and prints {"resident_bytes", "load_seconds", "peak_rss_bytes"}."""
    options = start(argv)
    kind, file = options["kind"], options["file"]
    import comfy.sd
    import torch

    from ....host.loader import load_bonsai_model
    from ..machine import peak_rss

    resident, seconds = 0, 0.0
    with torch.inference_mode():
        started = time.perf_counter()
        if kind != "idle":
            model = load_bonsai_model(file) if kind == "bonsai" else comfy.sd.load_diffusion_model(file)
            tensors = model.model.diffusion_model.state_dict().values()
            seconds = time.perf_counter() - started
            for tensor in tensors:
                resident += tensor.nbytes
                tensor.view(-1).view(torch.uint8)[::4096].sum()
    print(json.dumps({"resident_bytes": resident, "load_seconds": seconds, "peak_rss_bytes": peak_rss()}))
    return 0
