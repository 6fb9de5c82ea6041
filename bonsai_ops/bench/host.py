"""A real ComfyUI for a benchmark: every measured thing is a process of its own, so that memory belongs to it.

The parent calls `run(module, ..)`; the child is `python -m bonsai_ops.bench.<module> OPTIONS`, OPTIONS being JSON with
at least {"comfyui", "threads"}. It calls `start` first and prints its figures as one line of JSON at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from ..environment import PLUGIN, clean_environment
from .report import peak_rss, reset_peak_rss

ERROR_CHARACTERS = 3000


def run(module: str, what: str, **options: object) -> dict:
    """The figures that bonsai_ops.bench.<module> prints for `options`. Raises SystemExit if it fails; names `what`."""
    given = {"threads": torch.get_num_threads(), **options}
    command = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(given, default=str)]
    done = subprocess.run(command, cwd=PLUGIN, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-ERROR_CHARACTERS:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def start(argv: list[str]) -> dict:
    """Puts ComfyUI on the path with its options set; returns the child's options. Before anything imports comfy."""
    options = json.loads(argv[0])
    torch.set_num_threads(options["threads"])
    sys.path.insert(0, str(options["comfyui"]))
    sys.argv = ["main.py", *(["--cpu"] if options.get("device", "cpu") == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    return options


def synchronise(device: str) -> None:
    """Waits until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Peak memory of this process: resident set on the CPU, allocated memory on the GPU."""
    if device == "cpu":
        return peak_rss()
    return torch.cuda.max_memory_allocated()


def reset_peak(device: str) -> None:
    """Lets peak_bytes count from what is in memory now on, where the system can."""
    if device == "cpu":
        reset_peak_rss()
    else:
        torch.cuda.reset_peak_memory_stats()


def ternary_pack(work: Path) -> Path:
    """The synthetic 4B ternary pack, written first if it is not there; our single-file form if there is one."""
    from .. import synthetic

    native, mlx = work / "ternary" / "native.safetensors", work / "ternary" / "mlx.safetensors"
    if native.is_file():
        return native
    if not mlx.is_file():
        synthetic.write_mlx(mlx, "ternary")
    return mlx


def dense_file(work: Path) -> Path:
    """The synthetic dense bf16 4B file (7.75 GB), written first if it is not there."""
    from .. import synthetic

    file = work / "dense.safetensors"
    if not file.is_file():
        synthetic.write_dense(file)
    return file
