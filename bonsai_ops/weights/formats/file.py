"""What every opened file has, whatever its container: a path, the endings of such files and one way to refuse it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..errors import PackError
from ..releases import Census


class PackFile:
    """An opened file. Subclasses read the header in `__init__`, raise PackError for a damaged one and map the rest.

    mapped: tensors may be of the file's own pages; else each is a copy, and nothing of the file is needed afterwards.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, mapped: bool = True) -> None:
        self.path, self.mapped = path, mapped

    def names(self) -> Collection[str]:
        """The names of its tensors, those of nested tables with dots between."""
        return ()

    def said(self) -> Mapping[str, Any]:
        """What it says of itself beside tensors: {name: plain value}."""
        return {}

    def error(self, found: str, cure: str, key: str | None = None) -> PackError:
        """The error to raise for this file, or for its tensor `key`."""
        return PackError(self.path, found, cure, key)

    def census(self) -> Census:
        """What its header says of it."""
        return Census()
