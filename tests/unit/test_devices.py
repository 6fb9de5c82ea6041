"""Tests within ComfyUI hold on the device that it computes on: none names one itself, twins.load_device does.

BONSAI_TEST_DEVICE chooses it (conftest.py). Where ComfyUI keeps what it does not compute with is the processor always.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = (TESTS / "twins.py", TESTS / "families.py", *sorted((TESTS / "host" / "model").glob("*.py")))
NAMES = ("cpu", "cuda")
NAME_ONE = {
    "families.py:stock": "the offload device",
    "test_saving.py:flux": "the offload device",
    "test_saving.py:sd3": "the offload device",
    "test_attention.py:test_only_packed_models_on_a_cpu": "says that a model has another one",
    "test_clone.py:test_select_device_node": "an input of the node",
    "test_gradients.py:test_what_is_no_diffusion_model_is_refused": "of what is no model",
    "test_kept.py:<module>": "loads by hand, on a CPU only",
    "test_overhead.py:test_an_unwrapped_weight_follows_its_tensor": "of a layer made by hand",
    "test_layout.py:<module>": "of a tensor made by hand",
    "test_layout.py:test_a_layer_shares_the_tables_that_it_is_given": "of a layer made by hand",
    "test_recover.py:test_weights_lie_in_memory_once": "says where it holds",
    "test_reuse.py:test_a_mapped_model_leaves_memory_after_a_picture": "says where it holds",
    "test_text_states.py:test_a_mapped_encoder_leaves_memory_after_a_prompt": "says where it holds",
    "test_vae.py:test_pictures_and_latents_stay": "says what holds on which",
    "test_text_dtype.py:test_auto_is_what_the_processor_is_fast_in": "says what holds on which",
    "test_text_dtype.py:test_auto_follows_the_command_line": "asks about both",
}
"""{file:function: what the device that it names is}."""


def named(source: str) -> Iterator[tuple[str, int]]:
    """(function, line) of every text that is a device, such as "cpu" or "cuda:1", and of every call of .cuda()."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        device = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in NAMES
        moves = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        if device or moves:
            around = [f.name for f in functions if f.lineno <= node.lineno <= f.end_lineno]
            yield (around[0] if around else "<module>"), node.lineno


def test_no_test_within_comfyui_names_a_device() -> None:
    found = {f"{file.name}:{name}" for file in FILES for name, _ in named(file.read_text(encoding="utf-8"))}
    assert found - set(NAME_ONE) == set(), "take load_device() of twins.py, the model's load_device or x.device"
    assert set(NAME_ONE) <= found, "names none any more: take it from the list"


@pytest.mark.parametrize("source", ["x.to('cpu')", "f(device='cuda:1')", "torch.device('cpu')", "x.cuda()"])
def test_a_device_is_found(source: str) -> None:
    assert list(named(source)) == [("<module>", 1)]
    assert not list(named("x.cpu() + 'cpu, exact'"))


def test_an_unknown_device_is_refused() -> None:
    variables = {**os.environ, "BONSAI_TEST_DEVICE": "gpu"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True)
    assert done.returncode == 4 and "BONSAI_TEST_DEVICE is gpu, expected one of cpu, cuda, cuda-dynamic" in done.stderr
