"""Starts the stages one after another, each with a time limit, and gathers their figures."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from ...environment import PLUGIN
from . import comfyui
from .check import Check, Settings
from .stages import PROCESSES, STAGES, USUAL, Process, Stage

LEAST = 15
"""Seconds that must be left of the budget for a stage to begin."""
SHOWN = 8
"""Last lines of a stage that failed."""


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen stages; 0 if every process ended by itself without an error."""
    arguments = _parser().parse_args(argv)
    settings = Settings(
        arguments.out.resolve(), arguments.comfyui.resolve(), arguments.work.resolve(), PLUGIN, arguments.device
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    if arguments.process:
        return _child(PROCESSES[arguments.process], settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    started, results, failed = time.monotonic(), {}, False
    with (settings.out / "log.txt").open("w", encoding="utf-8") as log:
        for name in arguments.stages.split(","):
            left = arguments.budget - (time.monotonic() - started)
            if left < LEAST:
                print(f"== {name}: left out, {left:.0f} s left", flush=True)
                continue
            begun = time.monotonic()
            done = _run(STAGES[name], settings, min(STAGES[name].seconds * arguments.slower, left), log)
            failed = failed or any(figures["ended"] != "ok" for figures in done.values())
            results |= {**done, f"{name}_wall_s": round(time.monotonic() - begun, 1)}
            (settings.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"all in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bonsai_ops.tools.bench.gpu_check",
        description=sys.modules[__package__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, log.txt and pictures")
    parser.add_argument("--comfyui", type=Path, default=Path("/tmp/comfyui"), help="folder that holds main.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", default=",".join(USUAL), help="of " + ",".join(STAGES))
    parser.add_argument("--budget", type=float, default=330, help="seconds for all stages")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_check"), help="folder for packs and logs")
    parser.add_argument("--slower", type=float, default=1, help="multiplies the time limits")
    parser.add_argument("--process", choices=tuple(PROCESSES), help=argparse.SUPPRESS)
    return parser


def _run(stage: Stage, settings: Settings, limit: float, log: IO[str]) -> dict[str, dict]:
    """{name: figures, and "ended": ok, exit N or timed out} of the processes of a stage, which run side by side."""
    begun = time.monotonic()
    started = {process.name: _launch(process, settings) for process in stage.processes}
    results = {}
    for name, (child, file) in started.items():
        text, ended = _wait(child, file, limit - (time.monotonic() - begun))
        results[name] = {"ended": ended, **settings.read(name)}
        log.write(f"\n===== {name}: {ended}\n{text}\n")
        log.flush()
        print(f"== {name}: {ended} {time.monotonic() - begun:.0f} s", flush=True)
        lines = text.splitlines()
        print(*(line for line in lines if line.startswith("> ")), sep="\n", flush=True)
        if ended != "ok":
            print("\n".join(lines[-SHOWN:])[-1500:], flush=True)
    return results


def _launch(process: Process, settings: Settings) -> tuple[subprocess.Popen, IO[str]]:
    """(a child that runs one process, the file it prints to)."""
    settings.file(process.name, ".json").unlink(missing_ok=True)
    options = {
        "--process": process.name,
        "--out": settings.out,
        "--comfyui": settings.comfyui,
        "--work": settings.work,
        "--device": settings.device,
    }
    command = [sys.executable, "-B", "-u", "-m", __package__, *(str(part) for pair in options.items() for part in pair)]
    file = settings.file(process.name, ".log").open("w+", encoding="utf-8", errors="replace")
    return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=settings.project), file


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


def _child(process: Process, settings: Settings) -> int:
    """Runs one process to its end; does not come back if nothing was raised."""
    if process.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        settings = replace(settings, device="cpu", asked=settings.device)
    check = Check(process.name, settings)
    if process.comfyui:  # before anything imports torch: ComfyUI sets its allocator
        check.start(lambda: comfyui.start(settings.comfyui, settings.device, process.comfyui == "dynamic"))
    importlib.import_module(f"{__package__}.{process.module}").run(check, process.part)
    sys.stdout.flush()
    os._exit(0)  # nothing that a library does at exit may look like a failure of the stage


if __name__ == "__main__":
    raise SystemExit(main())
