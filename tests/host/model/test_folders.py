"""Where models are found: what the nodes offer, in which folder, and a start with a models folder that is none."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from released import RELEASED
from twins import run_node

from bonsai_ops.tools import synthetic
from bonsai_ops.weights.errors import PackError

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[3]
TRANSFORMER = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"
KINDS = ("bonsai", "diffusion_models", "text_encoders", "loras")


@pytest.fixture
def models(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models folder, an empty one for this test; what is registered in it is forgotten afterwards."""
    import folder_paths

    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(folder))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # else lists of a folder that is gone stay
    known = folder_paths.folder_names_and_paths
    for kind in KINDS[1:]:
        monkeypatch.setitem(known, kind, ([str(folder / kind)], known[kind][1]))
    if "bonsai" in known:
        monkeypatch.delitem(known, "bonsai")
    else:
        monkeypatch.setitem(known, "bonsai", ([], set()))
        del known["bonsai"]
    return folder


@pytest.fixture
def start(comfy: Any) -> Iterator[Callable[[], list[str]]]:
    """Starts the plugin as ComfyUI does; returns the ids of its nodes."""
    name = "bonsai_started"

    def begin() -> list[str]:
        spec = importlib.util.spec_from_file_location(
            name, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

        async def load() -> list[str]:
            extension = await sys.modules[name].comfy_entrypoint()
            await extension.on_load()
            return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]

        return asyncio.run(load())

    yield begin
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def own_loop(path: Path) -> None:
    path.symlink_to(path)


def a_file(path: Path) -> None:
    path.write_text("not a folder")


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("not a folder")


def read_only(path: Path) -> None:
    path.parent.chmod(0o555)
    if os.access(path.parent, os.W_OK):
        pytest.skip("this user writes anywhere")


@pytest.mark.parametrize("spoil", [dangling, own_loop, a_file, below_a_file, read_only])
def test_the_nodes_start_without_a_folder_for_packs(
    spoil: Callable[[Path], None], models: Path, start: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(models / "bonsai")
    with caplog.at_level(logging.WARNING):
        nodes = start()
    models.chmod(0o755)
    assert len(nodes) == len(RELEASED)
    told = [record.getMessage() for record in caplog.records if str(models / "bonsai") in record.getMessage()]
    assert len(told) == 1 and "\n" not in told[0] and "Bonsai: " in told[0] and "press R" in told[0]
    folders = sys.modules["bonsai_started.bonsai_ops.host.folders"]
    assert folders.pack_names() == ["seedling"] and folders.pack_path("seedling").is_dir()
    if models.is_dir():
        if (models / "bonsai").is_symlink() or (models / "bonsai").exists():
            (models / "bonsai").unlink()
        synthetic_folder(models / "bonsai" / "late")
        assert folders.pack_names() == ["late", "seedling"]  # found as soon as the folder is right


def test_the_nodes_start_beside_a_folder_that_cannot_be_read(models: Path, start: Callable) -> None:
    """A folder that may be listed but not entered, such as another user's, and a link to nowhere in it."""
    inner = models / "diffusion_models" / "theirs"
    (inner / "deeper").mkdir(parents=True)
    (models / "diffusion_models" / "gone").symlink_to(models / "nowhere")
    (models / "diffusion_models" / "a.safetensors").write_bytes(b"")
    inner.chmod(0o444)
    assert len(start()) == len(RELEASED)
    inner.chmod(0o755)
    folders = sys.modules["bonsai_started.bonsai_ops.host.folders"]
    assert "a.safetensors" in folders.model_names()


def links_to_itself(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).symlink_to(".", target_is_directory=True)


def links_up_and_down(folder: Path) -> None:
    (folder / "x").mkdir()
    for name in ("a", "b"):
        (folder / "x" / name).symlink_to("..", target_is_directory=True)


def two_ways_thirty_times(folder: Path) -> None:
    for number in range(30):
        (folder / str(number)).mkdir()
        for name in ("a", "b"):
            (folder / str(number) / name).symlink_to(f"../{number + 1}", target_is_directory=True)
    (folder / "30").mkdir()


@pytest.mark.parametrize("tangle", [links_to_itself, links_up_and_down, two_ways_thirty_times])
def test_links_that_have_no_end(tangle: Callable[[Path], None], models: Path, folders: Any) -> None:
    """A cloned repository can carry them: the list of names took for ever, in the thread that answers the page."""
    pack = synthetic_folder(models / "bonsai" / "pack")
    tangle(pack)
    found: list[list[str]] = []
    listing = threading.Thread(target=lambda: found.append(folders.pack_names()), daemon=True)
    listing.start()
    listing.join(20)
    assert found, "it still looks"
    assert found == [["pack", "seedling"]] and len(folders.model_names()) < 100


def test_folders_behind_links_are_offered_under_both_names(models: Path, folders: Any) -> None:
    """Shared workflows name files by either."""
    synthetic_folder(models / "bonsai" / "real")
    (models / "bonsai" / "link").symlink_to("real", target_is_directory=True)
    assert folders.pack_names() == ["link", "real", "seedling"]


@pytest.mark.parametrize("name", ["a" * 300, "a" * 200 + "/" + "b" * 5000, "a\0b"])
def test_names_that_no_folder_can_have(name: str, models: Path, folders: Any) -> None:
    with pytest.raises(PackError, match="is not in models/bonsai"):
        folders.pack_path(name)


def test_a_path_is_one_line_of_the_log(
    models: Path, start: Callable, folders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever names a folder writes no lines of their own there, whichever part of a pack is loaded."""
    from bonsai_ops.host.pack import load_pack

    pack = models / "bonsai" / "a\n\x1b[31mBonsai: all is well"
    synthetic.write_pipeline(pack, text=synthetic.TextGeometry(hidden=64, mlp=64, heads=1, key_heads=1, layers=29))
    with caplog.at_level(logging.INFO):
        clip = load_pack(pack)[1]
        node = "comfy_extras.nodes_textgen.TextGenerate"
        run_node(node, clip=clip, prompt="a", max_length=1, sampling_mode={"sampling_mode": "off"})
    told = [record for record in caplog.records if "all is well" in record.getMessage()]
    assert {record.module for record in told} == {"generation", "loader", "text_encoder", "vae"}
    assert all(record.getMessage().isprintable() for record in told)


def synthetic_folder(folder: Path) -> Path:
    """The files of a pack, empty: what lists of names look at."""
    for name in (TRANSFORMER, "text_encoder-mlx-4bit/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def folders(models: Path) -> Any:
    from bonsai_ops.host import folders

    folders.register()
    return folders


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.as_posix().encode())
    return path


def test_every_ending_that_we_read_is_offered(models: Path, folders: Any) -> None:
    import folder_paths

    names = ("a.gguf", "deep/b.GGUF", "c.SAFETENSORS", "d.Sft", "e.pt", "f.safetensors")
    for kind in ("diffusion_models", "bonsai"):
        for name in names:
            touch(models / kind / kind / name)
        touch(models / kind / "readme.txt")
    offered = folders.model_names()
    assert {f"{kind}/{name}" for name in names for kind in ("diffusion_models", "bonsai")} <= set(offered)
    assert not any(name.endswith(".txt") for name in offered) and len(set(offered)) == len(offered)
    path = folders.model_path("diffusion_models/deep/b.GGUF")
    assert path == models / "diffusion_models" / "diffusion_models" / "deep" / "b.GGUF"
    for name in ("g.PT", "h.Safetensors"):
        touch(models / "text_encoders" / name)
        assert name in folders.text_encoder_names() and folders.text_encoder_path(name).is_file()
    stock = folder_paths.get_filename_list("diffusion_models")
    assert not any(name.lower().endswith(".gguf") for name in stock)  # UNETLoader cannot read it


def test_a_file_with_a_large_ending_is_loaded(models: Path, folders: Any, packs: Any) -> None:
    from bonsai_ops.host.loader import load_bonsai_model

    (models / "diffusion_models").mkdir()
    shutil.copy(packs["ternary"], models / "diffusion_models" / "BONSAI.SAFETENSORS")
    assert "BONSAI.SAFETENSORS" in folders.model_names()
    model = load_bonsai_model(folders.model_path("BONSAI.SAFETENSORS"))
    assert model.get_attachment("bonsai").packed_layers == 22


def test_lists_follow_the_disk(models: Path, folders: Any) -> None:
    assert folders.pack_names() == ["seedling"]
    pack = synthetic_folder(models / "bonsai" / "one")
    late = touch(models / "diffusion_models" / "late" / "m.gguf")
    assert folders.pack_names() == ["one", "seedling"] and "late/m.gguf" in folders.model_names()
    late.unlink()
    shutil.rmtree(pack)
    assert folders.pack_names() == ["seedling"] and "late/m.gguf" not in folders.model_names()
    shutil.rmtree(models)
    assert folders.pack_names() == ["seedling"]


@pytest.mark.parametrize("first", ["yaml", "plugin"])
def test_extra_model_paths_name_folders_for_packs(first: str, models: Path, comfyui_path: Path, tmp_path: Path) -> None:
    from bonsai_ops.host import folders

    spec = importlib.util.spec_from_file_location("extra_config", comfyui_path / "utils" / "extra_config.py")
    extra = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extra)
    synthetic_folder(tmp_path / "a" / "both")
    synthetic_folder(tmp_path / "b" / "both")
    (tmp_path / "a" / "whole").mkdir()  # begun there, whole in the other
    synthetic_folder(tmp_path / "b" / "whole")
    touch(tmp_path / "b" / "single.gguf")
    file = tmp_path / "extra_model_paths.yaml"
    file.write_text(f"mine:\n  base_path: {tmp_path}\n  bonsai: |\n    a\n    b\n    missing\n")
    steps = [lambda: extra.load_extra_path_config(str(file)), folders.register]
    for step in steps if first == "yaml" else steps[::-1]:
        step()
    assert folders.pack_names() == ["both", "seedling", "whole"]
    assert folders.pack_path("both") == tmp_path / "a" / "both"
    assert folders.pack_path("whole") == tmp_path / "b" / "whole"
    assert "single.gguf" in folders.model_names() and folders.model_path("single.gguf").is_file()
    assert folders.model_path(f"both/{TRANSFORMER}") == tmp_path / "a" / "both" / TRANSFORMER
    synthetic_folder(tmp_path / "missing" / "later")
    assert "later" in folders.pack_names()
    synthetic_folder(models / "bonsai" / "both")
    assert folders.pack_path("both") == models / "bonsai" / "both"  # ComfyUI's own folder before extra ones


def test_a_repository_without_a_folder_of_its_own_is_a_pack(
    models: Path, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.vae import load_vae

    assert folders.NO_FOLDER not in folders.pack_names()
    synthetic.write_pipeline(models / "bonsai")
    assert folders.pack_names() == ["seedling", folders.NO_FOLDER]
    assert "no folder of its own" in folders.NO_FOLDER and "models/bonsai" in folders.NO_FOLDER
    path = folders.pack_path(folders.NO_FOLDER)
    assert path == models / "bonsai"
    assert load_bonsai_model(path).get_attachment("bonsai").packed_layers and load_vae(path) is not None
    shutil.rmtree(models / "bonsai" / "vae")
    with pytest.raises(PackError, match=r"holds no vae/diffusion_pytorch_model.safetensors"):
        folders.pack_path(folders.NO_FOLDER)


@pytest.mark.parametrize("name", ["gone", "../diffusion_models", "/", "bonsai/../.."])
def test_no_other_folder_is_taken_for_a_pack(name: str, models: Path, folders: Any) -> None:
    synthetic_folder(models / "diffusion_models")
    with pytest.raises(PackError, match="is not in models/bonsai"):
        folders.pack_path(name)


def test_a_pack_with_a_rotated_text_encoder_is_refused_before_anything_is_loaded(models: Path, start: Callable) -> None:
    """By Load Bonsai Pack, before it looks into the VAE, which is damaged here."""
    pack = models / "bonsai" / "pack"
    synthetic.write_pipeline(pack)
    (pack / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (pack / "text_encoder-mlx-4bit" / "config.json").write_text('{"model_type": "prism_hadamard_qwen3"}')
    start()
    node = sys.modules["bonsai_started.nodes.load_pack"].LoadBonsaiPack
    with pytest.raises(ValueError, match=r"model_type prism_hadamard_qwen3 in config\.json beside it: .*rotated"):
        node.execute("pack")
