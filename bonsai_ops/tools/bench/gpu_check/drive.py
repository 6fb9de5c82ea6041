"""Starts the stages one after another, each with a time limit, and gathers their figures."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ...environment import (
    PLUGIN,
    comfyui_version,
    find_comfyui_or_exit,
    inherited_environment,
    module_command,
    relaunch_in_own,
)
from . import summary
from .check import Settings
from .results import Results
from .stages import STAGES, USUAL, Process, Stage
from .unpack import ARCHIVES, COMFYUI

BUDGET = 330
"""Seconds for all stages on an H100 or H200, which the limits of the stages are made for."""
LEAST = 15
"""Seconds that must be left of the budget for a stage to begin."""
SHOWN = 8
"""Last lines of a stage that failed."""
GPU_BYTES_OF_A_PROCESS = 6e9
"""What processes that run side by side may take each."""
WORK, COLD = "bonsai-gpu-check", "triton-cold"


def run(arguments: Namespace, given: Sequence[str]) -> int:
    """Runs the stages that the command line `given` asks for; 0 if every process ended by itself without an error."""
    comfyui = find_comfyui_or_exit(arguments.comfyui, (ARCHIVES[COMFYUI],))
    relaunch_in_own("bonsai_ops.bench", given, comfyui)
    settings = _settings(arguments, comfyui)
    names = _stages(arguments.stages)
    if settings.device != "cpu":
        from ..timer import require_gpu

        require_gpu()
    facts = _facts(settings)
    results = Results(settings.out / "results.json", facts, arguments.again)
    kept = () if arguments.again else tuple(name for name in names if results.has(name))
    started, failed = time.monotonic(), False
    with (settings.out / "log.txt").open("a", encoding="utf-8") as log:
        for name in names:
            left = arguments.budget - (time.monotonic() - started)
            if name in kept:
                print(f"== {name}: done before, --again measures it anew", flush=True)
                continue
            if left < LEAST:
                print(f"== {name}: left out, {left:.0f} s left", flush=True)
                continue
            begun = time.monotonic()
            limit = min(STAGES[name].seconds * max(1.0, arguments.budget / BUDGET), left)
            done = _run(STAGES[name], settings, limit, log, _at_once(facts))
            failed = failed or any(figures["ended"] != "ok" for figures in done.values())
            results.add({**done, f"{name}_wall_s": round(time.monotonic() - begun, 1)})
            (settings.out / "summary.md").write_text(summary.page(results.figures), encoding="utf-8")
    print(f"all in {time.monotonic() - started:.0f} s: {settings.out / 'summary.md'}; packs are in {settings.work}")
    return 1 if failed else 0


def _settings(arguments: Namespace, comfyui: Path) -> Settings:
    if arguments.out is None:
        raise SystemExit("--gpu-check writes several files: name a folder for them with --out.")
    work = arguments.work or Path(tempfile.gettempdir()) / WORK
    for folder in (arguments.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    return Settings(arguments.out.resolve(), comfyui, work.resolve(), PLUGIN, arguments.device)


def _stages(asked: str | None) -> list[str]:
    names = asked.split(",") if asked else list(USUAL)
    if unknown := [name for name in names if name not in STAGES]:
        raise SystemExit(f"--stages {unknown[0]} is unknown, expected some of {','.join(STAGES)}")
    return names


def _facts(settings: Settings) -> dict[str, Any]:
    """The machine, as the benchmarks describe it, with the date and ComfyUI's version."""
    from .. import machine

    return {
        **machine.describe(None, settings.device),
        "device": settings.device,
        "comfyui": comfyui_version(settings.comfyui),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _at_once(facts: dict[str, Any]) -> int:
    """How many processes the GPU's memory takes at once."""
    return max(1, int(facts.get("gpu_memory", 1e12) // GPU_BYTES_OF_A_PROCESS))


def _run(stage: Stage, settings: Settings, limit: float, log: IO[str], at_once: int) -> dict[str, dict]:
    """{name: figures, and "ended": ok, exit N or timed out} of the processes of a stage.

    They run side by side, or in as many turns as `at_once` asks for, each turn within `limit` seconds.
    """
    results: dict[str, dict] = {}
    for first in range(0, len(stage.processes), at_once):
        begun = time.monotonic()
        started: dict[str, tuple[subprocess.Popen, IO[str]]] = {}
        try:
            for process in stage.processes[first : first + at_once]:
                started[process.name] = _launch(process, settings)
            for name, (child, file) in started.items():
                text, ended = _wait(child, file, limit - (time.monotonic() - begun))
                results[name] = {"ended": ended, **settings.read(name)}
                log.write(f"\n===== {name}: {ended}\n{text}\n")
                log.flush()
                _show(name, ended, time.monotonic() - begun, text.splitlines())
        finally:
            for child, _ in started.values():
                child.kill()  # nothing is left to end but after an interrupt
    return results


def _show(name: str, ended: str, seconds: float, lines: list[str]) -> None:
    print(f"== {name}: {ended} {seconds:.0f} s", flush=True)
    print(*(line for line in lines if line.startswith("> ")), sep="\n", flush=True)
    if ended != "ok":
        print("\n".join(lines[-SHOWN:])[-1500:], flush=True)


def _launch(process: Process, settings: Settings) -> tuple[subprocess.Popen, IO[str]]:
    """(a child that runs one process, the file it prints to)."""
    settings.file(process.name, ".json").unlink(missing_ok=True)
    variables = {**inherited_environment(), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if process.cold:
        shutil.rmtree(settings.work / COLD, ignore_errors=True)
        variables["TRITON_CACHE_DIR"] = str(settings.work / COLD)
    command = [*module_command(__package__), process.name, settings.text()]
    file = settings.file(process.name, ".log").open("w+", encoding="utf-8", errors="replace")
    child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=settings.project, env=variables)
    return child, file


def _wait(child: subprocess.Popen, file: IO[str], limit: float) -> tuple[str, str]:
    """(what it printed, how it ended); a child that takes longer than `limit` seconds is ended."""
    try:
        code = child.wait(max(1, limit))
        ended = "ok" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        ended = "timed out"
    with file:
        file.seek(0)
        return file.read(), ended
