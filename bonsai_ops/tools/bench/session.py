"""A real ComfyUI for a benchmark: every measured thing is a process of its own, so that memory belongs to it.

The parent calls `run(module, ..)`; the child is `python -m bonsai_ops.tools.bench.inside MODULE OPTIONS`, OPTIONS being
JSON with at least {"comfyui", "threads"}. It has the packages of its parent, sets ComfyUI up as its main.py does, calls
`start` and prints its figures as one line of JSON at the end. What is measured in turns with others is a `Session`
instead: the child prints a line when it has loaded, and one for each line that it reads.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path

import torch

from ..environment import PLUGIN, inherited_environment, module_command

ERROR_CHARACTERS = 3000


def run(module: str, what: str, **options: object) -> dict:
    """The figures that inside.<module> prints for `options`. Raises SystemExit, which names `what`, if it fails."""
    with Session(module, what, **options) as session:
        return session.finish()


class Session:
    """A child that waits between measurements, so that others can have the machine. Raises SystemExit if it fails."""

    def __init__(self, module: str, what: str, **options: object) -> None:
        given = {"threads": torch.get_num_threads(), **options}
        command = [*module_command(f"{__package__}.inside"), module, json.dumps(given, default=str)]
        self._what = what
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by __exit__)
        self._child = subprocess.Popen(
            command,
            cwd=PLUGIN,
            env=inherited_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()
        self._errors.close()

    def ask(self, what: str = "again") -> dict:
        """Lets the child, which reads the line `what`, measure once more and returns what it prints."""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(f"{what}\n")
            self._child.stdin.flush()
        return self.read()

    def read(self) -> dict:
        """Waits for the child's next line."""
        for line in self._child.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise self._failure()

    def finish(self) -> dict:
        """Tells the child that this was all and returns the last line that it prints."""
        printed, _ = self._child.communicate()
        if self._child.returncode:
            raise self._failure()
        return json.loads(printed.strip().splitlines()[-1])

    def _failure(self) -> SystemExit:
        self._child.wait()
        self._errors.seek(0)
        return SystemExit(f"{self._what} failed:\n{self._errors.read()[-ERROR_CHARACTERS:]}")


def ternary_pack(work: Path, device: str = "cpu") -> Path:
    """The synthetic 4B ternary pack, made on `device` if it is not there; our single-file form if there is one."""
    native = work / "ternary" / "native.safetensors"
    return native if native.is_file() else mlx_pack(work, device)


def mlx_pack(work: Path, device: str = "cpu") -> Path:
    """The synthetic 4B ternary pack in the form of the MLX releases, made on `device` if it is not there."""
    from .. import synthetic

    mlx = work / "ternary" / "mlx.safetensors"
    if not mlx.is_file():
        synthetic.write_mlx(mlx, "ternary", device=device)
    return mlx


def dense_file(work: Path, device: str = "cpu") -> Path:
    """The synthetic dense bf16 4B file (7.75 GB), made first on `device` if it is not there."""
    from .. import synthetic

    file = work / "dense.safetensors"
    if not file.is_file():
        synthetic.write_dense(file, device=device)
    return file
