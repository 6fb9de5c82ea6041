"""Load Bonsai Pack: one bar over its three files, and what is still there is not loaded again."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from messages import reason

from bonsai_ops.tools import synthetic
from bonsai_ops.weights.errors import PackError

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


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system knows no modes of folders")
@pytest.mark.parametrize("part", ["vae", "text_encoder-mlx-4bit"])
def test_a_folder_that_may_not_be_listed(folder: Path, part: str) -> None:
    """Its files may be opened by name (mode 0711). The superuser may list any, and becomes another user for it."""
    from bonsai_ops.host.pack import load_pack

    load_pack(folder)
    with not_listed(folder, part), pytest.raises(PackError) as found:
        load_pack(folder)
    assert reason(found.value, folder / part).startswith("cannot be read (Permission denied). Allow the user")


@contextlib.contextmanager
def not_listed(folder: Path, part: str) -> Iterator[None]:
    """Inside, this process is a user who may read all of a folder but list one part of it."""
    if os.geteuid():
        (folder / part).chmod(0o311)  # the owner may do more than others
        yield
        return
    changed = {path: path.stat().st_mode for path in (*folder.parents, folder, *folder.rglob("*"))}
    for path, mode in changed.items():
        path.chmod(mode | 0o044 | 0o011 * path.is_dir())
    (folder / part).chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in changed.items():
            path.chmod(mode)


def test_a_file_that_goes_while_the_folder_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bonsai_ops.host import pack

    listed = Path.iterdir

    def list_and_take_away(place: Path) -> list[Path]:
        found = list(listed(place))
        if place.name == "vae":
            (place / "config.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "iterdir", list_and_take_away)
    whole = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.parts[-2:] == ("vae", "config.json") or whole(path))
    with pytest.raises(PackError, match="does not exist"):
        pack.load_pack(folder)


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
