"""A whole picture, part by part: text encoder, 4 steps, VAE decode; other programs beside it, in turns.

Everything has the published sizes (Qwen3 4B in MLX 4-bit, the 4B transformer, the full VAE) and random weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import kernels
from ..environment import PLUGIN, inherited_environment, module_command
from . import errors, session
from .energy import find_energy, per_hour
from .report import show_table
from .sdcpp import PARTS, Sdcpp, run_sdcpp
from .ways import PROGRAMS

STEPS = 4
PROMPT = "a bonsai tree in a blue pot, morning light"
LINES = (
    ("loading, s", "load_s"),
    ("text encoder, s", "text_encoder_s"),
    (f"{STEPS} steps, s", "steps_s"),
    ("VAE decode, s", "vae_s"),
    ("picture without loading, s", "total_s"),
    ("picture with loading, s", "whole_s"),
    ("peak memory, GB", "peak_bytes"),
    ("of it not pages of files, GB", "own_peak_bytes"),
    ("peak while loading, GB", "load_peak_bytes"),
    ("of the text encoder, GB", "text_encoder_peak_bytes"),
    ("of the steps, GB", "steps_peak_bytes"),
    ("of VAE decode, GB", "vae_peak_bytes"),
    ("joules", "joules"),
    ("pictures an hour", "pictures_per_hour"),
    ("pictures an hour and GB", "pictures_per_hour_per_gb"),
)


@dataclass(frozen=True)
class Program:
    """What draws a picture of (width, height). name: of ways.PROGRAMS; run() -> its row, see `measure`.

    run raises SystemExit where the program fails.
    """

    name: str
    size: tuple[int, int]
    run: Callable[[], dict]


@dataclass(frozen=True)
class Ours:
    """How our own picture is drawn. comfyui: its folder; work: that of the packs. density, device: as the options."""

    comfyui: Path
    work: Path
    density: str = "compact"
    device: str = "cpu"

    def row(
        self,
        files: Mapping[str, Path],
        size: tuple[int, int],
        mode: str = "exact",
        kind: str = "bonsai",
        dtype: str = "auto",
        keep: Path | None = None,
    ) -> dict:
        """The row of one picture. files: {"file", "text"}. kind: bonsai, or stock for ComfyUI's own loaders.

        dtype: what transformer and text encoder of ours compute in. keep: file for the states that errors.py compares.
        """
        return session.run(
            "picture",
            "the picture",
            comfyui=self.comfyui,
            device=self.device,
            kind=kind,
            **files,
            folder=self.work,
            size=size,
            options={"mode": mode, "layout": self.density, "compute_dtype": dtype},
            prompt=PROMPT,
            keep=keep,
        )


def ours_of(
    ours: Ours, size: int, modes: Sequence[str], packs: Sequence[str], states: Path | None = None
) -> Iterator[Program]:
    """Our own programs: every mode with the first kind of files, every other kind of files in the first mode.

    packs: some of mlx and native; none for a native transformer if there is one, and the published text encoder.
    states: a folder for what errors.py compares, with one more program, in fp32 throughout; None for neither.
    """
    kinds = packs or (None,)

    def program(name: str, kind: str | None, mode: str, dtype: str = "auto") -> Program:
        files, keep = files_of(ours, kind), states and errors.kept(states, name)
        return Program(name, (size, size), lambda: ours.row(files, (size, size), mode, dtype=dtype, keep=keep))

    for kind, mode in [(kinds[0], mode) for mode in modes] + [(kind, modes[0]) for kind in kinds[1:]]:
        name = f"ours_{mode}" if mode != modes[0] else "ours" if kind == kinds[0] else f"ours_{kind}"
        yield program(name, kind, mode)
    if states:
        yield program(errors.REFERENCE, kinds[0], kernels.EXACT, "fp32")


def files_of(ours: Ours, kind: str | None) -> dict[str, Path]:
    """{"file", "text"}: transformer and text encoder of a kind, made where they are missing."""
    text = write_parts(ours.work, ours.device)
    if kind is None:
        return {"file": session.ternary_pack(ours.work, ours.device), "text": text}
    mlx = session.mlx_pack(ours.work, ours.device)
    if kind == "mlx":
        return {"file": mlx, "text": text}
    native = {"file": mlx.with_name("native.safetensors"), "text": ours.work / "text_encoder-native.safetensors"}
    for name, source in (("file", mlx), ("text", text)):
        if not native[name].is_file():
            command = [*module_command("bonsai_ops.convert"), str(source), str(native[name])]
            if subprocess.run(command, cwd=PLUGIN, env=inherited_environment(), check=False).returncode:
                raise SystemExit(f"{source} could not be converted")
    return native


def sdcpp_program(sdcpp: Sdcpp, size: tuple[int, int], device: str) -> Program:
    """stable-diffusion.cpp with the threads of this process."""
    threads, energy = torch.get_num_threads(), find_energy(device)
    return Program("sdcpp", size, lambda: run_sdcpp(sdcpp, PROMPT, size, STEPS, threads, energy))


def measure(programs: Sequence[Program], runs: int = 1, keep: Callable[[dict], None] | None = None) -> dict:
    """Runs all programs in turns, so many times, prints the medians and returns {name: row} with "size" and "runs".

    row: load_s, text_encoder_s, steps_s, step_s (a list, or one number), vae_s, total_s (without loading), whole_s,
    peak_bytes, joules (None where the machine does not tell), pictures_per_hour, pictures_per_hour_per_gb (of peak
    memory), width, height; of ours the peak of every part, and own_peak_bytes, which leaves out pages of files. A
    program that tells no parts has whole_s alone. keep(figures so far) is called after each picture. A program that
    fails is left out from then on, and one line says so; the first must not.
    """
    rows: dict[str, list[dict]] = {program.name: [] for program in programs}
    failed: set[str] = set()
    figures: dict = {"size": programs[0].size[0], "runs": runs}
    for number in range(runs):
        for program in (p for p in programs if p.name not in failed):
            try:
                row = with_totals(program.run())
            except SystemExit as error:
                if program is programs[0]:
                    raise
                failed.add(program.name)
                print(f"{LABELS[program.name]} is left out: {error}", flush=True)
                continue
            width, height = program.size
            rows[program.name].append({**row, "width": width, "height": height})
            figures |= {name: median(found) for name, found in rows.items() if found}
            print(f"run {number + 1}, {LABELS[program.name]}: {_said(row)}", flush=True)
            if keep is not None:
                keep(figures)
    if "sdcpp" in figures:
        figures["ours_of_sdcpp"] = figures["ours"]["total_s"] / figures["sdcpp"]["total_s"]
    show(figures)
    return figures


def keep_in(file: Path | None) -> Callable[[dict], None] | None:
    """What writes figures so far to a file, as the benchmark itself does at its end; None without one."""
    return file and (lambda figures: file.write_text(json.dumps({"picture": figures}, indent=1), encoding="utf-8"))


def _said(row: dict) -> str:
    parts = ((text, row.get(key)) for text, key in LINES[:6])
    return ", ".join(f"{text} {value:.1f}" for text, value in parts if value is not None)


def median(rows: Sequence[dict]) -> dict:
    """The row of medians, lists of numbers element by element; what is no number as the first row has it."""
    found: dict = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, list):
            found[key] = [statistics.median(parts) for parts in zip(*values, strict=True)]
        else:
            found[key] = statistics.median(values) if isinstance(first, (int, float)) and None not in values else first
    return found


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
    """`row` with total_s and whole_s and what follows: of the former, of whole_s where the program tells no parts."""
    if "load_s" not in row:
        return {**row, **per_hour(row["whole_s"], row["peak_bytes"])}
    total = sum(row[part] for part in PARTS)
    return {**row, "total_s": total, "whole_s": total + row["load_s"], **per_hour(total, row["peak_bytes"])}


LABELS = {way.name: way.label for way in PROGRAMS}


def show(figures: dict) -> None:
    """Prints a table for each size, a column for each program."""
    names = [way.name for way in PROGRAMS if way.name in figures]
    for size in dict.fromkeys((figures[name]["width"], figures[name]["height"]) for name in names):
        columns = [name for name in names if (figures[name]["width"], figures[name]["height"]) == size]
        print(f"one picture of {size[0]}x{size[1]}, {STEPS} steps, median of {figures['runs']}")
        show_table(
            ("", *(LABELS[name] for name in columns)),
            [
                (text, *(_in_gb(figures[name].get(key), key) for name in columns))
                for text, key in LINES
                if any(figures[name].get(key) is not None for name in columns)
            ],
        )
    if figures["ours"]["no_joules"]:
        print(f"no joules: {figures['ours']['no_joules']}")
    if "sdcpp" in figures:
        print(f"our picture takes {figures['ours_of_sdcpp']:.3f} of stable-diffusion.cpp's time")
    elif len(names) == 1:
        print("--rivals measures other programs beside it, --sdcpp PATH your own stable-diffusion.cpp")


def _in_gb(value: float | None, key: str) -> float | None:
    return value / 1e9 if value and key.endswith("_bytes") else value
