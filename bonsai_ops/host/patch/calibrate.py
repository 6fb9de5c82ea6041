"""What goes into every linear layer while a model samples: the statistics that weigh its rounding errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...quantize import Statistics
from ..tensors import linear_modules

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from ..sampling import Sampling

MODES = ("power", "full")
GRAM_BYTES = 4 << 30
"""Second moments are recorded while they fit into this; the layers after that get the power alone."""
TOKENS = 1024
"""Tokens of one call that go into a second moment: every n-th one. The power takes all."""


def thinned(x: torch.Tensor) -> torch.Tensor:
    """Every n-th row of x [M, K], so that at most TOKENS are left."""
    return x[:: -(-x.shape[0] // TOKENS) or 1]


@dataclass
class _Sums:
    """Running sums of one layer's inputs; float32 on the device of the layer."""

    power: torch.Tensor
    count: int = 0
    gram: torch.Tensor | None = None
    gram_count: int = 0


@dataclass(frozen=True)
class Calibration:
    """{layer name: statistics} of a model class, recorded over a sampling."""

    model: str
    layers: dict[str, Statistics] = field(default_factory=dict)


class Recorder:
    """Records the inputs of the linear layers of a ComfyUI BaseModel within `recording()`.

    mode: power (the mean square of each input) or full (also the second moment between inputs, K x K floats a layer,
    up to `gram_bytes` in all). Layers are looked up by name when the recording begins.
    """

    def __init__(self, mode: str = "power", gram_bytes: int = GRAM_BYTES) -> None:
        if mode not in MODES:
            raise ValueError(f"calibration mode {mode!r} is unknown, expected {' or '.join(MODES)}")
        self.mode, self._left = mode, gram_bytes
        self._sums: dict[str, _Sums] = {}

    @contextlib.contextmanager
    def recording(self, model: BaseModel) -> Iterator[None]:
        """Inside, every call of a linear layer of `model.diffusion_model` is recorded; its result stays the same."""
        handles = []
        try:
            for name, module in linear_modules(model.diffusion_model):
                handles.append(module.register_forward_pre_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self, model: BaseModel) -> Calibration:
        """What was recorded. Raises ValueError if no layer was called."""
        if not self._sums:
            raise ValueError("nothing was recorded: no linear layer of the model was called while it sampled")
        layers = {}
        for name, sums in self._sums.items():
            gram = None if sums.gram is None else (sums.gram / max(1, sums.gram_count)).cpu()
            layers[name] = Statistics((sums.power / max(1, sums.count)).cpu(), gram, sums.count)
        return Calibration(type(model).__name__, layers)

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple], None]:
        def record(module: torch.nn.Module, inputs: tuple) -> None:
            x = inputs[0] if inputs else None
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.is_floating_point():
                self._add(name, x.detach().flatten(0, -2))

        return record

    def _add(self, name: str, x: torch.Tensor) -> None:
        columns = x.shape[-1]
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = _Sums(torch.zeros(columns, dtype=torch.float32, device=x.device))
            if self.mode == "full" and 4 * columns**2 <= self._left:
                self._left -= 4 * columns**2
                sums.gram = torch.zeros(columns, columns, dtype=torch.float32, device=x.device)
        sums.power += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square().to(sums.power.device)
        sums.count += x.shape[0]
        if sums.gram is not None:
            some = thinned(x).to(sums.gram.device, torch.float32)
            sums.gram.addmm_(some.T, some)
            sums.gram_count += some.shape[0]


def sample_recorded(model: ModelPatcher, sampling: Sampling, mode: str) -> tuple[Calibration, dict]:
    """(what went into every linear layer, LATENT). mode: power or full.

    Raises ValueError for an unknown mode or if no linear layer was called.
    """
    recorder = Recorder(mode)
    with recorder.recording(model.model):
        out = sampling.run(model)
    return recorder.result(model.model), out
