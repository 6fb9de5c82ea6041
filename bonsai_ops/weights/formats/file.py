"""What every opened file has, whatever its container: a path, the endings of such files and one way to refuse it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from ..errors import PackError
from ..files import file_size, not_its_fault, unreadable
from ..releases import Census
from ..stand_in import refuse_stand_ins

MAX_SAID = 4096
"""What it may say of itself beside them, one by one."""
MAX_TENSORS = 20_000
"""What a file may hold; the text encoder of the MLX releases has 904."""


class PackFile:
    """An opened file. Subclasses read the header in `__init__`, raise PackError for a damaged one and map the rest.

    What is no file, or may not be read, is refused before it is opened. size: its bytes, which no header may exceed.

    mapped: tensors may be of the file's own pages; else each is a copy, and nothing of the file is needed afterwards.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = ()
    READ_WHOLE: ClassVar[bool] = False
    """Whether opening one that is not mapped reads all of it."""

    def __init__(self, path: Path, mapped: bool = True) -> None:
        self.path, self.mapped, self.size = path, mapped, file_size(path)
        refuse_stand_ins(path)

    def names(self) -> Collection[str]:
        """The names of its tensors, those of nested tables with dots between."""
        return ()

    def said(self) -> Mapping[str, Any]:
        """What it says of itself beside tensors: {name: plain value}."""
        return {}

    def require_few(self, tensors: int) -> None:
        """Raises PackError for more tensors than a model has."""
        if tensors > MAX_TENSORS:
            raise self.error(f"has {tensors} tensors", f"Expected a model, which has at most {MAX_TENSORS}.")

    def require_few_words(self, entries: int) -> None:
        """Raises PackError for more metadata than a model has."""
        if entries > MAX_SAID:
            raise self.error(f"has {entries} entries of metadata", f"Expected at most {MAX_SAID}.")

    def read_bytes(self, stream: BinaryIO, start: int, size: int, name: str) -> torch.Tensor:
        """u8 [size], copied out of an open file. Raises PackError where that has become shorter.

        There a mapping would end the process (bus error).
        """
        held = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(held.numpy()), 0
        try:
            stream.seek(start)
            while done < size and (got := stream.readinto(view[done:])):
                done += got
        except OSError as error:
            raise unreadable(self.path, error) from error
        if done < size:
            raise self.error("ends here, and did not when it was opened", "Wait until it is all there.", name)
        return held

    def unopened(self, error: Exception, found: str, cure: str) -> PackError:
        """The error for a file that a library could not open, `found` where neither machine nor place is to blame."""
        if isinstance(error, OSError):
            return unreadable(self.path, error)
        return not_its_fault(self.path, error) or self.error(found, cure)

    def error(self, found: str, cure: str, key: str | None = None) -> PackError:
        """The error to raise for this file, or for its tensor `key`."""
        return PackError(self.path, found, cure, key)

    def census(self) -> Census:
        """What its header says of it."""
        return Census()
