"""What goes into every linear layer of a MODEL while it samples, for Patch to BitLinear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...quantize import DETAILS, Recorder, Statistics
from ..tensors import linear_modules

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..sampling import Sampling

__all__ = ["DETAILS", "Calibration", "sample_recorded"]


@dataclass(frozen=True)
class Calibration:
    """{layer name: statistics} of a model class, recorded over a sampling."""

    model: str
    layers: dict[str, Statistics] = field(default_factory=dict)


def sample_recorded(model: ModelPatcher, sampling: Sampling, detail: str) -> tuple[Calibration, dict]:
    """(what went into every linear layer, LATENT). detail: one of DETAILS.

    Raises ValueError for an unknown one or if no linear layer was called.
    """
    recorder = Recorder(detail)
    with recorder.recording(linear_modules(model.model.diffusion_model)):
        out = sampling.run(model)
    return Calibration(type(model.model).__name__, recorder.result()), out
