"""The part of guards.py inside pytest, a plugin: runs the collected tests once for each --guard, without that guard.

Several runs are forks of this process, in which ComfyUI and the plugin are imported already; a single one is this
process. Prints a line a run: RESULT and the fields of a Result as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from .guard_table import GUARDS, Guard
from .guards import AS_IS, RESULT, Result

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--guard", type=int, action="append", help="number of the guard to remove; -1: none")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Runs(config.getoption("--guard")))


class _Runs:
    """The runs of one session."""

    def __init__(self, guards: list[int]) -> None:
        self.guards = guards
        self.failed: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        importlib.import_module("comfy.sd")
        importlib.import_module("nodes")
        for guard in GUARDS:
            importlib.import_module(guard.module_name)
        if len(self.guards) == 1:
            print(_line(self._run(session, self.guards[0])), flush=True)
            return True
        for number in self.guards:
            error = _in_fork(lambda number=number: self._run(session, number))
            if error:
                print(_line(Result(number, error=error)), flush=True)
        return True

    def _run(self, session: pytest.Session, number: int) -> Result:
        """All tests as they are, or those of a guard until one fails without it."""
        items = session.items
        if number != AS_IS:
            guard = GUARDS[number]
            try:
                remove(guard)
            except LookupError as error:
                return Result(number, error=str(error))
            items = [item for item in items if item.nodeid.partition("[")[0].endswith(f"/{guard.test}")]
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed and number != AS_IS:
                break
        why = [str(getattr(report.longrepr, "reprcrash", report.longrepr)) for report in self.failed]
        return Result(number, why, "\n".join(report.longreprtext for report in self.failed), "" if items else "no test")


def remove(guard: Guard) -> None:
    """Takes the guard out of its module and, as soon as it runs, out of any other that is made from the same file."""
    guard.remove(importlib.import_module(guard.module_name))
    if guard.file is None:
        return
    file, execute = REPOSITORY / guard.file, SourceFileLoader.exec_module

    def exec_module(loader: SourceFileLoader, module: ModuleType) -> None:
        execute(loader, module)
        if Path(loader.path).resolve() == file:
            guard.remove(module)

    SourceFileLoader.exec_module = exec_module


def _line(result: Result) -> str:
    return f"\n{RESULT}{json.dumps(asdict(result))}"


def _in_fork(run: Callable[[], Result]) -> str:
    """Has a child print the result, and nothing else. Returns what went wrong if it did not."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _print_and_exit(run)
    _, status = os.waitpid(child, 0)
    return f"ended with status {os.waitstatus_to_exitcode(status)}" if status else ""


def _print_and_exit(run: Callable[[], Result]) -> NoReturn:
    code = 1
    try:
        stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        line = _line(run())
        with open(stdout, "w", encoding="utf-8") as file:
            print(line, file=file)
        code = 0
    except Exception as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)
