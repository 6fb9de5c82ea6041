"""Resident, partly offloaded, unloaded and reloaded: the same result, true bytes in ComfyUI's accounts.

The device is the processor: ComfyUI's lowvram code runs as on a GPU (it moves patches from the weight to the cast), but
both sides of a move are the same memory. Dynamic VRAM needs CUDA; what its `load` does to a module is set here by hand.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import (
    LINEAR1,
    QKV,
    SHAPES,
    Pair,
    absent,
    bfl_lora,
    draw,
    imitate_dynamic,
    load_device,
    load_stock,
    loaded,
    low_rank,
    module_of,
    packed_layers,
    predict,
    read_dense,
    relative,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
)

pytestmark = [pytest.mark.host, pytest.mark.classic]


def offloaded_layers(model: Any) -> int:
    """Modules that ComfyUI casts at each call."""
    return sum(hasattr(m, "prev_comfy_cast_weights") for m in model.model.modules())


def casting_layers(model: Any) -> int:
    return sum(hasattr(m, "comfy_cast_weights") for m in model.model.modules())


def partly_loaded(model: Any) -> Any:
    """The model loaded with just enough memory that some layers are resident and some are not.

    ComfyUI reserves room to merge the patches of the largest layers, so the amount is found by trying.
    """
    for eighths in range(4, 64):
        loaded(unloaded(model), model.model_size() * eighths // 8)
        if 0 < offloaded_layers(model) < casting_layers(model):
            return model
    raise AssertionError("no amount of memory leaves this model partly loaded")


@pytest.fixture(params=["none", "lora", "dora"])
def patched(request: pytest.FixtureRequest, pair: Pair, lora_file: Callable[..., str]) -> Pair:
    """The pair without patches, with a LoRA everywhere, with a DoRA on one layer beside it."""
    if request.param == "none":
        return pair
    names = [lora_file(bfl_lora(alpha=2.0))]
    if request.param == "dora":
        tensors = low_rank({QKV.removesuffix(".weight"): SHAPES[QKV]}, names=("lora_up.weight", "lora_down.weight"))
        names.append(lora_file(tensors | {f"{QKV.removesuffix('.weight')}.dora_scale": torch.ones(SHAPES[QKV][0], 1)}))

    def change(model: Any) -> Any:
        for name in names:
            model = with_lora(model, name, 0.7)
        return model

    return pair.both(change)


def test_every_state_gives_the_same_result(patched: Pair) -> None:
    """Resident, partly and wholly offloaded, reloaded: 1e-6 of each other, 1e-5 of the dense twin."""
    model, truth = patched.packed, predict(loaded(patched.dense))
    state = state_bytes(patched.packed)
    resident = predict(loaded(model))
    assert offloaded_layers(model) == 0 and relative(resident, truth) < 1e-5
    partly = predict(partly_loaded(unloaded(model)))
    nothing = predict(loaded(unloaded(model), 1))
    assert offloaded_layers(model) == casting_layers(model) and packed_layers(model) == 22
    again = predict(loaded(unloaded(model)))
    assert torch.equal(again, resident)
    assert relative(partly, resident) < 1e-6 and relative(nothing, resident) < 1e-6
    unloaded(model)
    assert same_state(state_bytes(model), state)


def test_partly_unloaded_and_loaded_again(patched: Pair) -> None:
    """ModelPatcher.partially_unload in pieces down to nothing, then partially_load."""
    model = loaded(patched.packed)
    resident = predict(model)
    counts = [offloaded_layers(model)]
    while model.partially_unload(model.offload_device, 1) > 0:
        counts.append(offloaded_layers(model))
        assert counts[-1] > counts[-2]
        assert relative(predict(model), resident) < 1e-6
    assert len(counts) > 2 and packed_layers(model) == 22
    model.partially_load(model.load_device, 1e32)
    assert offloaded_layers(model) == 0
    assert torch.equal(predict(model), resident)
    unloaded(model)


def test_a_lora_is_added_while_offloaded(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Other patches on a model that is loaded: ComfyUI reloads it, nothing of the old patches stays."""
    first, second = lora_file(bfl_lora()), lora_file(bfl_lora(seed=4, rank=3))
    plain = draw(pair.packed)
    a, b = pair.both(lambda m: with_lora(m, first)), pair.both(lambda m: with_lora(m, second, 0.5))
    loaded(a.packed, 1)
    drawn = b.check()
    assert relative(drawn, draw(a.packed)) > 1e-3
    assert torch.equal(draw(b.packed), drawn) and torch.equal(draw(pair.packed), plain)


def test_the_matrices_of_a_lora_leave_with_the_layer(pair: Pair, lora_file: Callable[..., str]) -> None:
    """What a resident layer keeps prepared for its LoRA is given back as soon as the layer is moved."""
    model = loaded(with_lora(pair.packed, lora_file(bfl_lora())))
    predict(model)
    prepared = [weakref.ref(matrix) for module in _patched_modules(model) for matrix in module.resident_patch.kept]
    assert len(prepared) == 2 * 22
    model.partially_unload(model.offload_device, model.model_size() * 2)
    gc.collect()
    assert [ref for ref in prepared if ref() is not None] == []
    unloaded(model)


def _patched_modules(model: Any) -> list:
    return [m for m in model.model.modules() if getattr(m, "resident_patch", None) is not None]


def test_the_accounts_hold_true_bytes(pair: Pair, comfy: Any) -> None:
    """model_size is the sum of codes, tables and dense tensors; a loaded model counts as loaded by that size."""
    from bonsai_ops.host.inventory import attached_inventory

    parameters = dict(pair.packed.model.named_parameters())
    true = sum(
        sum(t.nbytes for t in p.state_dict("").values()) if hasattr(p, "_qdata") else p.nbytes
        for p in parameters.values()
    ) + sum(b.nbytes for b in pair.packed.model.buffers())
    report = attached_inventory(pair.packed)
    assert pair.packed.model_size() == true == comfy.model_management.module_size(pair.packed.model)
    assert report.packed_bytes == sum(
        sum(t.nbytes for t in p.state_dict("").values()) for p in parameters.values() if hasattr(p, "_qdata")
    )
    assert pair.packed.model_size() < 0.3 * pair.dense.model_size()
    comfy.model_management.load_models_gpu([pair.packed])
    assert pair.packed.loaded_size() == true
    entry = next(m for m in comfy.model_management.current_loaded_models if m.model is pair.packed)
    assert entry.model_memory() == true and entry.model_loaded_memory() == true
    comfy.model_management.unload_all_models()
    assert pair.packed.loaded_size() == 0


def test_partly_loaded_counts_what_is_resident(pair: Pair) -> None:
    size = pair.packed.model_size()
    partly_loaded(pair.packed)
    assert 0 < pair.packed.loaded_size() < size
    before = pair.packed.loaded_size()
    freed = pair.packed.partially_unload(pair.packed.offload_device, size)
    assert freed > 0 and pair.packed.loaded_size() == before - freed
    unloaded(pair.packed)


def test_three_models_in_one_graph(make_pair: Callable[..., Pair], comfy: Any) -> None:
    """Two Bonsai models and a dense one loaded together, drawn from in turn."""
    first, second = make_pair("ternary"), make_pair("binary")
    alone = draw(first.packed), draw(second.packed), draw(first.dense)
    models = [first.packed, second.packed, first.dense]
    comfy.model_management.load_models_gpu(models)
    assert {id(m.model) for m in comfy.model_management.current_loaded_models} == {id(m) for m in models}
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(draw(model), expected)


def test_unloading_returns_the_memory(comfy: Any, packs: Mapping[str, Path], lora_file: Callable[..., str]) -> None:
    """After the last reference is gone no tensor of the model, of its clones or of its LoRA is left."""
    from bonsai_ops.host.loader import load_bonsai_model

    model = with_lora(load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32"}), lora_file(bfl_lora()))
    draw(model)
    module = module_of(model, LINEAR1)
    watched = [weakref.ref(model), weakref.ref(model.model), weakref.ref(module.weight._qdata), weakref.ref(module)]
    del model, module
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []


@pytest.mark.parametrize("memory", ["auto", "classic"])
def test_memory_modes(comfy: Any, packs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    """classic asks ComfyUI for a model without dynamic VRAM, auto leaves the choice to it; both draw the same."""
    import comfy.sd

    from bonsai_ops.host.loader import load_bonsai_model

    asked, load = [], comfy.sd.load_diffusion_model_state_dict
    monkeypatch.setattr(
        comfy.sd,
        "load_diffusion_model_state_dict",
        lambda *args, **kwargs: (asked.append(kwargs.get("disable_dynamic")), load(*args, **kwargs))[1],
    )
    model = load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32", "memory": memory})
    assert asked == [memory == "classic"]
    monkeypatch.undo()
    assert relative(draw(model), draw(load_stock(read_dense(packs["ternary"])))) < 1e-5


def test_dynamic_vram_keeps_the_patch_as_a_branch(pair: Pair, lora_file: Callable[..., str]) -> None:
    """The patch of a packed layer is hidden from ComfyUI's cast, which would round it; dense layers show theirs."""
    changed = pair.both(lambda m: with_lora(m, lora_file(bfl_lora())))
    truth = predict(loaded(changed.dense))
    model = changed.packed
    imitate_dynamic(model)
    for key in SHAPES:
        module = module_of(model, key)
        assert (module.weight_lowvram_function is None) == ("modulation" not in key)
    for key in SHAPES:  # classic casts of the dense layers stand in for vbar's, which apply this function
        if "modulation" in key:
            module_of(model, key).weight_function = [module_of(model, key).weight_lowvram_function]
    found = predict(model)
    assert relative(found, truth) < 1e-5
    assert torch.equal(predict(model), found)
    for key in SHAPES:
        module_of(model, key).weight_lowvram_function = None
        module_of(model, key).weight_function = []
    assert relative(predict(model), predict(loaded(unloaded(pair.dense)))) < 1e-5


def test_dynamic_vram_forces_small_layers(pair: Pair, lora_file: Callable[..., str], comfy_version: str) -> None:
    """patch_weight_to_device(force_cast=True) loads a packed layer as it is; its patch becomes the resident branch."""
    if comfy_version < "0.24":
        absent("load of single layers by force")
    changed = pair.both(lambda m: with_lora(m, lora_file(bfl_lora())))
    model = changed.packed
    imitate_dynamic(model)
    for key in SHAPES:
        module_of(model, key).weight_lowvram_function = None
        model.patch_weight_to_device(key, device_to=load_device(), force_cast=True)
    assert packed_layers(model) == 22
    assert relative(predict(model), predict(loaded(changed.dense))) < 1e-5
    model.unpatch_model(model.offload_device)
    assert relative(predict(model), predict(loaded(unloaded(pair.dense)))) < 1e-5


def test_an_older_dynamic_patch_does_not_join_a_forced_one(pair: Pair, lora_file: Callable[..., str]) -> None:
    """A layer that dynamic VRAM streamed before and loads by force now carries its patch once."""
    changed = pair.both(lambda m: with_lora(m, lora_file(bfl_lora())))
    imitate_dynamic(changed.packed)
    for key in SHAPES:
        changed.packed.patch_weight_to_device(key, device_to=load_device())
    assert relative(predict(changed.packed), predict(loaded(changed.dense))) < 1e-5
    changed.packed.unpatch_model(changed.packed.offload_device)


def test_a_weight_wrapper_changes_the_dense_weight(pair: Pair) -> None:
    """ModelPatcher.add_weight_wrapper: what a node puts over a weight is applied to its unpacked values."""

    def change(model: Any) -> Any:
        model = model.clone()
        model.add_weight_wrapper(LINEAR1, lambda weight: weight * 0.5)
        return model

    changed = pair.both(change)
    found = predict(loaded(changed.packed))
    assert relative(found, predict(loaded(changed.dense))) < 1e-5
    assert relative(predict(loaded(unloaded(changed.packed), 1)), found) < 1e-6
    unloaded(changed.packed)
    assert relative(predict(loaded(pair.packed)), found) > 1e-3
