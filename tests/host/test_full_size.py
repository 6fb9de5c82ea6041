"""The 4B model in its true size: synthetic packs with the real shapes through the real host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from twins import with_short_texts

from bonsai_ops.tools.bench import memory

pytestmark = [pytest.mark.host, pytest.mark.slow]

LIMITS = {"ternary": 1.19e9, "binary": 0.91e9}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the packs, 4.5 GB, which does not stay until the end of the run."""
    folder = tmp_path_factory.mktemp("full-size")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def figures(work: Path, comfyui_path: Path) -> dict:
    return memory.measure(comfyui_path, work, dense=False)


@pytest.mark.parametrize("variant", LIMITS)
def test_size_and_memory(figures: dict, variant: str) -> None:
    """Resident bytes, file size and peak memory while the native file is loaded and every page of it read."""
    row = figures[variant]
    assert row["resident_bytes"] <= LIMITS[variant]
    assert row["file_bytes"] <= row["resident_bytes"] + 100_000
    assert row["peak_rss_bytes"] <= 1.25 * row["file_bytes"] + figures["idle_rss_bytes"]


@pytest.mark.parametrize("variant", LIMITS)
def test_one_step(figures: dict, work: Path, variant: str, comfyui_path: Path) -> None:
    """One step, of few tokens, is finite and does not unpack the model: its size stays what it was."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.sampling import sample_official

    with torch.inference_mode():
        model = with_short_texts(load_bonsai_model(work / variant / "native.safetensors"))
        embeds = torch.randn(1, 32, 7680, generator=torch.Generator().manual_seed(0))
        empty = {"samples": torch.zeros(1, 128, 4, 8)}
        latent = sample_official(model, [[embeds, {"pooled_output": None}]], empty, 0, 1, 1.0)["samples"]
    assert bool(torch.isfinite(latent).all())
    assert float(latent.std()) > 0
    assert model.model_size() <= LIMITS[variant]
