"""Load Bonsai Pack: one bar over its three files, and what is still there is not loaded again."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bonsai_ops.tools import synthetic

pytestmark = pytest.mark.host

CHOICES = ({"mode": "a8", "layout": "fast"}, {"compute_dtype": "fp32", "memory": "classic"})


@pytest.fixture
def folder(comfy: Any, tmp_path: Path) -> Path:
    synthetic.write_pipeline(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def bar(comfy: Any) -> Iterator[list[tuple[int, int]]]:
    """What ComfyUI's own progress bars show: (done, total)."""
    seen: list[tuple[int, int]] = []
    kept = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda done, total, *more, **rest: seen.append((done, total)))
    yield seen
    comfy.utils.set_progress_bar_global_hook(kept)


def test_one_bar_that_never_goes_back(folder: Path, bar: list[tuple[int, int]]) -> None:
    """Text encoder and transformer each move it many times."""
    from bonsai_ops.host.pack import load_pack
    from bonsai_ops.host.progress import comfyui_bar

    counted: list[tuple[int, int]] = []
    to_comfyui = comfyui_bar()

    def move(done: int, total: int) -> None:
        counted.append((done, total))
        to_comfyui(done, total)

    load_pack(folder, progress=move)
    for seen in (counted, bar):  # ComfyUI leaves out what comes within a tenth of a second
        done = [value for value, _ in seen]
        assert done == sorted(done) and {total for _, total in seen} == {done[-1]}
    assert len({*counted}) > 10


def test_only_the_transformer_is_loaded_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As long as somebody holds text encoder and VAE; the bar is full at the end all the same."""
    from bonsai_ops.host.pack import load_pack

    model, clip, vae = load_pack(folder)
    for options in CHOICES:
        caplog.clear()
        counted: list[tuple[int, int]] = []
        with caplog.at_level(logging.INFO):
            other = load_pack(folder, options, progress=lambda done, total, to=counted: to.append((done, total)))
        assert other[0] is not model and other[1] is clip and other[2] is vae
        assert "text encoder" not in caplog.text and "VAE" not in caplog.text
        assert counted[-1][0] == counted[-1][1]
    held = weakref.ref(clip)
    del clip, vae, other
    gc.collect()
    assert held() is None, "nothing but the nodes' results holds a text encoder"


def test_other_files_are_loaded_again(folder: Path) -> None:
    """A file that was downloaded again in its place, and a CLIP for other folders of embeddings or another dtype."""
    from bonsai_ops.host.pack import load_pack

    packs = [load_pack(folder)]
    for changed in ("text_encoder-mlx-4bit/model.safetensors", "vae/config.json"):
        os.utime(folder / changed, ns=(1, 1))
        packs.append(load_pack(folder))
    packs.append(load_pack(folder, embedding_directory=[str(folder)]))
    packs.append(load_pack(folder, embedding_directory=[str(folder)], text_compute_dtype="bf16"))
    first, new_encoder, new_vae, elsewhere, other_dtype = ((id(clip), id(vae)) for _, clip, vae in packs)
    assert new_encoder[0] != first[0] and new_encoder[1] == first[1]
    assert new_vae[0] == new_encoder[0] and new_vae[1] != first[1]
    assert elsewhere[0] != new_vae[0] and elsewhere[1] == new_vae[1]
    assert other_dtype[0] != elsewhere[0] and other_dtype[1] == elsewhere[1]
