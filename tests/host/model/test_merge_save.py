"""Merge nodes with dense and packed partners, ComfyUI's own ModelSave and Save Bonsai Model, all against the twin."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from twins import (
    LINEAR1,
    QKV,
    SHAPES,
    Pair,
    bfl_lora,
    draw,
    load_stock,
    loaded,
    low_rank,
    packed_layers,
    predict,
    relative,
    run_node,
    run_node_outputs,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
)

pytestmark = pytest.mark.host

MERGING = "comfy_extras.nodes_model_merging."


def load(path: Path) -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(path, {"compute_dtype": "fp32"})


@pytest.fixture
def save_stock(comfy_base_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """A function that saves a MODEL with ComfyUI's ModelSave node and returns the file."""

    def save(model: Any) -> Path:
        folder = comfy_base_directory / "output" / "merge"
        before = set(folder.glob("*"))
        run_node_outputs(f"{MERGING}ModelSave", model=model, filename_prefix="merge/m")
        (path,) = set(folder.glob("*")) - before
        return path

    return save


def save_ours(model: Any, path: Path) -> Path:
    from bonsai_ops.host.save import save_bonsai_model

    save_bonsai_model(model, path)
    return path


def test_a_workflow_that_names_our_record(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Notes that other nodes put into extra_pnginfo took the place of our record: nothing could load the file."""
    from bonsai_ops.host.save import save_bonsai_model, workflow_metadata
    from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile

    pair, path = make_pair("ternary"), tmp_path / "m.safetensors"
    notes = {"bonsai": {"a": 1}, "format": "webp", "prompt": 3, "where": Path("x"), "workflow": {}}
    save_bonsai_model(pair.packed, path, extra=workflow_metadata({"1": {}}, notes))
    load(path)
    metadata = SafetensorsFile(path).metadata
    assert {name: metadata[name] for name in ("prompt", "prompt_", "bonsai_", "format_", "workflow")} == {
        "prompt": '{"1": {}}',
        "prompt_": "3",
        "bonsai_": '{"a": 1}',
        "format_": '"webp"',
        "workflow": "{}",
    }


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
@pytest.mark.parametrize("partner", ["dense", "packed"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_merge(make_pair: Callable[..., Pair], partner: str, order: str, memory: int) -> None:
    """ModelMergeSimple of two models, the packed one first or second: the result is that of the two dense ones."""
    a, b = make_pair("ternary"), make_pair("binary")
    other = b.dense if partner == "dense" else b.packed
    models, twins = (a.packed, other), (a.dense, b.dense)
    if order == "second":
        models, twins = models[::-1], twins[::-1]
    first = predict(loaded(a.packed))
    unloaded(a.packed)
    merged, truth = (
        run_node(f"{MERGING}ModelMergeSimple", model1=m1, model2=m2, ratio=0.3) for m1, m2 in (models, twins)
    )
    found, expected = predict(loaded(merged, memory)), predict(loaded(truth))
    assert relative(found, expected) < 1e-5 and relative(found, first) > 1e-2
    unloaded(merged)
    unloaded(truth)
    assert torch.equal(predict(loaded(a.packed)), first)
    unloaded(a.packed)


@pytest.mark.parametrize("node", ["ModelSubtract", "ModelAdd", "ModelMergeBlocks", "ModelMergeFlux1"])
def test_other_merge_nodes(make_pair: Callable[..., Pair], node: str) -> None:
    """ModelSubtract and ModelAdd with a multiplier, ModelMergeBlocks by block."""
    a, b = make_pair("ternary"), make_pair("affine")
    name = f"{MERGING}{node}"
    options: dict[str, Any] = {"multiplier": 0.4} if node == "ModelSubtract" else {}
    if node == "ModelMergeBlocks":
        options = {"input": 0.2, "middle": 0.5, "out": 0.9}
    if node == "ModelMergeFlux1":
        name = "comfy_extras.nodes_model_merging_model_specific.ModelMergeFlux1"
        options = {"double_blocks.0.": 0.2, "single_blocks.1.": 0.7}
    if node == "ModelMergeBlocks":
        from comfy_extras.nodes_model_merging import NODE_CLASS_MAPPINGS

        from_node = NODE_CLASS_MAPPINGS["ModelMergeBlocks"]
    elif node == "ModelMergeFlux1":
        from comfy_extras.nodes_model_merging_model_specific import NODE_CLASS_MAPPINGS

        from_node = NODE_CLASS_MAPPINGS.get("ModelMergeFlux1")
    else:
        from_node = None
    merged = []
    for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense)):
        if from_node is None:
            merged.append(run_node(name, model1=m1, model2=m2, **options))
        else:
            merged.append(getattr(from_node(), from_node.FUNCTION)(model1=m1, model2=m2, **options)[0])
    assert relative(predict(loaded(merged[0])), predict(loaded(merged[1]))) < 1e-5
    for model in merged:
        unloaded(model)


def test_a_merge_with_a_lora_behind_it(make_pair: Callable[..., Pair], lora_file: Callable[..., str]) -> None:
    a, b = make_pair("ternary"), make_pair("binary")
    name = lora_file(bfl_lora())
    found, truth = (
        with_lora(run_node(f"{MERGING}ModelMergeSimple", model1=m1, model2=m2, ratio=0.6), name, 0.5)
        for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense))
    )
    assert relative(draw(found), draw(truth)) < 1e-5


def test_a_merge_is_dense_until_it_is_unloaded(make_pair: Callable[..., Pair]) -> None:
    a, b = make_pair("ternary"), make_pair("binary")
    state = state_bytes(a.packed)
    merged = run_node(f"{MERGING}ModelMergeSimple", model1=a.packed, model2=b.packed, ratio=0.5)
    assert packed_layers(loaded(merged)) == 0
    unloaded(merged)
    assert packed_layers(a.packed) == 22 and same_state(state_bytes(a.packed), state)


@pytest.mark.parametrize("outside", ["loading", "unloading", "both"])
def test_unloading_a_merge_outside_of_inference_mode(make_pair: Callable[..., Pair], comfy: Any, outside: str) -> None:
    """ComfyUI runs nodes in inference mode and "Unload Models" out of it: an error there ends the thread that draws."""
    with torch.inference_mode(outside == "unloading"):
        a, b = make_pair("ternary"), make_pair("binary")
    state = state_bytes(a.packed)
    for _ in range(2):
        with torch.inference_mode():
            merged, truth = (
                run_node(f"{MERGING}ModelMergeSimple", model1=m1, model2=m2, ratio=0.3)
                for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense))
            )
            assert relative(draw(merged), draw(truth)) < 1e-5
        with torch.inference_mode(outside == "loading"):
            comfy.model_management.unload_all_models()
        with torch.inference_mode():
            a.check()
    with torch.inference_mode(outside == "loading"):
        comfy.model_management.unload_all_models()
    assert packed_layers(a.packed) == 22 and same_state(state_bytes(a.packed), state)


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_model_save_round_trip(
    each_pair: Pair, save_stock: Callable[[Any], Path], comfy: Any, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """ComfyUI's ModelSave: the same codes, tables and dense tensors in the file, and the file loads as the model.

    offloaded: ModelSave finds the model loaded without any resident layer.
    """
    drawn, state = draw(each_pair.packed), state_bytes(each_pair.packed)
    comfy.model_management.unload_all_models()
    if memory:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **_: loaded(models[0], memory))
    path = save_stock(each_pair.packed)
    monkeypatch.undo()
    unloaded(each_pair.packed)
    saved = load_file(path)
    for name, tensor in state.items():
        if name.startswith("diffusion_model."):
            assert torch.equal(saved[f"model.{name}"], tensor) and saved[f"model.{name}"].dtype == tensor.dtype
    assert torch.equal(draw(load(path)), drawn)


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_a_saved_merge_is_dense(
    make_pair: Callable[..., Pair],
    save_stock: Callable[[Any], Path],
    comfy: Any,
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
) -> None:
    """ModelSave of a merge writes what the merge computes with; ComfyUI's own loader reads it."""
    a, b = make_pair("ternary"), make_pair("binary")
    merged = run_node(f"{MERGING}ModelMergeSimple", model1=a.packed, model2=b.dense, ratio=0.5)
    drawn = draw(merged)
    comfy.model_management.unload_all_models()
    if memory:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **_: loaded(models[0], memory))
    path = save_stock(merged)
    monkeypatch.undo()
    unloaded(merged)
    state_dict = load_file(path)
    assert not any(name.endswith(("weight_scale", "weight_zero")) for name in state_dict)
    assert state_dict[f"model.{QKV}"].dtype == torch.float32
    stock = load_stock({n.removeprefix("model.diffusion_model."): t for n, t in state_dict.items()})
    assert relative(draw(stock), drawn) < 1e-5
    assert packed_layers(a.packed) == 22


def test_model_save_refuses_a_lora(
    pair: Pair, save_stock: Callable[[Any], Path], lora_file: Callable[..., str], comfy_base_directory: Path
) -> None:
    """It can neither merge a LoRA into codes nor keep it apart: it says so, names the way out and writes nothing."""
    model = with_lora(pair.packed, lora_file(bfl_lora()))
    folder = comfy_base_directory / "output" / "merge"
    before = set(folder.glob("*"))
    with pytest.raises(ValueError, match=r"LoRA.*Save Bonsai Model"):
        save_stock(model)
    assert set(folder.glob("*")) == before
    assert torch.equal(draw(pair.packed), draw(load(pair.path)))


def test_model_save_of_a_lora_on_dense_layers_only(
    pair: Pair, save_stock: Callable[[Any], Path], lora_file: Callable[..., str]
) -> None:
    """A patch that touches no packed layer is merged as ComfyUI does."""
    layer = "diffusion_model.double_stream_modulation_img.lin"
    model = with_lora(pair.packed, lora_file(low_rank({layer: SHAPES[f"{layer}.weight"]})), 0.5)
    drawn = draw(model)
    assert relative(draw(load(save_stock(model))), drawn) < 1e-6


@pytest.mark.parametrize("memory", [None, 0, 1], ids=["never loaded", "resident", "offloaded"])
def test_our_save_round_trip(each_pair: Pair, tmp_path: Path, memory: int | None) -> None:
    """Save Bonsai Model in each state of the model: the same tensors, the same picture."""
    state = state_bytes(each_pair.packed)
    if memory is not None:
        loaded(each_pair.packed, memory)
    path = save_ours(each_pair.packed, tmp_path / "saved.safetensors")
    unloaded(each_pair.packed)
    again = load(path)
    assert same_state(state_bytes(again), state)
    assert torch.equal(draw(again), draw(each_pair.packed))


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_our_save_leaves_loras_apart(
    pair: Pair, tmp_path: Path, lora_file: Callable[..., str], caplog: pytest.LogCaptureFixture, memory: int
) -> None:
    """The file holds the base, also of the dense layers that ComfyUI has patched; the log says so."""
    model = loaded(with_lora(pair.packed, lora_file(bfl_lora())), memory)
    with caplog.at_level(logging.WARNING):
        path = save_ours(model, tmp_path / "saved.safetensors")
    assert any("without them" in r.message for r in caplog.records)
    unloaded(model)
    assert same_state(state_bytes(load(path)), state_bytes(pair.packed))


def test_our_save_refuses_a_merge(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """A merge is dense: the base alone would be another model."""
    a, b = make_pair("ternary"), make_pair("binary")
    merged = run_node(f"{MERGING}ModelMergeSimple", model1=a.packed, model2=b.packed, ratio=0.5)
    with pytest.raises(ValueError, match=r"merge.*Save Model"):
        save_ours(merged, tmp_path / "saved.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_our_save_with_the_plugin_imported_twice(pair: Pair, second_import: str, tmp_path: Path) -> None:
    """Trap 19: a model of one import is saved by the other; a custom node is imported under a name of its own."""
    save = importlib.import_module(f"{second_import}.host.save")
    save.save_bonsai_model(pair.packed, tmp_path / "saved.safetensors")
    again = importlib.import_module(f"{second_import}.host.loader").load_bonsai_model(
        tmp_path / "saved.safetensors", {"compute_dtype": "fp32"}
    )
    assert torch.equal(draw(again), draw(pair.packed))
    assert packed_layers(again) == 22 and LINEAR1 in again.model.state_dict()
