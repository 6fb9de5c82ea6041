"""One picture, a process of its own (session.py): picture {"kind", "file", "text", "vae", "size", "png", ..}.

kind: bonsai loads the three parts as the pack loader does, and holds them to the end. unpack does so too, but unpacks
a layer whole whenever it is called, as loaders of GGUF files do, and decodes with ComfyUI's own VAE. stock loads the
dense files with ComfyUI's own loaders, and lets go of the text encoder before it loads the transformer. size: (width,
height). png: where the picture goes. keep: a file for the states that errors.py compares, or None.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from ....weights.packed_weight import PackedWeight
from ..peaks import make_peaks
from .sampling import sample
from .start import in_worker, start, synchronise


def main(argv: list[str]) -> int:
    """Prints the row that picture.py describes."""
    return in_worker(_measure, start(argv))


class _Parts:
    """Seconds, those of all threads too, and peak memory of parts that follow one another.

    A part more than once counts together.
    """

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.highest: dict[str, int] = {}
        self.device, self.peaks = device, make_peaks(device)
        self._since, self._used = time.perf_counter(), time.process_time()

    def ended(self, part: str) -> None:
        """A part has ended and the next one begins."""
        synchronise(self.device)
        now, used = time.perf_counter(), time.process_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self.processor[part] = self.processor.get(part, 0.0) + used - self._used
        self.highest[part] = max(self.highest.get(part, 0), self.peaks.peak())
        self.peaks.reset()
        self._since, self._used = now, used

    def figures(self) -> dict[str, float]:
        """{"<part>_s", "<part>_processor_s", "<part>_peak_bytes", "peak_bytes"}."""
        figures: dict[str, float] = {}
        for unit, values in (("s", self.seconds), ("processor_s", self.processor), ("peak_bytes", self.highest)):
            figures |= {f"{part}_{unit}": value for part, value in values.items()}
        return {**figures, "peak_bytes": max(self.highest.values())}


def _measure(options: dict) -> int:
    (width, height), device = options["size"], options["device"]

    from ....host.schedule import official_sigmas

    load_text, load_rest = loaders(options)
    parts, ends, velocities = _Parts(device), [], []
    with torch.inference_mode():
        clip = load_text()
        if options["kind"] != "stock":
            model, vae = load_rest()
        parts.ended("load")
        condition = clip.encode_from_tokens_scheduled(clip.tokenize(options["prompt"]))
        parts.ended("text_encoder")
        if options["kind"] == "stock":
            del clip
            _let_go()
            model, vae = load_rest()
            parts.ended("load")
        started = time.perf_counter()
        sigmas = official_sigmas((width // 16) * (height // 16), options["steps"])
        drawn = model, (width, height), sigmas, condition, device
        latent = sample(*drawn, lambda: ends.append(time.perf_counter()), velocities)
        parts.ended("steps")
        image = vae.decode(latent)
        parts.ended("vae")
    if tuple(image.shape[-3:]) != (height, width, 3) or not bool(torch.isfinite(image).all()):
        raise ValueError(f"the picture has shape {tuple(image.shape)}, expected {(height, width, 3)} of finite values")
    pixels = (255 * image[0].float().clamp(0, 1)).byte().cpu()
    Image.fromarray(pixels.numpy()).save(options["png"], compress_level=4)  # as Save Image does
    parts.ended("png")
    if options["keep"]:
        states = {"text": condition[0][0], "velocity": velocities[0], "latent": latent}
        save_file({name: state.float().cpu().contiguous() for name, state in states.items()}, options["keep"])
    row = {
        **parts.figures(),
        "step_s": [b - a for a, b in itertools.pairwise((started, *ends))],
        "own_peak_bytes": parts.peaks.own_peak(),
        "torch_peak_bytes": parts.peaks.torch_peak(),
        "processor_s": time.process_time(),
    }
    if report := model.get_attachment("bonsai"):
        row |= {"mode": report.mode, "backend": report.backend, "declined": dict(report.declined)}
    print(json.dumps(row))
    return 0


def loaders(options: dict) -> tuple[Callable[[], Any], Callable[[], tuple[Any, Any]]]:
    """(what loads a kind's CLIP, what loads its (MODEL, VAE)). Of stock all three are ComfyUI's own.

    options: "kind", the files "text", "file" and "vae", and "options" of our loader, which stock has none of.
    """
    if options["kind"] == "stock":
        return _stock(options)
    from ....host.loader import load_bonsai_model
    from ....host.text_encoder import load_bonsai_text_encoder
    from ....host.vae import load_vae

    if options["kind"] == "unpack":
        _unpack_at_each_call()

    def rest() -> tuple[Any, Any]:
        model = load_bonsai_model(options["file"], options["options"])
        return model, _stock_vae(options) if options["kind"] == "unpack" else load_vae(Path(options["vae"]).parents[1])

    dtype = options["options"]["compute_dtype"]
    return lambda: load_bonsai_text_encoder(options["text"], compute_dtype=dtype), rest


def _stock(options: dict) -> tuple[Callable[[], Any], Callable[[], tuple[Any, Any]]]:
    """As Load CLIP, Load Diffusion Model and Load VAE do it."""
    import comfy.sd

    kind = comfy.sd.CLIPType.FLUX2
    return (
        lambda: comfy.sd.load_clip([options["text"]], clip_type=kind),
        lambda: (comfy.sd.load_diffusion_model(options["file"]), _stock_vae(options)),
    )


def _stock_vae(options: dict) -> Any:
    import comfy.sd
    import comfy.utils

    tensors, metadata = comfy.utils.load_torch_file(options["vae"], return_metadata=True)
    return comfy.sd.VAE(sd=tensors, metadata=metadata)


def _unpack_at_each_call() -> None:
    """Has every packed layer of this process unpack its whole weight in the dtype of its input, and multiply that."""
    from ....kernels import dispatch, eager

    def multiply(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = eager.EXACT
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    eager.multiply = multiply
    os.environ[dispatch.OVERRIDE] = eager.NAME


def _let_go() -> None:
    import gc

    import comfy.model_management

    gc.collect()
    comfy.model_management.cleanup_models()
