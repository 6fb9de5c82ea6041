"""Reading a torch pickle without running anything in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..device_errors import is_the_devices
from ..errors import PackError
from ..files import not_its_fault
from ..releases import Census, count
from .file import PackFile
from .torch_archive import read_archive
from .torch_pickle import ForeignNameError, require_plain

MAX_DEPTH = 8
TIMES_HELD = 2
"""How often the bytes of a file may stand in its tensors: an embedding may be the head too."""
DOWNLOAD_AGAIN = "It is damaged or its download was cut off: download it again."


class TorchFile(PackFile):
    """A pickled dict, `content`, its tensors mapped from disk. Only tensors and plain containers are unpickled.

    Raises PackError for any other file and for a pickle that holds or does anything else.
    """

    SUFFIXES = (".pt",)
    READ_WHOLE = True

    def __init__(self, path: Path, mapped: bool = True) -> None:
        super().__init__(path, mapped)
        if not zipfile.is_zipfile(path):
            raise self.error(
                f"is not a complete torch file ({self.size} bytes that do not end as a zip archive)", DOWNLOAD_AGAIN
            )
        self._require_plain()
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except pickle.UnpicklingError as error:
            # torch's text advises to switch its check off; only the name it objects to is passed on
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise self._foreign(name[1] if name else "") from error
        except Exception as error:  # damaged bytes surface as any exception of the unpickler
            if (fault := not_its_fault(path, error)) is not None:
                raise fault from error
            if is_the_devices(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise self.error(f"is not a readable torch file ({reason.rstrip('. ')})", DOWNLOAD_AGAIN) from error
        if not isinstance(content, dict):
            raise self.error(f"holds a {type(content).__name__}", "Expected a dict of tensors.")
        self.content: dict[Any, Any] = content
        self._require_dense()

    def names(self) -> Collection[str]:
        return [name for name, value in _leaves(self.content) if isinstance(value, torch.Tensor)]

    def said(self) -> Mapping[str, Any]:
        return {name: value for name, value in _leaves(self.content) if not isinstance(value, torch.Tensor)}

    def census(self) -> Census:
        return count((t.shape, t.dtype) for t in self.content.values() if isinstance(t, torch.Tensor))

    def _require_plain(self) -> None:
        """Raises PackError for an archive or a pickle that torch would not have written of tensors and plain values."""
        raw, storages = read_archive(self.path, self.size, self.error, DOWNLOAD_AGAIN)
        try:
            require_plain(raw, storages)
        except ForeignNameError as error:
            raise self._foreign(str(error)) from error
        except ValueError as error:
            raise self.error(f"is not a readable torch file ({error})", DOWNLOAD_AGAIN) from error

    def _foreign(self, name: str) -> PackError:
        return self.error(
            f"holds more than tensors and was not opened{f' (it names {name})' if name else ''}",
            "Only tensors are read from a pickle: get the pack from its publisher or use the MLX pack (safetensors).",
        )

    def _require_dense(self) -> None:
        """Raises PackError for a tensor that is more than its bytes in the file: a view that repeats or skips some."""
        held, leaves = 0, list(_leaves(self.content))
        self.require_few(len(leaves))
        for name, tensor in leaves:
            if not isinstance(tensor, torch.Tensor):
                continue
            held += tensor.nbytes
            if tensor.layout != torch.strided or not tensor.is_cpu or tensor.is_quantized or not _is_dense(tensor):
                raise self.error(
                    f"is a view of shape {list(tensor.shape)} and strides {list(tensor.stride())}",
                    f"Expected each value to be in the file once. {DOWNLOAD_AGAIN}",
                    name,
                )
            if max(tensor.nbytes, held // TIMES_HELD) > self.size:
                raise self.error(f"has {tensor.nbytes} bytes in a file of {self.size}", DOWNLOAD_AGAIN, name)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the values lie one after another, in any order of the dimensions: gemlite keeps codes transposed."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return not tensor.numel()
        expected *= length
    return True


def _leaves(table: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of nested dicts; a dict may hold itself, so they end at a depth."""
    for key, value in table.items():
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
