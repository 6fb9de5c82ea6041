"""What each ComfyUI has of the names that the plugin leans on, and what happens if one of them goes.

A ComfyUI named by BONSAI_COMFYUI is looked through beside the pinned ones. `-rA` also shows which optional names it
lacks.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import FOLDERS, said_by
from released import RELEASED

from bonsai_ops.host import comfyui
from bonsai_ops.host.contract import NEEDS, Need
from bonsai_ops.tools.environment import COMFYUI_VERSIONS, NEWEST, comfyui_path

pytestmark = pytest.mark.host


def inside(folder: Path, base: Path, what: str, **options: object) -> dict:
    """What contract_child.py prints."""
    return said_by("contract_child.py", folder, base, what, json.dumps(options, default=str))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_name_is_there(folder: Path, tmp_path: Path) -> None:
    found = inside(folder, tmp_path, "look")
    print(found["versions"])
    required = [text for text, costs in found["gaps"] if costs is None]
    print(*(f"optional, gone: {text}" for text, costs in found["gaps"] if costs is not None), sep="\n")
    assert not required, f"{found['versions']} lacks:\n" + "\n".join(required)
    if folder == comfyui_path(NEWEST):
        assert found["gaps"] == []


@pytest.mark.skipif("BONSAI_PACKAGES" not in os.environ, reason="BONSAI_PACKAGES names no folder")
def test_the_chosen_packages_come_first(comfyui_path: Path) -> None:
    """In this process and in its children."""
    folder = Path(os.environ["BONSAI_PACKAGES"]).resolve()
    code = "import importlib.util; print(importlib.util.find_spec('comfy_kitchen').origin)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    for file in (importlib.import_module("comfy_kitchen").__file__, child.splitlines()[-1]):
        assert folder in Path(file).resolve().parents


def test_the_versions_are_the_pinned_ones() -> None:
    assert (COMFYUI_VERSIONS[-1], COMFYUI_VERSIONS[0]) == (comfyui.OLDEST, comfyui.NEWEST)


FEATURES = {name: need for need in NEEDS if need.costs for name in need.names}
NOT_WITHOUT = {"comfy.model_patcher.CoreModelPatcher", "comfy.model_patcher.ModelPatcher.is_dynamic"}
"""Names without which ComfyUI itself falls over: they are hidden from us alone."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ternary transformer."""
    from bonsai_ops.tools import synthetic
    from bonsai_ops.weights.flux2 import Geometry

    path = tmp_path_factory.mktemp("pack") / "model.safetensors"
    geometry = Geometry(hidden=128, context=128, in_channels=128, double_blocks=1, single_blocks=1)
    synthetic.write_mlx(path, "ternary", geometry, 0)
    return path


@pytest.fixture(scope="module")
def outcomes(model: Path, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """{name: what becomes of the plugin without it} of every optional name."""
    base, options = tmp_path_factory.mktemp("without"), {"hidden": sorted(NOT_WITHOUT), "model": model}
    names = sorted(FEATURES)
    batches = [names] if sys.platform == "linux" else [[name] for name in names]
    found: dict[str, dict] = {}
    for batch in batches:
        found |= inside(comfyui_path, base, "without", names=batch, **options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FEATURES))
def test_an_optional_name_costs_its_feature(name: str, outcomes: dict[str, dict]) -> None:
    found = outcomes[name]
    assert "error" not in found, found["error"]
    assert (found["nodes"], found["drawn"]) == (len(RELEASED), True)
    assert len(found["lines"]) == 1 and FEATURES[name].costs in found["lines"][0]


def test_a_required_name_is_named_in_one_sentence(model: Path, comfyui_path: Path, tmp_path: Path) -> None:
    name = "comfy.samplers.sampler_object"
    found = inside(comfyui_path, tmp_path, "without", names=[name], hidden=[], model=model)[name]
    assert "nodes" not in found
    assert found["error"].startswith("MissingNameError: Bonsai: ComfyUI ")
    for part in (f"has no {name}, which host/sampling.py needs to take Euler steps", "Update this plugin"):
        assert part in found["error"]
    assert "\n" not in found["error"]


@pytest.mark.parametrize(
    ("here", "cure"),
    [
        ("0.9.2", "Update ComfyUI to 0.16.3 or newer."),
        ("0.31.0", "Update this plugin, or use a ComfyUI between 0.16.3 and 0.30.0"),
        ("of an unknown version", "Update this plugin, or use"),
    ],
)
def test_the_cure_fits_the_version(here: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "version", lambda: here)
    error = comfyui.MissingNameError([comfyui.Gap("comfy.nowhere", Need("host/x.py", "comfy.nowhere", "to fly"))])
    assert str(error).startswith(f"Bonsai: ComfyUI {here} has no comfy.nowhere, which host/x.py needs to fly. {cure}")


def test_what_an_older_function_does_not_take_is_not_passed() -> None:
    def older(node_id: str, inputs: object = None) -> None: ...

    def newer(node_id: str, **fields: object) -> None: ...

    given = {"search_aliases": ["bonsai"], "inputs": []}
    assert comfyui.taken(older, **given) == {"inputs": []}
    assert comfyui.taken(newer, **given) == given
