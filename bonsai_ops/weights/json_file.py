"""Reading JSON that comes with weights: the small files beside them and the texts inside.

Whatever is in it: bounded in bytes and in depth, and every number is finite.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import PackError
from .files import file_size, unreadable

MAX_BYTES = 1 << 20
"""Of a JSON file beside weights and of a record; the longest of a release, a table of tensors, has 100 KB."""
MAX_VALUES = 50_000
MAX_DEPTH = 32
"""Levels of tables and lists in one another."""


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises PackError for a file that holds none, is too long or cannot be read."""
    try:
        return parse_json(read_small(path).decode("utf-8"))
    except PackError:
        raise
    except ValueError as error:
        raise PackError(path, f"is not JSON ({error})", "Download it again.") from error


def values_in(text: str | bytes) -> int:
    """About how many values a JSON text has."""
    return text.count("," if isinstance(text, str) else b",") + 1


def read_small(path: Path) -> bytes:
    """A file of at most MAX_BYTES and MAX_VALUES. Raises PackError before a longer one is read."""
    found = f"{file_size(path)} bytes"
    if file_size(path) <= MAX_BYTES:
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(raw) <= MAX_BYTES and values_in(raw) <= MAX_VALUES:
            return raw
        found = f"{len(raw)} bytes and {values_in(raw)} values"
    raise PackError(
        path,
        f"has {found}, too many for a description of weights",
        f"Expected at most {MAX_BYTES} bytes and {MAX_VALUES} values: download it again, or take it away if it belongs "
        "to another model.",
    )


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for a damaged one, NaN, infinity and more than MAX_DEPTH levels."""
    try:
        value = json.loads(text, parse_constant=_number, parse_float=_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = _inside([value])
    for _ in range(MAX_DEPTH):
        if not level:
            return value
        level = [inner for outer in level for inner in _inside(outer)]
    raise ValueError("it is nested too deeply")


def is_count(value: object) -> bool:
    """True for a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    """The tables and lists in one."""
    return [
        value for value in (outer.values() if isinstance(outer, dict) else outer) if isinstance(value, (dict, list))
    ]


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text[:20]}")
    return number
