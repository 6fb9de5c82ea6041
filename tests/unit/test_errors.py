"""What a user sees of an error: ComfyUI's dialog begins with its class, and another process gets its sentence."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from messages import reason

from bonsai_ops.host.comfyui import Gap, MissingNameError
from bonsai_ops.host.contract import NEEDS
from bonsai_ops.kernels.failure import BackendError, LostDeviceError
from bonsai_ops.weights.errors import PackError

CASES = {
    "PackError": (PackError("a/b.safetensors", "lacks half of itself", "Download it again.", "x.weight"), ValueError),
    "MissingNameError": (MissingNameError([Gap("comfy.a.b", NEEDS[0])]), ImportError),
    "BackendError": (BackendError("no compiler", "install one"), RuntimeError),
    "LostDeviceError": (LostDeviceError("cuda:0", RuntimeError("illegal address")), RuntimeError),
}
"""{class: an error of it, the built-in class that it is one of}."""


def test_the_class_is_short() -> None:
    """It had the path of the plugin's folder before it, which left no room for the sentence."""
    assert f"{PackError.__module__}.{PackError.__qualname__}" == "bonsai.PackError"


@pytest.mark.parametrize("key", [None, "x.weight"])
def test_a_long_path_comes_last(key: str | None) -> None:
    """It hid the sentence where the page shows the begin of a message only."""
    path = Path("/home") / "folder" / ("deep" * 60) / "b.safetensors"
    error = PackError(path, "lacks half of itself", "Download it again.", key)
    assert str(error) == f"b.safetensors: {error.reason} ({path})" and reason(error, path) == error.reason
    assert error.reason == ("x.weight: " if key else "") + "lacks half of itself. Download it again."
    assert (error.path, error.found, error.cure, error.key) == (path, "lacks half of itself", "Download it again.", key)


@pytest.mark.parametrize("path", ["b.safetensors", "..", "/", "."])
def test_a_path_that_is_a_name_stands_once(path: str) -> None:
    assert str(PackError(path, "is odd", "Choose another.")) == f"{path}: is odd. Choose another."


def test_a_path_is_escaped_and_not_cut() -> None:
    """A name is whatever a disk has, halves of surrogate pairs among it, six characters each when they are escaped."""
    message = str(PackError(Path("a\n") / ("\udcff" * 200), "is odd", "Choose another."))
    name = r"\udcff" * 200
    assert message == rf"{name}: is odd. Choose another. (a\n/{name})"


@pytest.mark.parametrize("name", CASES)
def test_an_error_travels_to_a_process_without_the_plugin(name: str) -> None:
    """Ray and its like raise something else for an error that cannot be read where it arrives."""
    error, kind = CASES[name]
    assert isinstance(error, kind) and type(error).__name__ == name
    code = "import pickle, sys; e = pickle.loads(sys.stdin.buffer.read()); print(type(e).__name__, e, end='')"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, input=pickle.dumps(error), capture_output=True, timeout=60, check=True)
    assert done.stdout.decode() == f"{kind.__name__} {error}"
