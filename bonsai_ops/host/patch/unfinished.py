"""The best residuals that a training had found when it was cancelled, for the next run with the same inputs.

They are kept in this process, on the processor, as long as the patched MODEL is: by what ComfyUI keeps of it, until it
is made again or a training with these inputs came to its end.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ...quantize.recover import Look


@dataclass(frozen=True)
class Unfinished:
    """values: {weight: (up, down)} as they are stored. before, best: the look at what came in at first, and at them."""

    values: Mapping[str, Sequence[torch.Tensor]]
    before: Look
    best: Look


@dataclass(frozen=True)
class _Entry:
    original: weakref.ref[ModelPatcher]
    asked: bytes
    found: Unfinished


_entries: weakref.WeakKeyDictionary[ModelPatcher, _Entry] = weakref.WeakKeyDictionary()


class Training:
    """One of `patched` against `original`, for what `asked` says: values, lists, tables and tensors of any kind."""

    def __init__(self, original: ModelPatcher, patched: ModelPatcher, asked: Any) -> None:
        self._original, self._patched, self._asked = original, patched, _digest(asked)

    def unfinished(self) -> Unfinished | None:
        """What an earlier run of the same training left."""
        entry = _entries.get(self._patched)
        same = entry is not None and entry.original() is self._original and entry.asked == self._asked
        return entry.found if same else None

    def keep(self, found: Unfinished) -> None:
        """In place of what is kept of the patched model."""
        _entries[self._patched] = _Entry(weakref.ref(self._original), self._asked, found)

    def end(self) -> None:
        """It came to its end: nothing is kept of it."""
        if self.unfinished() is not None:
            del _entries[self._patched]


def _digest(value: Any) -> bytes:
    found = hashlib.sha256()
    _feed(value, found.update)
    return found.digest()


def _feed(value: Any, update: Callable[[Any], object]) -> None:
    """Tells `update` all that makes the value what it is. What has no text of its own is told by where it lies."""
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype} {list(value.shape)} ".encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return
    update(f"{type(value).__name__} ".encode())
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=lambda item: str(item[0]))
    if isinstance(value, (list, tuple)):
        update(f"{len(value)} ".encode())
        for item in value:
            _feed(item, update)
    else:
        update(f"{value!r} ".encode())
