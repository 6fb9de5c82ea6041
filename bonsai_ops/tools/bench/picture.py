"""A whole picture, part by part: text encoder, 4 steps, VAE decode; stable-diffusion.cpp beside it if it is given.

Everything has the published sizes (Qwen3 4B in MLX 4-bit, the 4B transformer, the full VAE) and random weights.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import session
from .energy import Energy, find_energy, per_hour
from .report import show_table

STEPS = 4
PARTS = ("text_encoder_s", "steps_s", "vae_s")
SDCPP_PARTS = {
    "text_encoder_s": "get_learned_condition completed",
    "steps_s": "sampling completed",
    "vae_s": "decode_first_stage completed",
}
"""What sd-cli logs when a part is done, each followed by `, taking 12.34s` or, earlier, `, taking 1234 ms`."""
PROMPT = "a bonsai tree in a blue pot, morning light"


@dataclass(frozen=True)
class Sdcpp:
    """stable-diffusion.cpp's sd-cli and its files. `arguments`: further ones, such as --diffusion-fa."""

    program: Path
    model: Path
    llm: Path
    vae: Path
    arguments: tuple[str, ...] = ()

    def command(self, size: int, threads: int, output: Path) -> list[str]:
        """The command for one picture; options as docs/flux2.md and --help of stable-diffusion.cpp give them."""
        options = {
            "--diffusion-model": self.model,
            "--llm": self.llm,
            "--vae": self.vae,
            "--prompt": PROMPT,
            "--cfg-scale": 1.0,
            "--steps": STEPS,
            "--sampling-method": "euler",
            "--seed": 0,
            "--width": size,
            "--height": size,
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


def measure(
    comfyui: Path,
    folder: Path,
    size: int,
    mode: str = "exact",
    density: str = "compact",
    device: str = "cpu",
    sdcpp: Sdcpp | None = None,
) -> dict:
    """Prints the parts and returns {"size", "ours": row} and, with `sdcpp`, "sdcpp": row and "ours_of_sdcpp".

    row: load_s, text_encoder_s, steps_s, step_s (a list), vae_s, total_s (without loading), peak_bytes, joules (None
    where the machine does not tell), pictures_per_hour, pictures_per_hour_per_gb (of peak memory).
    """
    text = write_parts(folder, device)
    ours = session.run(
        "picture",
        "the picture",
        comfyui=comfyui,
        device=device,
        file=session.ternary_pack(folder, device),
        text=text,
        folder=folder,
        size=size,
        options={"mode": mode, "layout": density},
        prompt=PROMPT,
    )
    figures: dict = {"size": size, "mode": mode, "device": device, "ours": with_totals(ours)}
    if sdcpp is not None:
        figures["sdcpp"] = with_totals(run_sdcpp(sdcpp, size, torch.get_num_threads(), find_energy(device)))
        figures["ours_of_sdcpp"] = figures["ours"]["total_s"] / figures["sdcpp"]["total_s"]
    show(figures)
    return figures


def write_parts(folder: Path, device: str = "cpu") -> Path:
    """Makes the full-size text encoder and VAE in `folder` where they are missing, on `device`; the former's file."""
    from .. import synthetic

    text = folder / "text_encoder-mlx-4bit"
    if not (text / "config.json").is_file():
        synthetic.write_text_encoder(text, device=device)
    if not (folder / "vae" / "config.json").is_file():
        synthetic.write_vae(folder / "vae", device=device)
    return text / "model.safetensors"


def with_totals(row: dict) -> dict:
    """`row` with total_s and what follows from it."""
    total = sum(row[part] for part in PARTS)
    return {**row, "total_s": total, **per_hour(total, row["peak_bytes"])}


def show(figures: dict) -> None:
    """Prints a column for each program."""
    programs = [name for name in ("ours", "sdcpp") if name in figures]
    print(f"one picture of {figures['size']}x{figures['size']}, {STEPS} steps, {figures['device']}")
    lines = (
        ("loading, s", "load_s"),
        ("text encoder, s", "text_encoder_s"),
        (f"{STEPS} steps, s", "steps_s"),
        ("VAE decode, s", "vae_s"),
        ("picture without loading, s", "total_s"),
        ("peak memory, GB", "peak_bytes"),
        ("joules", "joules"),
        ("pictures an hour", "pictures_per_hour"),
        ("pictures an hour and GB", "pictures_per_hour_per_gb"),
    )
    units = {"peak_bytes": 1e9}
    show_table(
        ("", *("Bonsai Image", "stable-diffusion.cpp")[: len(programs)]),
        [
            (text, *((figures[p][key] or 0) / units[key] if key in units else figures[p][key] for p in programs))
            for text, key in lines
        ],
    )
    if figures["ours"]["no_joules"]:
        print(f"no joules: {figures['ours']['no_joules']}")
    if "sdcpp" in figures:
        print(f"our picture takes {figures['ours_of_sdcpp']:.3f} of stable-diffusion.cpp's time")
    else:
        print("--sdcpp PATH (with --sdcpp-model, --sdcpp-llm, --sdcpp-vae) measures stable-diffusion.cpp beside it")


def run_sdcpp(sdcpp: Sdcpp, size: int, threads: int, energy: Energy) -> dict:
    """Runs sd-cli for one picture; its row. Raises SystemExit if it cannot be run or its log is not understood."""
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log.txt"
        command = sdcpp.command(size, threads, Path(temporary) / "picture.png")
        before, started = energy.read(), time.perf_counter()
        with log.open("wb") as stream:
            try:
                process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            except OSError as error:
                raise SystemExit(f"--sdcpp {sdcpp.program} cannot be run: {error}") from None
            code, peak = _wait(process)
        seconds, joules = time.perf_counter() - started, energy.between(before, energy.read())
        text = log.read_text(encoding="utf-8", errors="replace")
    if code:
        raise SystemExit(f"{' '.join(command)}\nended with code {code}:\n{text[-session.ERROR_CHARACTERS :]}")
    row = parse_sdcpp(text)
    load = max(0.0, seconds - sum(row[part] for part in PARTS))
    return {**row, "load_s": load, "joules": joules, "no_joules": energy.why_not, "peak_bytes": peak}


def _wait(process: subprocess.Popen) -> tuple[int, int]:
    """(exit code, peak resident bytes) of a child; the peak is 0 where the system does not tell."""
    if not hasattr(os, "wait4"):
        return process.wait(), 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def parse_sdcpp(text: str) -> dict:
    """{"text_encoder_s", "steps_s", "step_s", "vae_s"} from sd-cli's log; step_s: average seconds a step.

    The format is that of stable-diffusion.cpp's source (src/stable-diffusion.cpp and src/core/util.cpp, August 2026,
    and the pull request for FLUX.2 klein, number 1193): a line `[INFO ] file:line - <part> completed, taking 36.10s` a
    part, seconds or ` ms`, and a progress bar `| 4/4 - 65.60s/it`, rewritten in place with carriage returns. Where a
    part is logged more than once the last counts. Raises SystemExit if a part is missing.
    """
    row: dict = {}
    for part, words in SDCPP_PARTS.items():
        found = re.findall(rf"{re.escape(words)}, taking ([0-9.]+) ?(ms|s)\b", text)
        if not found:
            raise SystemExit(
                f"sd-cli's log has no line `{words}, taking ..`: this benchmark reads the log of stable-diffusion.cpp "
                f"from January to August 2026. The log ends:\n{text[-session.ERROR_CHARACTERS :]}"
            )
        value, unit = found[-1]
        row[part] = float(value) / (1000 if unit == "ms" else 1)
    counts = re.findall(r"\| *(\d+)/(\d+) - [0-9.]+(?:s/it|it/s)", text)
    row["step_s"] = row["steps_s"] / (int(counts[-1][1]) if counts else STEPS)
    return row
