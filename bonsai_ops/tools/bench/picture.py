"""A whole picture, part by part: text encoder, 4 steps, VAE decode; other programs beside it, in turns.

Everything has the published sizes (Qwen3 4B in MLX 4-bit, the 4B transformer, the full VAE) and random weights. Each
picture is a process of its own: it loads, draws, writes a PNG and ends.
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import kernels
from ..environment import PLUGIN, inherited_environment, module_command
from . import errors, session
from .energy import find_energy
from .picture_table import LABELS, said, show, summary, with_totals
from .sdcpp import Sdcpp, run_sdcpp
from .ways import check_modes

STEPS = 4
PROMPT = "a bonsai tree in a blue pot, morning light"
VAE = Path("vae") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Program:
    """What draws a picture of (width, height). name: of ways.PROGRAMS; run() -> its row, see `measure`.

    run raises SystemExit where the program fails. source: what it was made of. once: one picture is enough.
    """

    name: str
    size: tuple[int, int]
    run: Callable[[], dict]
    source: str = ""
    once: bool = False


@dataclass(frozen=True)
class Ours:
    """How our own picture is drawn. comfyui: its folder; work: that of the packs. The rest: as the options."""

    comfyui: Path
    work: Path
    density: str = "compact"
    device: str = "cpu"
    steps: int = STEPS

    def row(
        self,
        files: Mapping[str, Path],
        size: tuple[int, int],
        mode: str = "exact",
        kind: str = "bonsai",
        dtype: str = "auto",
        keep: Path | None = None,
    ) -> dict:
        """The row of one picture. files: {"file", "text"}. kind: bonsai, unpack or stock (inside/picture.py).

        dtype: what transformer and text encoder of ours compute in. keep: file for the states that errors.py compares.
        Raises SystemExit if it fails or the mode is not computed here.
        """
        with tempfile.TemporaryDirectory() as temporary:
            row, measured = find_energy(self.device).around(
                lambda: session.run(
                    "picture",
                    "the picture",
                    comfyui=self.comfyui,
                    device=self.device,
                    kind=kind,
                    **files,
                    vae=self.work / VAE,
                    size=size,
                    steps=self.steps,
                    options={"mode": mode, "layout": self.density, "compute_dtype": dtype},
                    prompt=PROMPT,
                    png=Path(temporary) / "picture.png",
                    keep=keep,
                )
            )
        if row.get("mode", mode) != mode:
            raise SystemExit(f"mode {mode} is not computed here: {row['declined']}")
        return {**row, **measured}


def ours_of(
    ours: Ours, size: int, modes: Sequence[str], packs: Sequence[str], states: Path | None = None
) -> Iterator[Program]:
    """Our own programs: every mode with the first kind of files, every other kind of files in mode exact.

    packs: some of mlx and native; none for a native transformer if there is one, and the published text encoder.
    states: a folder for what errors.py compares, with one more program, in fp32 throughout; None for neither.
    Raises SystemExit for an unknown mode.
    """
    check_modes(modes)
    first, *others = dict.fromkeys(packs) or (None,)

    def program(name: str, kind: str | None, mode: str = kernels.EXACT, dtype: str = "auto") -> Program:
        files, keep = files_of(ours, kind), states and errors.kept(states, name)
        once, source = dtype == "fp32", f"{kind or 'usual'} files"
        draw = functools.partial(ours.row, files, (size, size), mode, dtype=dtype, keep=keep)
        return Program(name, (size, size), draw, source, once)

    for mode in dict.fromkeys(modes):
        yield program("ours" if mode == kernels.EXACT else f"ours_{mode}", first, mode)
    for kind in others:
        yield program(f"ours_{kind}", kind)
    if states:
        yield program(errors.REFERENCE, first, dtype="fp32")


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


def sdcpp_program(sdcpp: Sdcpp, size: tuple[int, int], steps: int, device: str, source: str = "") -> Program:
    """stable-diffusion.cpp with the threads of this process."""
    threads, energy = torch.get_num_threads(), find_energy(device)
    return Program("sdcpp", size, lambda: run_sdcpp(sdcpp, PROMPT, size, steps, threads, energy), source)


def measure(
    programs: Sequence[Program],
    runs: int = 1,
    keep: Callable[[dict], None] | None = None,
    facts: Mapping[str, object] | None = None,
) -> dict:
    """Runs all programs in turns, so many times, prints the medians and returns the figures, see picture_table.summary.

    A row of a program: load_s, as it tells it itself, text_encoder_s, steps_s, step_s (a list, or one number), vae_s;
    whole_s from the start of its process to its end, processor_s of all threads of it, peak_bytes, joules (None where
    the machine does not tell); of ours seconds of the PNG, processor seconds and the peak of every part, and
    own_peak_bytes, which leaves out pages of files. A program that tells no parts has none of them.
    facts: further ones for the figures, "steps" among them. keep(figures so far) is called after each picture. A
    program that fails is left out from then on, and one line says so; the first must not.
    """
    pictures: list[tuple[Program, int, dict]] = []
    failed: set[str] = set()
    facts = {"size": programs[0].size[0], "steps": STEPS, "runs": runs, **(facts or {})}
    figures: dict = {}
    for run in range(1, runs + 1):
        for program in (p for p in programs if p.name not in failed and not (p.once and run > 1)):
            try:
                row = with_totals(program.run())
            except (SystemExit, OSError) as error:
                if program is programs[0]:
                    raise
                failed.add(program.name)
                print(f"{LABELS[program.name]} is left out: {error}", flush=True)
                continue
            pictures.append((program, run, row))
            figures = {**facts, **summary(pictures)}
            print(f"run {run}, {LABELS[program.name]}: {said(row)}", flush=True)
            if keep is not None:
                keep(figures)
    show(figures)
    return figures


def keep_in(file: Path | None, facts: Mapping[str, object]) -> Callable[[dict], None] | None:
    """What writes figures so far to a file, as the benchmark itself does at its end; None without one.

    facts: of the machine.
    """
    if file is None:
        return None
    return lambda figures: file.write_text(
        json.dumps({"machine": facts, "picture": figures}, indent=1), encoding="utf-8"
    )


def write_parts(folder: Path, device: str = "cpu") -> Path:
    """Makes the full-size text encoder and VAE in `folder` where they are missing, on `device`; the former's file."""
    from .. import synthetic

    text = folder / "text_encoder-mlx-4bit"
    if not (text / "config.json").is_file():
        synthetic.write_text_encoder(text, device=device)
    if not (folder / "vae" / "config.json").is_file():
        synthetic.write_vae(folder / "vae", device=device)
    return text / "model.safetensors"
