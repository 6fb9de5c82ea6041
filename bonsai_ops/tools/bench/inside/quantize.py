"""One way of the quantizer's benchmark, a process of its own (session.py): quantize {"file", "options", "device"}.

Loads a dense file through ComfyUI in bf16, as a GPU holds it (on a CPU ComfyUI's own choice is fp32, twice as large),
patches it and prints the figures. options: those of PatchOptions. Where the system allows it, peak_bytes is that of the
quantization: ComfyUI holds the file's pages and the model while it loads.
"""

from __future__ import annotations

import gc
import json

from ..peaks import make_peaks
from .start import start


def main(argv: list[str]) -> int:
    """Loads, patches and prints {"seconds", "peak_bytes", "loaded_peak_bytes", "layers", "bytes", "bits", ..}."""
    options = start(argv)
    peaks = make_peaks(options["device"])
    import comfy.sd
    import torch

    from ....host.patch import PatchOptions, patch_model

    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(options["file"], model_options={"dtype": torch.bfloat16})
        gc.collect()  # the file's tensors and with them its pages
        loaded = peaks.peak()
        peaks.reset()
        _, report = patch_model(model, PatchOptions(**options["options"]))
    weights = sum(layer.weights for layer in report.packed)
    figures = {
        "seconds": report.seconds,
        "peak_bytes": peaks.peak(),
        "torch_peak_bytes": peaks.torch_peak(),
        "loaded_peak_bytes": loaded,
        "layers": len(report.packed),
        "bytes": report.nbytes,
        "bits": 8 * sum(layer.nbytes for layer in report.packed) / weights if weights else None,
        "relative_error": report.total("relative"),
    }
    print(json.dumps(figures))
    return 0
