"""stable-diffusion.cpp's sd-cli: one picture of it, timed by its own log."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..environment import clean_environment
from .energy import Energy
from .machine import reset_peak_rss

ERROR_CHARACTERS = 3000
PARTS = {
    "text_encoder_s": "get_learned_condition completed",
    "steps_s": "sampling completed",
    "vae_s": "decode_first_stage completed",
}
"""What sd-cli logs when a part is done, each followed by `, taking 12.34s` or, earlier, `, taking 1234 ms`."""
LOADED = "loading tensors completed"


@dataclass(frozen=True)
class Sdcpp:
    """sd-cli and its files. `arguments`: further ones, such as --diffusion-fa."""

    program: Path
    model: Path
    llm: Path
    vae: Path
    arguments: tuple[str, ...] = ()

    def command(self, prompt: str, size: tuple[int, int], steps: int, threads: int, output: Path) -> list[str]:
        """The command for one picture of (width, height); options as its docs/flux2.md and --help give them."""
        options = {
            "--diffusion-model": self.model,
            "--llm": self.llm,
            "--vae": self.vae,
            "--prompt": prompt,
            "--cfg-scale": 1.0,
            "--steps": steps,
            "--sampling-method": "euler",
            "--seed": 0,
            "--width": size[0],
            "--height": size[1],
            "--threads": threads,
            "--output": output,
        }
        return [str(part) for pair in ((self.program,), *options.items(), self.arguments) for part in pair] + ["-v"]


def sdcpp_of(arguments: argparse.Namespace) -> Sdcpp | None:
    """What --sdcpp and its options describe, None without them. Ends the program if one is missing."""
    if arguments.sdcpp is None:
        return None
    files = {name: getattr(arguments, f"sdcpp_{name}") for name in ("model", "llm", "vae")}
    missing = [f"--sdcpp-{name}" for name, file in files.items() if file is None]
    if missing:
        raise SystemExit(f"--sdcpp also needs {', '.join(missing)}")
    for file in (arguments.sdcpp, *files.values()):
        if not file.is_file():
            raise SystemExit(f"{file} is not there: --sdcpp and its options name files")
    return Sdcpp(arguments.sdcpp, **files, arguments=tuple(arguments.sdcpp_argument))


def run_sdcpp(sdcpp: Sdcpp, prompt: str, size: tuple[int, int], steps: int, threads: int, energy: Energy) -> dict:
    """Runs sd-cli for one picture; its row. Raises SystemExit if it cannot be run or its log is not understood."""
    with tempfile.TemporaryDirectory() as temporary:
        command = sdcpp.command(prompt, size, steps, threads, Path(temporary) / "picture.png")
        text, measured = run_alone(command, energy)
    return {**parse_log(text, steps), **measured}


def run_alone(command: Sequence[str], energy: Energy, variables: Mapping[str, str] | None = None) -> tuple[str, dict]:
    """(what a program prints, {"whole_s", "processor_s", "joules", "no_joules", "peak_bytes"}) from start to end.

    variables: further ones of its environment. On Linux peak_bytes is at least what this process holds now. Raises
    SystemExit if it fails.
    """
    with tempfile.TemporaryFile() as log:

        def run() -> tuple[int, dict]:
            reset_peak_rss()  # Linux begins a child's count with what its parent held at most
            process = subprocess.Popen(
                command,
                env=clean_environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            return _wait(process)

        try:
            (code, used), measured = energy.around(run)
        except OSError as error:
            raise SystemExit(f"{command[0]} cannot be run: {error}") from None
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    if code:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with code {code}:\n{text[-ERROR_CHARACTERS:]}")
    return text, {**measured, **used}


def _wait(process: subprocess.Popen) -> tuple[int, dict]:
    """(exit code, {"processor_s", "peak_bytes"}) of a child: None and 0 where the system does not tell."""
    if not hasattr(os, "wait4"):
        return process.wait(), {"processor_s": None, "peak_bytes": 0}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
    return process.returncode, {"processor_s": usage.ru_utime + usage.ru_stime, "peak_bytes": peak}


def parse_log(text: str, steps: int) -> dict:
    """{"load_s", "text_encoder_s", "steps_s", "step_s", "vae_s"} from sd-cli's log; step_s: average seconds a step.

    The format is that of what stable-diffusion-cpp-python 0.4.7 carries, and of its source of August 2026: a line
    `[INFO ] file:line - <part> completed, taking 36.10s` a part, seconds or ` ms`, and a progress bar
    `| 4/4 - 65.60s/it`, rewritten in place with carriage returns. Where a part is logged more than once the last
    counts. Raises SystemExit if a part is missing.
    """
    row: dict = {}
    for part, words in {"load_s": LOADED, **PARTS}.items():
        found = re.findall(rf"{re.escape(words)}, taking ([0-9.]+) ?(ms|s)\b", text)
        if not found:
            raise SystemExit(
                f"sd-cli's log has no line `{words}, taking ..`: this benchmark reads the log of stable-diffusion.cpp "
                f"from January to August 2026. The log ends:\n{text[-ERROR_CHARACTERS:]}"
            )
        value, unit = found[-1]
        row[part] = float(value) / (1000 if unit == "ms" else 1)
    counts = re.findall(r"\| *(\d+)/(\d+) - [0-9.]+(?:s/it|it/s)", text)
    row["step_s"] = row["steps_s"] / (int(counts[-1][1]) if counts else steps)
    return row
