"""Other hosts than the newest ComfyUI with its own packages, each in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts.parts import MODEL, PARTS

from bonsai_ops.tools.environment import COMFYUI_VERSIONS, NEWEST, clean_environment, comfyui_path, newest_packages_path
from bonsai_ops.tools.environment.pins import NEWEST_PACKAGES

pytestmark = [pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
TAIL = 60
"""Lines of the nested run that a failure shows."""
ON_OLDER = (f"{MODEL}/test_traps.py", *(test for tests in PARTS.values() for test in tests if test.startswith(MODEL)))
"""What runs in the process of an older ComfyUI; test_matrix.py has the servers."""


def run(*command: str, **variables: str) -> str:
    """What a command prints; fails with its end if it does not succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=clean_environment({**os.environ, **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-TAIL:])
    return done.stdout


@pytest.mark.parametrize("version", [v for v in COMFYUI_VERSIONS if v != NEWEST])
def test_on_an_older_comfyui(version: str, comfy_version: str) -> None:
    """What a version cannot do is skipped there, with the reason. `python -m tests.hosts --all` runs the rest."""
    folder = comfyui_path(version)
    if not (folder / "main.py").is_file():
        pytest.skip(f"ComfyUI {version} is not here: run the tests with `python -m tests`")
    if comfy_version == version:
        pytest.skip(f"this process runs ComfyUI {version} itself")
    run("pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", *ON_OLDER, BONSAI_COMFYUI=str(folder))


def test_with_newer_packages(comfyui_path: Path) -> None:
    """comfy-kitchen, comfy-aimdo, the page and the manager, each newer than the newest ComfyUI here asks for.

    Its LoRAs are those of ComfyUI, which is no other one here; they meet packed layers in the part "offload".
    """
    if not newest_packages_path().is_dir():
        pytest.skip("no newer packages here: run the tests with `python -m tests`")
    table = run("tests.hosts", "--only", f"{NEWEST}+", "--parts", *(PARTS.keys() - {"browser", "LoRA"}))
    assert f"| {NEWEST}+ | {NEWEST} |" in table
    for package in NEWEST_PACKAGES:
        assert f"| {package.partition('==')[2]} |" in table
