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
from ..releases import Census, count
from .file import PackFile

ENCRYPTED = 1
"""Bit of a zip member's flags."""
MAX_DEPTH = 8
DOWNLOAD_AGAIN = "It is damaged or its download was cut off: download it again."


class TorchFile(PackFile):
    """A pickled dict, `content`, its tensors mapped from disk. Only tensors and plain containers are unpickled.

    Raises PackError for any other file and for a pickle that holds or does anything else.
    """

    SUFFIXES = (".pt",)

    def __init__(self, path: Path, mapped: bool = True) -> None:
        super().__init__(path, mapped)
        if not zipfile.is_zipfile(path):
            size = path.stat().st_size
            raise self.error(
                f"is not a complete torch file ({size} bytes that do not end as a zip archive)", DOWNLOAD_AGAIN
            )
        self._require_stored()
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except pickle.UnpicklingError as error:
            # torch's text advises to switch its check off; only the name it objects to is passed on
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise self.error(
                f"holds more than tensors and was not opened{f' (it names {name[1]})' if name else ''}",
                "Only tensors are read from a pickle: get the pack from its publisher or use the MLX pack "
                "(safetensors).",
            ) from error
        except Exception as error:  # damaged bytes surface as any exception of the unpickler
            if is_the_devices(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise self.error(f"is not a readable torch file ({reason.rstrip('. ')})", DOWNLOAD_AGAIN) from error
        if not isinstance(content, dict):
            raise self.error(f"holds a {type(content).__name__}", "Expected a dict of tensors.")
        self.content: dict[Any, Any] = content

    def names(self) -> Collection[str]:
        return [name for name, value in _leaves(self.content) if isinstance(value, torch.Tensor)]

    def said(self) -> Mapping[str, Any]:
        return {name: value for name, value in _leaves(self.content) if not isinstance(value, torch.Tensor)}

    def census(self) -> Census:
        return count((t.shape, t.dtype) for t in self.content.values() if isinstance(t, torch.Tensor))

    def _require_stored(self) -> None:
        """Refuses members that torch would map as they lie although they are compressed or encrypted."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise self.error(f"is not a readable torch file ({str(error).rstrip('. ')})", DOWNLOAD_AGAIN) from error
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED:
                raise self.error(
                    "is compressed or encrypted: the file was zipped again",
                    "torch stores its members as they are: use the file as it was published.",
                    member.filename,
                )


def _leaves(table: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of nested dicts; a dict may hold itself, so they end at a depth."""
    for key, value in table.items():
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
