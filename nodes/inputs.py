"""Inputs that several nodes share, and the bridge from a loader's progress to ComfyUI's bar and Cancel button."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..bonsai_ops.loader import MEMORY_MODES
from ..bonsai_ops.precision import DTYPES

CATEGORY = "Bonsai"


def compute_dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=["auto", *DTYPES],
        default="auto",
        tooltip="Number format of the activations. auto: ComfyUI's choice for this GPU; bf16 on a CPU that has it in "
        "hardware, else fp32. The packed weights stay the same in every format.",
    )


def memory() -> io.Combo.Input:
    return io.Combo.Input(
        "memory",
        options=list(MEMORY_MODES),
        default="auto",
        tooltip="auto: ComfyUI's own memory management, dynamic VRAM where it is on. classic: no dynamic VRAM for this "
        "model; try it if a driver or an extension misbehaves.",
    )


def progress(node_id: str | None = None) -> Callable[[int, int], None]:
    """A callback (done, total) that moves ComfyUI's progress bar and raises when the user cancels."""
    bar: comfy.utils.ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bar is None:
            bar = comfy.utils.ProgressBar(1000, node_id=node_id)
        bar.update_absolute(done * 1000 // max(total, 1), 1000)

    return report
