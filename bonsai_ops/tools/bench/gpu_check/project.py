"""The project's own benchmark of layers, and its tests that know a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import torch

from .. import layers
from .check import Check

TESTS = {
    "unit": (
        "unit/test_ops.py",
        "unit/test_dispatch.py",
        "unit/test_backends.py",
        "unit/test_triton.py",
        "unit/test_packed_weight.py",
    ),
    "host": ("host/model",),
}
"""In the folder of tests, which a published archive has not."""
LEFT_OUT = "host/model/test_seedling_interpreted.py"
MOST_WORKERS = 8
SHOWN = 40


def run(check: Check, part: str) -> None:
    """part: bench or tests."""
    if part == "bench":
        _bench(check)
        return
    folder = check.settings.project / "tests"
    if not folder.is_dir():
        check.note("not measured", f"{folder} is not there: clone the repository, an archive holds no tests")
        return
    for name, files in TESTS.items():
        with check.guarded(name):
            _tests(check, name, [str(folder / file) for file in files], str(folder / LEFT_OUT))


def _bench(check: Check) -> None:
    tokens, shapes = (1536, layers.SHAPES) if check.on_gpu else (16, (layers.Shape(256, 640, 1, 1),))
    with check.guarded("layers"), torch.inference_mode():
        check.note("layers", layers.measure(tokens, check.device, 2, shapes), show=False)


def _tests(check: Check, name: str, files: list[str], left_out: str) -> None:
    variables = {
        "BONSAI_COMFYUI": str(check.settings.comfyui),
        "BONSAI_TEST_DEVICE": check.device,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=line"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "-m", "not slow", "--ignore", left_out, *files]
    done = subprocess.run(
        command, cwd=check.settings.project, env={**os.environ, **variables}, capture_output=True, text=True
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    told = [x for x in lines if x.startswith(("FAILED", "ERROR")) or " passed" in x or " failed" in x]
    check.note(name, told[-SHOWN:] or lines[-1:])
