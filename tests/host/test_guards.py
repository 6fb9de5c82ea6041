"""`python -m tests.guards` notices a guard that was removed. Here for a few traps; the whole table takes minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
TRAPS = ("05", "12", "15", "20")


def test_removed_guards_are_noticed(comfyui_path: Path) -> None:
    """One removal for each of some traps, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.guards", "--only", *TRAPS], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\d\d ", line)]
    assert [row[:2] for row in rows] == list(TRAPS) and all(row.endswith("yes") for row in rows)


def test_every_trap_has_a_guard() -> None:
    """The table names the twenty traps of the list."""
    source = (REPOSITORY / "tests" / "guards.py").read_text(encoding="utf-8")
    assert {f"{n:02}" for n in range(1, 21)} <= set(re.findall(r'Guard\(\s*"(\d\d)"', source))
