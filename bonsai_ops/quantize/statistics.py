"""What goes into linear layers while they are called: the statistics that weigh their rounding errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

DETAILS = ("power", "full")
GRAM_BYTES = 4 << 30
"""Second moments are recorded while they fit into this; the layers after that get the power alone."""
TOKENS = 1024
"""Tokens of one call that go into a second moment: every n-th one. The power takes all."""


@dataclass(frozen=True)
class Statistics:
    """What the inputs of a layer were: `power` float32 [K], the mean square of each; `gram` float32 [K, K], the mean
    of x x^T, or None where only the power was recorded. count: inputs seen."""

    power: torch.Tensor
    gram: torch.Tensor | None = None
    count: int = 0


@dataclass
class _Sums:
    """Running sums of one layer's inputs; float32 on the device of the layer."""

    power: torch.Tensor
    count: int = 0
    gram: torch.Tensor | None = None
    gram_count: int = 0


class Recorder:
    """Records the inputs of linear layers within `recording`.

    detail: power (the mean square of each input) or full (also the second moment between inputs, K x K floats a layer,
    up to `gram_bytes` in all). Raises ValueError for another one.
    """

    def __init__(self, detail: str = "power", gram_bytes: int = GRAM_BYTES) -> None:
        if detail not in DETAILS:
            raise ValueError(f"calibration detail {detail!r} is unknown, expected {' or '.join(DETAILS)}")
        self.detail, self._left = detail, gram_bytes
        self._sums: dict[str, _Sums] = {}

    @contextlib.contextmanager
    def recording(self, layers: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[None]:
        """Inside, every call of one of these (name, layer) is recorded; its result stays the same."""
        handles = []
        try:
            for name, layer in layers:
                handles.append(layer.register_forward_pre_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, Statistics]:
        """{layer name: what was recorded} of the layers that were called. Raises ValueError if none was."""
        if not self._sums:
            raise ValueError("nothing was recorded: no linear layer of the model was called while it sampled")
        layers = {}
        for name, sums in self._sums.items():
            gram = None if sums.gram is None else (sums.gram / max(1, sums.gram_count)).cpu()
            layers[name] = Statistics((sums.power / max(1, sums.count)).cpu(), gram, sums.count)
        return layers

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
            if self.detail == "full" and 4 * columns**2 <= self._left:
                self._left -= 4 * columns**2
                sums.gram = torch.zeros(columns, columns, dtype=torch.float32, device=x.device)
        sums.power += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square().to(sums.power.device)
        sums.count += x.shape[0]
        if sums.gram is not None:
            some = thinned(x).to(sums.gram.device, torch.float32)
            sums.gram.addmm_(some.T, some)
            sums.gram_count += some.shape[0]


def thinned(x: torch.Tensor) -> torch.Tensor:
    """Every n-th row of x [M, K], so that at most TOKENS are left."""
    return x[:: -(-x.shape[0] // TOKENS) or 1]
