"""What would wait for a GPU, seen without one; and a CUDA graph that is said to be recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense",  # item, int, bool, float, tolist of one value
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "lift_fresh",  # torch.tensor of numbers, which a GPU gets by a copy
    "repeat_interleave",
}
"""Operators that give a number, a shape or a tensor to Python, or take one from it."""


class Waits(TorchDispatchMode):
    """The operators in `found` would have waited for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.partition("::")[2]
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def recording(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch says that a CUDA graph is recorded while `on` is true, as it is now."""
    state = SimpleNamespace(on=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.on)
    return state
