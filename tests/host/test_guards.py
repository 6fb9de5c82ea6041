"""`python -m tests.guards` notices each guard that is removed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from guard_table import GUARDS

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_TESTS = Path(__file__).resolve().parent / "model"
WITHOUT_FORK = "from tests import guards; guards.CAN_FORK = False; raise SystemExit(guards.main(['--only', '08']))"


def functions(file: Path) -> dict[str, str]:
    """{function of a source file: its docstring}."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}


def rows(*command: str) -> list[str]:
    """The traps whose removed guards a run of guards.py caught, one for each guard."""
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^(\w+) .*::test_\w+ +yes$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_removed_guards_are_noticed(comfyui_path: Path) -> None:
    """Every removal, each in a process of its own."""
    assert rows("-m", "tests.guards") == [guard.trap for guard in GUARDS]


@pytest.mark.slow
def test_removed_guards_are_noticed_without_fork(comfyui_path: Path) -> None:
    """As on Windows and macOS, where each process imports everything."""
    assert rows("-c", WITHOUT_FORK) == ["08"]


def test_every_guard_finds_its_place(comfyui_path: Path) -> None:
    """What the table names is in the code and among the tests."""
    modules = {guard.module_name: importlib.import_module(guard.module_name) for guard in GUARDS}
    for guard in GUARDS:
        guard.find(modules[guard.module_name])
        file, _, function = guard.test.partition("::")
        known = functions(MODEL_TESTS / file)
        assert function in known, guard
        assert not guard.trap.isdigit() or known[function].startswith(f"Trap {guard.trap}. "), guard
    for change in ({"place": "renamed"}, {"place": "PackedLinear.renamed"}, {"again": "renamed"}):
        with pytest.raises(LookupError, match="describe it anew"):
            replace(GUARDS[0], **change).find(modules[GUARDS[0].module_name])


def test_every_trap_has_a_guard() -> None:
    """The table names the twenty traps of the list."""
    assert {f"{number:02}" for number in range(1, 21)} <= {guard.trap for guard in GUARDS}
