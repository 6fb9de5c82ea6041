"""The example for several machines with real Ray, and a model that travels to another process as function and path."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from twins import draw, write_pack

from bonsai_ops.tools.environment.processes import inherited_environment
from machines.over_ray import PLUGIN, PROMPTS, SEEDLING, Painter, Place, tasks

pytestmark = [pytest.mark.host, pytest.mark.processor, pytest.mark.slow]

PIXELS, PICTURES = (64, 64), 4
CHILD = """
import hashlib, pickle, sys
from pathlib import Path
sys.path += sys.argv[2:]
from bonsai_ops.tools.bench.inside import comfyui
comfyui.set_up(Path(sys.argv[1]), "cpu")
function, arguments = pickle.loads(sys.stdin.buffer.read())
import torch
torch.set_num_threads(1)
from twins import draw
print("drew", hashlib.sha256(draw(function(*arguments)).numpy().tobytes()).hexdigest())
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the actors have, of one processor each: the bits of a product depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_model_travels_as_function_and_path(comfyui_path: Path, tmp_path: Path) -> None:
    """What raylight and its like call: a function of a module, which a worker imports, with a path and plain options.

    It takes a second process with a ComfyUI of its own.
    """
    from bonsai_ops.host.loader import load_bonsai_model

    path = write_pack(tmp_path / "model.safetensors", "ternary")
    wanted = (load_bonsai_model, (str(path), {"compute_dtype": "fp32"}))
    sent = pickle.dumps(wanted)
    assert b"bonsai_ops.host.loader" in sent and len(sent) < 1000
    command = [sys.executable, "-c", CHILD, str(comfyui_path), str(PLUGIN), str(PLUGIN / "tests")]
    done = subprocess.run(command, input=sent, env=inherited_environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    here = hashlib.sha256(draw(load_bonsai_model(*wanted[1])).numpy().tobytes()).hexdigest()
    assert done.stdout.decode().split("drew ")[1].strip() == here


@pytest.fixture
def rays_folder() -> Iterator[Path]:
    """Short: a socket's name has 107 characters at most."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_ray_spreads_prompts_over_actors(comfyui_path: Path, rays_folder: Path, tmp_path: Path) -> None:
    """One and two actors, and one that is ended while it draws: all pictures are there and those of one machine.

    It takes three processes with a ComfyUI each.
    """
    variables = {"RAY_TMPDIR": str(rays_folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "machines.over_ray", "--comfyui", str(comfyui_path), "--actors", "1", "2"]
    command += ["--pictures", str(PICTURES), "--size", *map(str, PIXELS), "--kill", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=PLUGIN,
        env={**inherited_environment(), **variables},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    # What Ray says of the process that was ended may stand between.
    loaded, one, two, replaced, same = [line for line in done.stdout.splitlines() if "raylet" not in line]
    assert loaded.startswith("2 actors loaded in ")
    assert one.startswith(f"1 of the actors: {PICTURES} pictures in ") and "again" not in one
    assert two.startswith(f"2 of the actors: {PICTURES} pictures in ") and two.endswith(", 1 given again.")
    assert replaced.endswith("was ended while it drew; a new one took its place.")
    assert same == "The same seeds gave the same pictures, to the bit, in every run."
    from bonsai_ops.host.pack import load_pack

    painter = Painter(Place(str(comfyui_path), str(PLUGIN)))
    painter.parts = load_pack(PLUGIN / SEEDLING)
    for task in tasks(PROMPTS, PICTURES, 0, PIXELS):
        assert (tmp_path / f"{task.number:04}.png").read_bytes() == painter.draw(task)
    assert not Path("/proc").is_dir() or not still_running(rays_folder)


def still_running(folder: Path) -> list[str]:
    """Processes whose command names a folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in lines if os.fspath(folder) in line]
