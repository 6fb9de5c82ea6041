"""How far each packed layer is from the dense one on the inputs that it meets while the packed model samples.

With x the inputs of a layer, W its dense weight and y what the layer's backend makes of x: |y - x W^T| / |x W^T| over
all calls. So y has the rounding of the weight and that of the computing dtype. Bias and LoRAs are left out on both
sides. x are the inputs as they really are: changed by the errors of the layers before.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ... import kernels
from ...quantize import LayerError, measured, recipe_of, thinned
from ..compiled import uncompiled
from ..layout import mode_of, unwrap
from ..progress import Counter, Progress
from ..tensors import base_tensor, linear_modules
from .layers import Layer, convolutions, dense_weight, other_tensors, packed_pairs, stored_bytes
from .report import LayerReport, Report, count_layers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..sampling import Sampling

STEP_ROWS = 4096
"""Rows of a weight that are compared at a time."""


class Meter:
    """Measures the packed layers of one ModelPatcher against the layers of the same names of another.

    Of each call it takes the inputs that quantize.thinned leaves. Raises ValueError if nothing is packed or the models
    differ.
    """

    def __init__(self, original: ModelPatcher, patched: ModelPatcher) -> None:
        self._original, self._patched = original, patched
        self._layers = [Layer(name, module) for name, module in linear_modules(patched)]
        pairs = packed_pairs(original, patched, self._layers)
        self._packed = [layer for layer, _ in pairs]
        self._dense = {layer.name: dense for layer, dense in pairs}
        self._sums: dict[str, tuple[float, float]] = {}
        self._seconds = 0.0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, every call of a packed layer is compared; its result stays the same."""
        started, handles = time.perf_counter(), []
        try:
            for layer in self._packed:
                handles.append(layer.module.register_forward_pre_hook(self._hook(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seconds += time.perf_counter() - started

    def report(self, progress: Progress | None = None) -> Report:
        """The errors of the weights and, for layers that were called, of the outputs. Raises ValueError if none was.

        progress(weights done, weights in all) is called a packed layer; what it raises ends the work.
        """
        if not self._sums:
            raise ValueError("nothing was measured: no packed layer was called while the model sampled")
        total = sum(layer.size for layer in self._packed)
        counter, rows = Counter(total, progress), []
        for layer in self._layers:
            if layer.name in self._dense:
                counter.begin(layer.size)
            rows.append(self._row(layer))
        counter.end()
        title = f"{type(self._patched.model).__name__}, measured"
        without = [layer.name for layer in self._packed if layer.name not in self._sums]
        notes = [count_layers("measured", len(self._packed), without)]
        return Report(
            title,
            rows,
            sum(t.nbytes for t in other_tensors(self._patched, self._layers).values()),
            convolutions(self._patched),
            self._seconds,
            notes,
            "inputs of this sampling",
        )

    def _hook(self, layer: Layer) -> Callable[[torch.nn.Module, tuple], None]:
        def compare(module: torch.nn.Module, inputs: tuple) -> None:
            if inputs:
                self._compare(layer.name, thinned(inputs[0].detach().flatten(0, -2)), module.weight)

        return compare

    def _compare(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        y = kernels.linear(x, unwrap(weight).to(x.device), None, mode_of(weight))
        dense = dense_weight(self._original, self._dense[name], x.device)
        wide = x.float()
        error, whole = self._sums.get(name, (0.0, 0.0))
        for lo in range(0, dense.shape[0], STEP_ROWS):
            truth = torch.nn.functional.linear(wide, dense[lo : lo + STEP_ROWS])
            error += float((y[:, lo : lo + STEP_ROWS] - truth).square().sum(dtype=torch.float64))
            whole += float(truth.square().sum(dtype=torch.float64))
        self._sums[name] = (error, whole)

    def _row(self, layer: Layer) -> LayerReport:
        if layer.name not in self._dense:
            return LayerReport(layer.name, "kept", layer.shape, stored_bytes(self._patched, layer), reason="not packed")
        weight = unwrap(base_tensor(self._patched, layer.weight)).to(self._original.load_device)
        dense = dense_weight(self._original, self._dense[layer.name], weight.codes.device)
        relative = measured(dense, weight).error.relative
        error, whole = self._sums.get(layer.name, (0.0, 0.0))
        output = math.sqrt(error / whole) if whole > 0 else None
        return LayerReport(
            layer.name, recipe_of(weight), layer.shape, weight.nbytes, LayerError(relative, output), rank=weight.rank
        )


def sample_measured(
    original: ModelPatcher,
    patched: ModelPatcher,
    sampling: Sampling,
    progress: Progress | None = None,
) -> tuple[Report, dict]:
    """(errors of the packed layers against those of the original, LATENT of the packed model).

    progress(weights done, weights in all) follows the comparison of the weights after the sampling. Raises ValueError
    if nothing is packed, the models differ or no packed layer was called.
    """
    meter = Meter(original, patched)
    with meter.measuring(), uncompiled(patched) as plain:
        out = sampling.run(plain)
    return meter.report(progress), out
