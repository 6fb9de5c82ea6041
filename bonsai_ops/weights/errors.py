"""The one error a user sees for a file that cannot be used."""

from __future__ import annotations

from pathlib import Path


class PackError(ValueError):
    """A pack that cannot be used. The message names file, key, what was found, what was expected and the cure."""

    def __init__(self, path: Path | str, found: str, cure: str, key: str | None = None) -> None:
        place = f"{path}: {key}" if key else str(path)
        super().__init__(f"{place}: {found}. {cure}")
        self.path = Path(path)
        self.key = key
