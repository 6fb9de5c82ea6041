"""Processes with a ComfyUI of their own, for what cannot be undone in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bonsai_ops.tools.environment import COMFYUI_VERSIONS, clean_environment, comfyui_path

TESTS = Path(__file__).resolve().parent
PINNED = [comfyui_path(version) for version in COMFYUI_VERSIONS]
CHOSEN = [Path(folder).resolve() for folder in [os.environ.get("BONSAI_COMFYUI")] if folder]
FOLDERS = [*PINNED, *(folder for folder in CHOSEN if folder not in PINNED)]
"""Of every ComfyUI that tests look through: the pinned ones, and the one that BONSAI_COMFYUI names."""


def skip_without(folder: Path) -> None:
    if not (folder / "main.py").is_file():
        pytest.skip(f"{folder.name} is not here: run the tests with `python -m tests`")


def said_by(script: str, folder: Path, base: Path, *arguments: str) -> dict[str, Any]:
    """The last line, JSON, of a script of this folder that is given a ComfyUI, a base directory and the arguments."""
    skip_without(folder)
    done = subprocess.run(
        [sys.executable, str(TESTS / script), str(folder), str(base), *arguments],
        env=clean_environment({**os.environ, "OMP_NUM_THREADS": "1"}),
        cwd=base,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
