"""What every opened file has, whatever its container: a path, the endings of such files and one way to refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..errors import PackError


class PackFile:
    """An opened file. Subclasses read the header in `__init__`, raise PackError for a damaged one and map the rest."""

    SUFFIXES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, found: str, cure: str, key: str | None = None) -> PackError:
        """The error to raise for this file, or for its tensor `key`."""
        return PackError(self.path, found, cure, key)
