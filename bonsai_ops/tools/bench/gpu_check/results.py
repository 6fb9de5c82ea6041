"""results.json: what the stages found, on which machine and commit, kept from one run to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .stages import STAGES

RUN = "run"
"""The key of the facts about the run."""
SAME = ("commit", "device", "gpu", "torch")
"""Facts that two runs must share for their figures to stand in one file."""


class Results:
    """{process: figures, stage_wall_s: seconds, "run": facts} in `file`, on the disk after each change."""

    def __init__(self, file: Path, facts: Mapping[str, Any], again: bool) -> None:
        """Goes on with what the file has. again: figures of another machine or commit are given up.

        Raises SystemExit where they would be mixed.
        """
        self.file = file
        self.figures: dict[str, Any] = _read(file)
        before = self.figures.get(RUN, {})
        if other := [name for name in SAME if before and before.get(name) != facts.get(name)]:
            if not again:
                told = ", ".join(f"{name} {before.get(name)}, not {facts.get(name)}" for name in other)
                raise SystemExit(f"{file} holds figures of {told}: name another folder, or begin anew with --again.")
            self.figures = {}
        self.figures[RUN] = dict(facts)

    def has(self, stage: str) -> bool:
        """Whether every process of the stage has come to its end."""
        return all(self.figures.get(p.name, {}).get("ended") == "ok" for p in STAGES[stage].processes)

    def add(self, figures: Mapping[str, Any]) -> None:
        """Writes them down."""
        self.figures |= figures
        self.file.with_suffix(".tmp").write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
        self.file.with_suffix(".tmp").replace(self.file)


def _read(file: Path) -> dict[str, Any]:
    """What a run has left, {} without one. Raises SystemExit for another file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found[RUN], dict) else {}
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{file} is not what a GPU check writes: name another folder with --out.") from None
