"""A skipped test where all have to be run: tests/conftest.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bonsai_ops.tools.environment import PLUGIN

SKIPS = """
import pytest

def test_runs():
    pass

{0}
"""
IN_A_TEST = "def test_skipped():\n    pytest.skip({!r})"
WHOLE_FILE = "pytest.skip({!r}, allow_module_level=True)"


@pytest.mark.parametrize(
    ("how", "reason", "options", "code"),
    [
        (IN_A_TEST, "no disk", ["--no-skips"], 1),
        (IN_A_TEST, "no disk", ["--no-skips", "-n1"], 1),
        (WHOLE_FILE, "no disk", ["--no-skips", "-n1"], 1),
        (IN_A_TEST, "no disk", [], 0),
        (IN_A_TEST, "this user writes anywhere", ["--no-skips"], 0),
    ],
)
def test_a_skip_where_none_may_be(how: str, reason: str, options: list[str], code: int, tmp_path: Path) -> None:
    path, passes = tmp_path / "test_one.py", tmp_path / "test_two.py"
    path.write_text(SKIPS.format(how.format(reason)))
    passes.write_text(SKIPS.format(""))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", *options]
    command += ["--confcutdir=tests", str(path), str(passes), "tests/unit/test_skips.py", "--deselect"]
    command += ["tests/unit/test_skips.py"]
    done = subprocess.run(command, cwd=PLUGIN, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("SKIPPED WHERE NONE MAY BE" in done.stdout) == bool(code) and f": {reason}" in done.stdout
