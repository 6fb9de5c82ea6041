"""Sampling keeps the memory of its results; afterwards none is kept, however it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import draw

pytestmark = pytest.mark.host


@pytest.fixture
def model(comfy: Any, packs: Mapping[str, Path]) -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32"})


@pytest.fixture
def kept(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were kept whenever a sampling ended; the layers of the tiny model count as large."""
    from bonsai_ops import kernels
    from bonsai_ops.kernels import reuse

    found: list[int] = []
    release = kernels.release_memory

    def noting() -> None:
        found.append(kernels.kept_bytes())
        release()

    monkeypatch.setattr(reuse, "LEAST_BYTES", 1)
    monkeypatch.setattr(kernels, "release_memory", noting)
    return found


def test_the_same_picture_on_used_memory(model: Any, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference mode, as ComfyUI runs nodes. Two prompts at once, so that results of several sizes live together."""
    from bonsai_ops import kernels

    with torch.inference_mode():
        found = [draw(model.clone(), steps=3, cfg=cfg) for cfg in (1.0, 3.0)]
        assert min(kept) > 0 and len(kept) == 2
        assert kernels.kept_bytes() == 0
        monkeypatch.setattr(kernels, "keep_memory", lambda: None)
        plain = [draw(model.clone(), steps=3, cfg=cfg) for cfg in (1.0, 3.0)]
    assert kept[2:] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_an_error_gives_the_memory_back(model: Any, kept: list[int]) -> None:
    from bonsai_ops import kernels

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a step")

    handle = model.model.diffusion_model.single_blocks[2].linear2.register_forward_hook(fail)
    try:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="middle of a step"):
            draw(model)
    finally:
        handle.remove()
    assert kept[0] > 0 and kernels.kept_bytes() == 0


def test_training_keeps_nothing(model: Any, kept: list[int]) -> None:
    """Its backward pass needs the results of every layer at once."""
    with torch.enable_grad():
        draw(model)
    assert kept == [0]
