"""Remove the guards against known traps one by one: python -m tests.guards [--only TRAP ..] [--jobs N] [--why].

Each guard of guard_table.py is taken away in a process of its own, and the test of its trap must then fail. Nothing is
written. Prints a table; the exit code is 1 if a removal goes unnoticed, 2 if a test fails already without one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bonsai_ops.tools.environment import COMFYUI_VERSIONS, PLUGIN, clean_environment, ensure_or_exit, home

from .guard_table import GUARDS

MODEL_TESTS = "tests/host/model"
AS_IS = -1
"""In place of a guard's number: nothing is removed."""
RESULT = "guard result: "
"""Before the JSON of a Result in the output of removal.py."""
UNNOTICED, BROKEN = 1, 2
TAIL = 30
"""Lines of the output of a run that came to nothing."""
CAN_FORK = sys.platform == "linux"


@dataclass(frozen=True)
class Result:
    """What a run did. guard: its number or AS_IS; why: a line for each test that failed; output: all about them.

    error: why the run came to nothing, else empty.
    """

    guard: int
    why: Sequence[str] = ()
    output: str = ""
    error: str = ""

    @property
    def caught(self) -> bool:
        return bool(self.why) and not self.error


def main(argv: Sequence[str] | None = None) -> int:
    """Tests every chosen guard; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.guards", description=__doc__.split("\n")[0])
    traps = sorted({guard.trap for guard in GUARDS})
    parser.add_argument("--only", nargs="+", metavar="TRAP", choices=traps, help="only these traps, such as 05 12 lora")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="tests at a time")
    parser.add_argument("--why", action="store_true", help="print how each test failed")
    arguments = parser.parse_args(argv)
    chosen = [n for n, g in enumerate(GUARDS) if not arguments.only or g.trap in arguments.only]
    environment = ensure_or_exit(tests=True, versions=COMFYUI_VERSIONS)
    comfyui = os.environ.get("BONSAI_COMFYUI") or str(environment.comfyui)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bonsai-guards-") as temporary:
        runner = _Runner(environment.python, comfyui, Path(temporary))
        with contextlib.closing(runner.results(chosen, max(1, arguments.jobs))) as results:
            code, caught = _show(chosen, results, arguments.why)
    if code != BROKEN:
        print(f"{caught} of {len(chosen)} removals caught on ComfyUI in {comfyui}, {time.monotonic() - started:.0f} s")
    return code


def _show(chosen: Sequence[int], results: Iterator[Result], why: bool) -> tuple[int, int]:
    """Prints the table in the order of `chosen`; returns (exit code, removals caught)."""
    found: dict[int, Result] = {}
    waiting = list(chosen)
    for result in results:
        if result.guard != AS_IS:
            found[result.guard] = result
        elif result.why or result.error:
            print(result.output or result.error)
            print("These tests fail without any guard removed: repair that first.", file=sys.stderr)
            return BROKEN, 0
        while waiting and waiting[0] in found:
            _print_row(found[waiting.pop(0)], why)
    caught = sum(result.caught for result in found.values())
    return (0 if caught == len(chosen) else UNNOTICED), caught


def _print_row(result: Result, why: bool) -> None:
    guard = GUARDS[result.guard]
    print(f"{guard.trap:5} {guard.name:38} {guard.test:75} {'yes' if result.caught else 'NO'}", flush=True)
    if why or result.error:
        print(textwrap.indent("\n".join([*result.why[:1], result.error]).strip(), "      "), flush=True)


@dataclass(frozen=True)
class _Runner:
    """Starts removal.py on guards. Temporary files of the tests go to `temporary`."""

    python: Path
    comfyui: str
    temporary: Path

    def results(self, guards: Sequence[int], jobs: int) -> Iterator[Result]:
        """A result for each guard and some AS_IS, which together ran all tests, as they arrive."""
        tests = {number: GUARDS[number].test for number in guards}
        if CAN_FORK:
            shares = [guards[job::jobs] for job in range(min(jobs, len(guards)))]
            batches = [([AS_IS, *share], {tests[number] for number in share}) for share in shares]
        else:
            batches = [([AS_IS], set(tests.values())), *(([number], {tests[number]}) for number in guards)]
        arrived: queue.SimpleQueue[Result] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(jobs)
        try:
            for runs, names in batches:
                pool.submit(self._run, runs, sorted(names), arrived.put)
            for _ in range(sum(len(runs) for runs, _ in batches)):
                yield arrived.get()
        finally:
            pool.shutdown(cancel_futures=True)

    def _run(self, runs: Sequence[int], tests: Sequence[str], report: Callable[[Result], None]) -> None:
        """Reports a result for each of the runs, in one process of pytest."""
        command = [str(self.python), "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "tests.removal"]
        command += [
            f"--basetemp={self.temporary / '_'.join(map(str, runs))}",
            *(f"--guard={number}" for number in runs),
        ]
        command += [f"{MODEL_TESTS}/{test}" for test in tests]
        variables = {
            "BONSAI_HOME": str(home()),
            "BONSAI_COMFYUI": self.comfyui,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        missing, output = list(runs), []
        try:
            with subprocess.Popen(
                command,
                cwd=PLUGIN,
                env=clean_environment(variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as process:
                for line in process.stdout:
                    if line.startswith(RESULT):
                        result = Result(**json.loads(line.removeprefix(RESULT)))
                        missing.remove(result.guard)
                        report(result)
                    else:
                        output.append(line)
        finally:
            for number in missing:
                report(Result(number, error="".join(output[-TAIL:])))


if __name__ == "__main__":
    sys.exit(main())
