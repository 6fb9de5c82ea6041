"""What a prompt was encoded to, kept from prompt to prompt: encoding takes up to half a minute on a CPU.

ComfyUI keeps the result of CLIP Text Encode while the prompt stays; changed and changed back it is encoded again,
whatever is free: its newest versions let go of what the last graph did not use at the first node that runs.

Where a CPU encodes, the text encoder's weights are read again only for the next prompt: those that are mapped from a
file leave the process's memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import comfy.sd
import torch
from comfy.cli_args import args

from .. import kernels

LARGEST = 128 << 20
"""Bytes that one text encoder may keep: eight prompts of Bonsai Image 4B."""


class TextStates:
    """{what was asked: what came out}, the oldest unused first. limit: bytes."""

    def __init__(self, limit: int = LARGEST) -> None:
        self.limit = limit
        self._kept: dict[Hashable, Any] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self._kept.values()))

    def get(self, key: Hashable) -> Any:
        """A copy of what was kept, which the caller may change; None without."""
        if key not in self._kept:
            return None
        self._kept[key] = self._kept.pop(key)
        return _copied(self._kept[key])

    def put(self, key: Hashable, value: Any) -> None:
        """Keeps a copy; nothing of what is larger than the limit by itself."""
        if _nbytes(value) > self.limit:
            return
        self._kept.pop(key, None)
        self._kept[key] = _copied(value)
        while self.nbytes > self.limit:
            del self._kept[next(iter(self._kept))]


class RememberingCLIP(comfy.sd.CLIP):
    """ComfyUI's CLIP that encodes a prompt once.

    A prompt that is known does not even bring the text encoder to the GPU. Clones, which carry what LoRAs and hooks
    change, are ComfyUI's own and keep nothing; nor is anything kept with --cache-none, nor of textual inversions.
    """

    def __init__(self, clip: comfy.sd.CLIP) -> None:
        """Takes the place of a CLIP that was just made."""
        super().__init__(no_init=True)
        vars(self).update(vars(clip))
        self._states = TextStates()

    def encode_from_tokens(self, tokens: dict, return_pooled: bool | str = False, return_dict: bool = False) -> Any:
        """As comfy.sd.CLIP's; tensors are the caller's own."""
        key = self._key(tokens, return_pooled, return_dict)
        found = None if key is None else self._states.get(key)
        if found is not None:
            return found
        with kernels.keeping_memory():
            found = super().encode_from_tokens(tokens, return_pooled, return_dict)
        self.patcher.give_back_pages()
        if key is not None:
            self._states.put(key, found)
        return found

    def _key(self, tokens: Mapping[str, Any], *asked: bool | str) -> Hashable | None:
        """All that the result depends on; None if it is not to be kept."""
        patcher = self.patcher
        if args.cache_none or patcher.forced_hooks is not None:
            return None
        rows = _plain(tokens)
        return None if rows is None else (rows, *asked, self.layer_idx, id(patcher), patcher.patches_uuid)


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
