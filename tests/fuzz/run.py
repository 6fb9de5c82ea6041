"""All cases, some processes at once, and the table of what came of them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch

from bonsai_ops.tools.environment import PLUGIN

from .case import Reader, Verdict, run_case
from .formats import FORMATS, Format

SHOWN_FAULTS = 40
TOLD = 1000
"""After so many cases more, how many ran is told."""
TESTS = PLUGIN / "tests"


def run(names: Sequence[str], cases: int, seed: str, first: int, workers: int) -> int:
    """Runs so many cases of the formats of those names, all if there are none; returns the exit code."""
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: unknown. The formats are {', '.join(FORMATS)}.")
    chosen = {name: FORMATS[name] for name in names or FORMATS}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bonsai-fuzz-") as scratch:
        seeds = _seeds(chosen, Path(scratch))
        each = -(-cases // len(chosen))
        todo = [(name, number) for number in range(first, first + each) for name in chosen]
        started, found = time.monotonic(), []
        shared = (chosen, seeds, Path(scratch), seed)
        pipes = [begin(functools.partial(_worker, i, todo[i::workers], *shared)) for i in range(workers)]
        ended = collect(pipes, found)
    if len(found) < len(todo):
        print(f"{len(todo) - len(found)} cases did not run: {ended}.")
    return _report(found, chosen, seed, time.monotonic() - started) or int(len(found) < len(todo))


def begin(work: Callable[[TextIO], None]) -> tuple[int, int]:
    """(what the lines that `work` prints are read from, its process), forked.

    That leads a group of its own: Ctrl-C of a terminal reaches `collect` alone, for Python forgets what comes in the
    midst of a fork.
    """
    out, into = os.pipe()
    child = os.fork()
    if child:
        os.close(into)
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(child, child)
        return out, child
    try:
        os.setpgid(0, 0)
        os.close(out)
        with os.fdopen(into, "w") as lines:
            work(lines)
    finally:
        os._exit(0)


def collect(pipes: Sequence[tuple[int, int]], found: list) -> str:
    """Adds what the workers of `begin` tell to `found` until they end; returns why they would before all is told.

    Ctrl-C ends them and whatever they forked, and what they told by then is reported.
    """
    why = "a worker ended"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(pipe)) for pipe, _ in pipes]
        while files:
            try:
                ready, _, _ = select.select(files, [], [])
                for file in ready:
                    if (line := file.readline()).endswith("\n"):
                        found.append(json.loads(line))
                        if len(found) % TOLD == 0:
                            print(f"{len(found)} cases", file=sys.stderr, flush=True)
                    else:
                        files.remove(file)
            except KeyboardInterrupt:
                why = "stopped"
                for _, child in pipes:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
    for _, child in pipes:
        os.waitpid(child, 0)
    return why


def _seeds(chosen: dict[str, Format], scratch: Path) -> dict[str, Path]:
    """A valid folder of each format, read once, so that what is imported late is there before anything forks."""
    if any(form.needs_comfyui for form in chosen.values()):
        _find_comfyui(scratch)
    folders = {}
    for name, form in chosen.items():
        folder = folders[name] = scratch / f"seed-{name}"
        folder.mkdir()
        form.write(folder)
        for mapped in (True, False):
            try:
                form.read(folder / form.target if form.target else folder, mapped)
            except ValueError as error:
                if name != "lora":  # which nobody can load as a model
                    raise SystemExit(f"The seed of {name} is not read: {error}") from error
    return folders


def _find_comfyui(scratch: Path) -> None:
    """Makes ComfyUI importable: its own names come first, on the processor, with no file of the user."""
    sys.path[:0] = [os.environ["BONSAI_COMFYUI"], str(PLUGIN), str(TESTS)]
    importlib.import_module("comfy.options").enable_args_parsing()
    kept, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(scratch)]
    importlib.import_module("comfy.cli_args")
    importlib.import_module("utils.extra_config")
    sys.argv = kept


def _worker(
    number: int,
    todo: Sequence[tuple[str, int]],
    chosen: dict[str, Format],
    seeds: dict[str, Path],
    scratch: Path,
    seed: str,
    lines: TextIO,
) -> None:
    """Runs its share of the cases and prints a line of JSON for each."""
    reader = Reader(chosen)
    try:
        own = scratch / f"worker-{number}"
        own.mkdir()
        for name, index in todo:
            verdict, how = run_case(reader, name, seeds[name], own, f"{seed}/{name}/{index}")
            print(json.dumps([name, index, how, vars(verdict)]), file=lines, flush=True)
    finally:
        reader.end()  # which may hang


def _report(found: list, chosen: dict[str, Format], seed: str, seconds: float) -> int:
    print(f"{len(found)} cases in {seconds:.0f} s, seed {seed}\n")
    print("| format | cases | read | refused | failed | slowest, s | most, MB |")
    print(f"|{' --- |' * 7}")
    faults = []
    for name in chosen:
        all_of = [(index, how, Verdict(**verdict)) for kind, index, how, verdict in found if kind == name]
        failed = [case for case in all_of if case[2].fault]
        read = sum(verdict.read for _, _, verdict in all_of)
        slowest, most = (max((getattr(v, k) for *_, v in all_of), default=0) for k in ("seconds", "megabytes"))
        refused = len(all_of) - read - len(failed)
        print(f"| {name} | {len(all_of)} | {read} | {refused} | {len(failed)} | {slowest:.2f} | {most:.0f} |")
        faults += [(name, *case) for case in failed]
    for name, index, how, verdict in faults[:SHOWN_FAULTS]:
        print(f"\npython -m tests.fuzz --cases 1 --format {name} --seed {seed} --first {index}    # {how}")
        print(f"  {verdict.fault}\n  {verdict.said}")
    return int(bool(faults))
