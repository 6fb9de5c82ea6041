"""The in-process tests of tests/host/model on the older ComfyUI versions, each in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bonsai_ops.tools.environment import COMFYUI_VERSIONS, NEWEST, clean_environment, comfyui_path

pytestmark = [pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
TAIL = 60
"""Lines of the nested run that a failure shows."""


@pytest.mark.parametrize("version", [v for v in COMFYUI_VERSIONS if v != NEWEST])
def test_on_an_older_comfyui(version: str, comfy_version: str) -> None:
    """What a version cannot do is skipped there, with the reason."""
    folder = comfyui_path(version)
    if not (folder / "main.py").is_file():
        pytest.skip(f"ComfyUI {version} is not here: run the tests with `python -m tests`")
    if comfy_version == version:
        pytest.skip(f"this process runs ComfyUI {version} itself")
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/host/model"],
        cwd=REPOSITORY,
        env=clean_environment({**os.environ, "BONSAI_COMFYUI": str(folder)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    tail = "\n".join(done.stdout.splitlines()[-TAIL:])
    assert done.returncode == 0, f"ComfyUI {version}:\n{tail}"
