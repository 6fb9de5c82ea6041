"""What a prompt was encoded to, kept from prompt to prompt: encoding takes up to half a minute on a CPU.

ComfyUI keeps the result of CLIP Text Encode while the prompt stays; changed and changed back it is encoded again,
whatever is free: its newest versions let go of what the last graph did not use at the first node that runs, the CLIP
as well. So what is kept here belongs to the process, under all that it comes from: the files as they were when they
were read, the dtype, the device, the tokens and the layer.

Where a CPU encodes, the text encoder's weights are read again only for the next prompt: those that are mapped from a
file leave the process's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfy.sd
import torch
from comfy.cli_args import args

from .. import kernels
from ..weights.files import stamp

LARGEST = 128 << 20
"""Bytes that all text encoders may keep together: eight prompts of Bonsai Image 4B."""

KEPT_DTYPE = "manual_cast_dtype"
"""The object patch that every CLIP has: the dtype between its layers."""


class TextStates:
    """{what was asked: what came out}, the oldest unused first. limit: bytes. Usable from several threads."""

    def __init__(self, limit: int = LARGEST) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Any] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self._kept.values()))

    def get(self, key: Hashable) -> Any:
        """A copy of what was kept, which the caller may change; None without."""
        with self._lock:
            if key not in self._kept:
                return None
            found = self._kept[key] = self._kept.pop(key)
        return _copied(found)

    def put(self, key: Hashable, value: Any) -> None:
        """Keeps a copy; nothing of what is larger than the limit by itself."""
        if _nbytes(value) > self.limit:
            return
        value = _copied(value)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = value
            while self.nbytes > self.limit:
                del self._kept[next(iter(self._kept))]


STATES = TextStates()


@dataclass(frozen=True)
class Source:
    """What a text encoder is read from. Made before that: it remembers what the files are then.

    files: all that decide on its weights and sizes. dtype: what it multiplies in on a device.
    """

    files: tuple[Path, ...]
    dtype: Callable[[torch.device], torch.dtype]
    stamps: tuple = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", self._stamps())

    def key(self, device: torch.device) -> Hashable | None:
        """What text states on a device depend on beside the prompt; None where a file is no longer what was read."""
        stamps = self._stamps()
        return (stamps, str(device), self.dtype(device)) if stamps and stamps == self.stamps else None

    def _stamps(self) -> tuple:
        try:
            return tuple(map(stamp, self.files))
        except OSError:
            return ()


class RememberingCLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP that encodes a prompt once, whichever loader or clone is asked.

    A prompt that is known does not even bring the text encoder to the GPU. Nothing is kept of one that LoRAs, hooks or
    anything else have changed, with --cache-none, of textual inversions, and once a file is another than was read.
    """

    def __init__(self, clip: comfy.sd.CLIP, source: Source) -> None:
        """Takes the place of a CLIP that was just made."""
        super().__init__(no_init=True)
        vars(self).update(vars(clip))
        self._source = source

    def clone(self, *args: Any, **kwargs: Any) -> RememberingCLIP:
        """As ComfyUI's."""
        return RememberingCLIP(super().clone(*args, **kwargs), self._source)

    def encode_from_tokens(self, tokens: dict, return_pooled: bool | str = False, return_dict: bool = False) -> Any:
        """As comfy.sd.CLIP's; tensors are the caller's own."""
        key = self._key(tokens, return_pooled, return_dict)
        found = None if key is None else STATES.get(key)
        if found is not None:
            return found
        with kernels.keeping_memory():
            found = super().encode_from_tokens(tokens, return_pooled, return_dict)
        self.patcher.give_back_pages()
        if key is not None:
            STATES.put(key, found)
        return found

    def _key(self, *asked: Any) -> Hashable | None:
        """All that the result depends on; None if it is not to be kept."""
        if args.cache_none or self._is_changed():
            return None
        dtype = str(self.patcher.object_patches.get(KEPT_DTYPE))
        parts = self._source.key(self.patcher.load_device), _plain([*asked, self.layer_idx, dtype])
        return None if None in parts else parts

    def _is_changed(self) -> bool:
        """Whether something else may come out than what the files say, or hooks beside it."""
        patcher = self.patcher
        weights = patcher.patches, patcher.weight_wrapper_patches, patcher.object_patches.keys() - {KEPT_DTYPE}
        hooks = patcher.hook_patches, patcher.forced_hooks, patcher.current_hooks, self.apply_hooks_to_conds
        others = patcher.injections, patcher.wrappers, patcher.additional_models
        callbacks = patcher.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD)
        return patcher.model is not self.cond_stage_model or any((*weights, *hooks, *others, callbacks))


def _plain(value: Any) -> Hashable | None:
    """Tokens as something that compares; None where one of them is no number, such as a textual inversion."""
    if isinstance(value, Mapping):
        value = [(str(name), part) for name, part in value.items()]
    elif value is None or isinstance(value, (int, float, str)):
        return (value,)
    if not isinstance(value, (list, tuple)):
        return None
    parts = [_plain(part) for part in value]
    return None if None in parts else tuple(parts)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value
