"""Files that go away, change or shrink under a model, a disk that is full while one is saved, memory that runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import said_by
from messages import reason
from small_disk import OTHERS, fill, small_disk
from twins import SMALL, bfl_lora, draw, with_lora, write_pack

from bonsai_ops.tools import synthetic
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.new_file import MAKE_ROOM, MB

pytestmark = pytest.mark.host

WRITERS: dict[str, Callable[[Path, int], object]] = {
    "model.safetensors": lambda path, seed: write_pack(path, "ternary", seed=seed),
    "state_dict.pt": lambda path, seed: synthetic.write_gemlite(path, "ternary", SMALL, seed),
}
CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "deleted": lambda path, other: path.unlink(),
    "replaced": lambda path, other: os.replace(other, path),
    "shortened": lambda path, other: os.truncate(path, 64),
    "overwritten": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
}
KEEPS = ("deleted", "replaced")
"""Changes after which the pages of a mapped file are what they were. The others need --disable-mmap, as README says."""
each_file = pytest.mark.parametrize("name", WRITERS)
each_change = pytest.mark.parametrize(
    ("change", "mapped"), [*((c, True) for c in KEEPS), *((c, False) for c in CHANGES)], ids=str
)


@pytest.fixture
def pair_of_files(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A pack, and another of its size."""
    found = []
    for seed, folder in enumerate(("a", "b")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        WRITERS[name](path, seed)
        found.append(path)
    return found[0], found[1]


@pytest.fixture
def load(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """(path, mapped, progress) -> MODEL in fp32. mapped: as without --disable-mmap."""
    from comfy.cli_args import args

    from bonsai_ops.host.loader import load_bonsai_model

    def make(path: Path, mapped: bool = True, progress: Callable[[int, int], None] | None = None) -> Any:
        monkeypatch.setattr(args, "disable_mmap", not mapped)
        return load_bonsai_model(path, {"compute_dtype": "fp32"}, progress=progress)

    yield make
    comfy.model_management.unload_all_models()


def width_of(model: Any) -> dict[str, Any]:
    from twins import text

    states = text(width=model.model.diffusion_model.txt_in.weight.shape[1])
    return {"positive": states, "negative": states}


@each_file
@each_change
def test_a_file_that_changes_while_it_draws(
    change: str, mapped: bool, name: str, pair_of_files: tuple[Path, Path], load: Callable[..., Any]
) -> None:
    """The picture is that of the file as it was loaded."""
    path, other = pair_of_files
    model = load(path, mapped)
    expected = draw(model, **width_of(model))
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(len(calls))
        if len(calls) == 2:  # between two steps
            CHANGES[change](path, other)

    handle = model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(hook)
    found = draw(model, **width_of(model))
    handle.remove()
    assert len(calls) == 2 and torch.equal(found, expected) and torch.equal(draw(model, **width_of(model)), expected)
    if change == "deleted":
        with pytest.raises(PackError, match=r"does not exist\. Put the pack under"):
            model.clone(disable_dynamic=True) if mapped else load(path)
            load(path)


@each_file
@each_change
def test_a_file_that_changes_while_it_is_loaded(
    change: str, mapped: bool, name: str, pair_of_files: tuple[Path, Path], load: Callable[..., Any]
) -> None:
    """It is the file that was opened, or one sentence says that it ends; overwritten values are whatever they are."""
    path, other = pair_of_files
    raw, undisturbed = path.read_bytes(), load(path)
    expected = draw(undisturbed, **width_of(undisturbed))
    moves: list[int] = []

    def progress(done: int, total: int) -> None:
        moves.append(done)
        if len(moves) == 2:
            CHANGES[change](path, other)

    try:
        model = load(path, mapped, progress)
    except PackError as error:
        assert change in ("shortened", "overwritten") and not mapped
        said = reason(error, path)
        assert said.endswith((".", "it"))
        assert change == "overwritten" or "Wait until it is all there" in said
    else:
        assert len(moves) > 2
        if change in KEEPS or name.endswith(".pt"):  # the latter is read whole when it is opened
            assert torch.equal(draw(model, **width_of(model)), expected)
    path.write_bytes(raw)
    again = load(path, mapped)
    assert torch.equal(draw(again, **width_of(again)), expected)


def test_a_quota_while_a_model_is_saved(
    load: Callable[..., Any], lora_file: Callable[..., str], tmp_path: Path
) -> None:
    """With and without its LoRAs: nothing is left, and the next time it is saved."""
    resource = pytest.importorskip("resource")
    from bonsai_ops.host.save import save_bonsai_model

    model = with_lora(load(write_pack(tmp_path / "m" / "model.safetensors", "ternary")), lora_file(bfl_lora()))
    kept, folder = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out"
    for loras in (False, True):
        path = folder / f"{loras}.safetensors"
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, kept[1]))
        try:
            with pytest.raises(PackError, match=r"needs [\d.]+ MB, and there is no room for it \(File too large\)"):
                save_bonsai_model(model, path, include_loras=loras)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        assert list(folder.iterdir()) == []
        save_bonsai_model(model, path, include_loras=loras)
        load(path)
        path.unlink()


@pytest.mark.parametrize("loras", [False, True])
def test_a_disk_that_is_full_while_a_model_is_saved(
    loras: bool, load: Callable[..., Any], lora_file: Callable[..., str], comfy_base_directory: Path, tmp_path: Path
) -> None:
    """There was room when it began. Nothing is left or offered; elsewhere, or with room, the next save succeeds."""
    from bonsai_ops.host import folders
    from bonsai_ops.host.save import save_bonsai_model

    folders.register()
    model = with_lora(load(write_pack(tmp_path / "m" / "model.safetensors", "ternary")), lora_file(bfl_lora()))
    kept = model if loras else load(tmp_path / "m" / "model.safetensors")
    expected = draw(kept, **width_of(kept))
    place, elsewhere = comfy_base_directory / "models" / "diffusion_models" / "small", tmp_path / "saved.safetensors"
    path = place / "saved.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    written: list[int] = []

    def progress(done: int, _: int) -> None:
        if done and not written:
            fill(place)
            written.append(done)

    def offered() -> list[str]:
        return [name for name in folders.model_names() if "small/" in name]

    try:
        with small_disk(place, 16 << 20, "disk"):
            with pytest.raises(PackError) as during:
                save_bonsai_model(model, path, progress=progress, include_loras=loras)
            assert written and [left.name for left in place.iterdir()] == [OTHERS] and offered() == []
            with pytest.raises(PackError) as before:
                save_bonsai_model(model, path, include_loras=loras)
            assert [left.name for left in place.iterdir()] == [OTHERS]
            save_bonsai_model(model, elsewhere, include_loras=loras)
            needs = f"needs {elsewhere.stat().st_size / MB:,.1f} MB, and"
            full = "there is no room for it (No space left on device)"
            assert reason(during.value, path) == f"{needs} {full}. {MAKE_ROOM}"
            assert reason(before.value, path) == f"{needs} 0.0 MB are left for it. {MAKE_ROOM}"
            (place / OTHERS).unlink()
            save_bonsai_model(model, path, include_loras=loras)
            assert offered() == ["small/saved.safetensors"]
            for saved in (path, elsewhere):
                assert torch.equal(draw(load(saved), **width_of(model)), expected)
    finally:
        place.rmdir()


def test_what_ended_processes_left_is_not_offered(comfy: Any, comfy_base_directory: Path) -> None:
    """Under the names of this version and of earlier ones."""
    from bonsai_ops.host import folders

    folders.register()
    whole = write_pack(comfy_base_directory / "models" / "bonsai" / "left" / "model.safetensors", "binary")
    names = (".bonsai-0123456789abcdef.part", ".model.safetensors.k3l_x9.part")
    for name in names:
        whole.with_name(name).write_bytes(whole.read_bytes()[:1000])
    try:
        offered = [*folders.model_names(), *folders.text_encoder_names(), *folders.pack_names()]
        assert "left/model.safetensors" in offered and not any(".part" in name for name in offered)
        assert folders.model_path("left/model.safetensors") == whole
    finally:
        for path in list(whole.parent.iterdir()):
            path.unlink()
        whole.parent.rmdir()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what a process has")
def test_memory_runs_out(comfyui_path: Path, tmp_path: Path) -> None:
    """While a model is loaded, drawn with and patched: told as that, and the next try gives the same bits."""
    found = said_by("memory_child.py", comfyui_path, tmp_path)
    assert set(found) == {"load model.safetensors", "load state_dict.pt", "draw", "patch"}
    for work, told in found.items():
        assert told["failed"] >= 2, f"{work}: the limits were too wide"
        assert told["wrong"] == [] and not told["other"], (work, told)
