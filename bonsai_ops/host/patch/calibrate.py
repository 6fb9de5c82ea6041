"""What goes into every linear layer of a MODEL while it samples, for Patch to BitLinear."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...quantize import DETAILS, Recorder, Statistics
from ..compiled import uncompiled
from ..tensors import linear_modules
from .report import count_layers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..sampling import Sampling

logger = logging.getLogger(__name__)

__all__ = ["DETAILS", "Calibration", "sample_recorded"]


@dataclass(frozen=True)
class Calibration:
    """{layer name: statistics} of a model class, recorded over a sampling. said: how many layers, a line for users."""

    model: str
    layers: dict[str, Statistics] = field(default_factory=dict)
    said: str = ""


def sample_recorded(model: ModelPatcher, sampling: Sampling, detail: str) -> tuple[Calibration, dict]:
    """(what went into every linear layer, LATENT). detail: one of DETAILS. The log names layers that were not called.

    A compiled model is sampled without its compiled parts, which do not tell what goes into their layers.
    Raises ValueError for an unknown one or if no linear layer was called.
    """
    recorder, layers = Recorder(detail), linear_modules(model)
    with recorder.recording(layers), uncompiled(model) as plain:
        out = sampling.run(plain)
    recorded = recorder.result()
    without = [name for name, _ in layers if name not in recorded]
    said = count_layers("calibrated", len(layers), without)
    logger.info("Bonsai: %s", said)
    return Calibration(type(model.model).__name__, recorded, said), out
