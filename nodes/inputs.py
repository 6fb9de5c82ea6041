"""Inputs and outputs that several nodes share."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..bonsai_ops.host import comfyui
from ..bonsai_ops.host.loader import CHOICES, LoadOptions
from ..bonsai_ops.host.patch.report import Report
from ..bonsai_ops.host.text_encoder import TEXT_DTYPES

CATEGORY = "Bonsai"
ESSENTIALS = "Image Generation"
"""The heading under which the page lists what makes the first pictures."""
KLEIN = ("flux2", "flux 2", "klein")
"""Words for what only FLUX.2's nodes do."""
NAMES = ("bonsai", "prism", "prismml", "1-bit", "1 bit", "1bit", "ternary", "bitnet")
"""Words that find every node here; those of one node stand in its schema."""


def found_as(*words: str, essential: bool = False) -> dict[str, Any]:
    """What else the page finds a node by, for its schema: as far as this ComfyUI's schemas have it."""
    category = ESSENTIALS if essential else None
    return comfyui.taken(io.Schema, search_aliases=[*words, *NAMES], essentials_category=category)


def reports() -> dict[str, Any]:
    """For the schema of a node that shows a report and is no output: the page gets the report again where the result
    comes from the cache, as it does of outputs. As far as this ComfyUI's schemas have it."""
    return comfyui.taken(io.Schema, has_intermediate_output=True)


def _advanced() -> dict[str, Any]:
    """For an input that the page may fold away."""
    return comfyui.taken(io.Combo.Input, advanced=True)


def loading() -> list[io.Input]:
    """How to load a transformer: the fields of LoadOptions."""
    return [_compute_dtype(), _memory(), _mode(), _layout()]


def _compute_dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=list(CHOICES["compute_dtype"]),
        default=LoadOptions.compute_dtype,
        tooltip="Number format of the activations. auto: ComfyUI's choice for this GPU; bf16 on a CPU that has it in "
        "hardware, else fp32. The packed weights stay the same in every format.",
        **_advanced(),
    )


def text_dtype(name: str) -> io.Combo.Input:
    """The number format of a text encoder, as an input called `name`."""
    return io.Combo.Input(
        name,
        options=list(TEXT_DTYPES),
        default="auto",
        optional=True,
        tooltip="Number format in which the text encoder multiplies. auto: bf16 or fp16 on a GPU that is fast in it, "
        "bf16 on a CPU that has it in hardware, else fp32. fp32: the most exact, also on a GPU. The packed weights "
        "stay the same in every format.",
        **_advanced(),
    )


def _memory() -> io.Combo.Input:
    return io.Combo.Input(
        "memory",
        options=list(CHOICES["memory"]),
        default=LoadOptions.memory,
        tooltip="auto: ComfyUI's own memory management, dynamic VRAM where it is on. classic: no dynamic VRAM for this "
        "model; try it if a driver or an extension misbehaves.",
        **_advanced(),
    )


def _mode() -> io.Combo.Input:
    return io.Combo.Input(
        "mode",
        options=list(CHOICES["mode"]),
        default=LoadOptions.mode,
        optional=True,
        tooltip="How packed layers are multiplied. exact: the weights' values, fp32 sums. fp16_accumulate: sums of up "
        "to 128 products in fp16; for GeForce cards, with compute_dtype fp16. a8: activations rounded to 8 bit; "
        "fast, and less exact: on a CPU about half the time a layer, and about twice the error of bf16. a8_fp8: to "
        "8-bit floats, on NVIDIA GPUs from RTX 40 and H100 on; the least exact. Where the device does not offer a "
        "mode, exact is used; Bonsai Model Info says why.",
        **_advanced(),
    )


def _layout() -> io.Combo.Input:
    return io.Combo.Input(
        "layout",
        options=list(CHOICES["layout"]),
        default=LoadOptions.layout,
        optional=True,
        tooltip="How ternary weights lie in memory. compact: five to a byte. fast: four to a byte, which takes a "
        "quarter more memory for them and unpacks faster. The values are the same; 1-bit models are not affected.",
        **_advanced(),
    )


def sampling() -> list[io.Input]:
    """What a sampling from noise needs beside the model: the fields of Sampling."""
    return [
        io.Conditioning.Input("positive", tooltip="A typical prompt; several can be combined."),
        io.Conditioning.Input("negative", tooltip="The negative prompt. Without guidance it has no effect."),
        io.Latent.Input("latent", tooltip="An empty latent of the size you use."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate="fixed",  # the page's default would do all the work again at each run
            tooltip="The noise. The same seed gives the same result.",
        ),
        io.Int.Input("steps", default=4, min=1, max=100, tooltip="Number of steps to sample."),
        io.Float.Input(
            "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance, as for this model's sampler."
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(comfy.samplers.KSampler.SAMPLERS),
            default="euler",
            tooltip="Sampler, as for KSampler.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(comfy.samplers.KSampler.SCHEDULERS),
            default="simple",
            tooltip="Noise schedule, as for KSampler.",
        ),
    ]


def on_node(text: str, picture: torch.Tensor) -> dict[str, Any]:
    """What the page shows on a node that reports something: the picture; the text is for whoever asks the server."""
    return {"text": [text], **ui.PreviewImage(picture).as_dict()}


def report(found: Report) -> tuple[str, str, torch.Tensor]:
    """A report as text, CSV and IMAGE."""
    return found.to_text(), found.to_csv(), torch.from_numpy(found.draw()).unsqueeze(0)
