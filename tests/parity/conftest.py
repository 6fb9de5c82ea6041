"""Fixtures: the families of peers/families.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: run the tests with `python -m tests`")
pytest.importorskip("transformers", reason="transformers is not installed: run the tests with `python -m tests`")

from peers.families import GEOMETRIES, Family, make_family
from peers.tiny_klein import VARIANTS


@pytest.fixture(scope="session")
def tokenizer_folder(comfyui_path: Path) -> Path:
    """Qwen's tokenizer files as ComfyUI carries them."""
    return comfyui_path / "comfy" / "text_encoders" / "qwen25_tokenizer"


@pytest.fixture(scope="session", params=list(zip(VARIANTS, GEOMETRIES, strict=True)), ids="-".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Family:
    """Each variant in its own width and depth; the single blocks' second layer looks square when packed to 2 bits."""
    variant, geometry = request.param
    return make_family(tmp_path_factory.mktemp(f"{variant}-{geometry}"), variant, geometry, tokenizer_folder)
