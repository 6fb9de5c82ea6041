"""The form of a message about a file: its name, what was found, the cure, its path."""

from __future__ import annotations

from pathlib import Path


def reason(message: object, path: Path) -> str:
    """What an error says of a file in a folder: all between its name, with which it begins, and its path, the end."""
    text, begin, end = str(message), f"{path.name}: ", f" ({path})"
    assert text.startswith(begin) and text.endswith(end), text
    said = text[len(begin) : -len(end)]
    assert str(path) not in said, f"the path stands twice in: {text}"
    return said
