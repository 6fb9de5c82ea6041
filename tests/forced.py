"""Backends of a GPU on the CPU, and a record of what multiplied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bonsai_ops.kernels import dispatch, eager
from bonsai_ops.weights.packed_weight import PackedWeight


def force(monkeypatch: pytest.MonkeyPatch, backend: Any, *before: Any) -> list[tuple[str, str]]:
    """`backend` takes what is on the CPU, after the backends `before`; returns what multiplied, (name, scheme)."""
    used: list[tuple[str, str]] = []

    def watched(backend: Any) -> SimpleNamespace:
        def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
            y = backend.multiply(x, weight, bias, mode)
            used.append((backend.NAME, weight.scheme))
            return y

        return SimpleNamespace(NAME=backend.NAME, MODES=backend.MODES, declines=backend.declines, multiply=multiply)

    taking = SimpleNamespace(NAME=backend.NAME, MODES=backend.MODES, declines=eager.declines, multiply=backend.multiply)
    monkeypatch.setattr(dispatch, "BACKENDS", (*map(watched, (*before, taking)), eager))
    return used
