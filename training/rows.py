"""What a stage measured: rows by name in a JSON file, and beside them what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bonsai_ops.tools.bench.machine import describe

MACHINE = "machine"
"""Key of the file, beside the rows: processor, threads, torch and commit of the rows added last."""


class Rows(dict[str, Any]):
    """The rows that a file has, none if there is no file."""

    def __init__(self, file: Path) -> None:
        super().__init__(read(file) if file.is_file() else {})
        self._file = file

    def add(self, name: str, row: Mapping) -> None:
        """Adds a row and writes the file, whole or not at all."""
        self[name] = row
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({**self, MACHINE: describe()}, indent=1), encoding="utf-8")
        part.replace(self._file)


def read(file: Path) -> dict[str, Any]:
    """The rows of a file alone, whether or not it says what they were measured on."""
    return {name: row for name, row in json.loads(file.read_text(encoding="utf-8")).items() if name != MACHINE}
