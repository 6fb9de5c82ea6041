"""Reading the small JSON files that stand beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import PackError


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises PackError for a file that holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PackError(path, f"is not JSON ({error})", "Download it again.") from error


def is_count(value: object) -> bool:
    """True for a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
