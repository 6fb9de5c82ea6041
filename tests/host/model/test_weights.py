"""What ComfyUI and its nodes get when they ask a packed model for its weights: what the dense twin gives."""

from __future__ import annotations

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
    absent,
    bfl_lora,
    load_device,
    loaded,
    low_rank,
    module_of,
    packed_layers,
    relative,
    run_node,
    run_node_outputs,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
)

pytestmark = pytest.mark.host

PACKED = [key for key in SHAPES if "modulation" not in key]
MERGING = "comfy_extras.nodes_model_merging."
HALF = 60_000
"""Bytes that leave some layers of the tiny model offloaded and others resident."""


@pytest.fixture
def extract(
    comfy: Any, comfy_base_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, torch.Tensor]]:
    """A function that has ComfyUI's Extract and Save Lora write the LoRA of a MODEL, and returns its tensors."""

    def run(model: Any, memory: float, lora_type: str = "standard", **inputs: Any) -> dict[str, torch.Tensor]:
        folder = comfy_base_directory / "output" / "extracted"
        before = set(folder.glob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "load_models_gpu", lambda models, **_: loaded(models[0], memory))
            run_node_outputs(
                "comfy_extras.nodes_lora_extract.LoraSave",
                filename_prefix="extracted/l",
                rank=4,
                lora_type=lora_type,
                bias_diff=True,
                model_diff=model,
                **inputs,
            )
        unloaded(model)
        (path,) = set(folder.glob("*")) - before
        found = load_file(path)
        path.unlink()
        return found

    return run


def equal(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys() and len(truth) > 20
    for name, tensor in truth.items():
        assert bool(torch.isfinite(tensor).all())
        assert found[name].dtype == tensor.dtype and torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("lora_type", ["standard", "full_diff"])
@pytest.mark.parametrize("memory", [0, HALF, 1], ids=["resident", "partly", "offloaded"])
def test_a_lora_is_extracted_from_a_difference(
    make_pair: Callable[..., Pair], extract: Callable[..., dict], memory: float, lora_type: str
) -> None:
    """ModelSubtract of two packed models, then Extract and Save Lora: of offloaded layers it took the packed base."""
    a, b = make_pair("ternary"), make_pair("binary")
    state = state_bytes(a.packed)
    found, truth = (
        run_node(f"{MERGING}ModelSubtract", model1=m1, model2=m2, multiplier=0.5)
        for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense))
    )
    equal(extract(found, memory, lora_type), extract(truth, memory, lora_type))
    assert packed_layers(a.packed) == 22 and same_state(state_bytes(a.packed), state)


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_a_lora_is_extracted_from_the_model_that_carries_it(
    pair: Pair, lora_file: Callable[..., str], extract: Callable[..., dict], memory: float
) -> None:
    """Without a merge the layers stay packed: resident ones were read as codes."""
    name = lora_file(bfl_lora())
    changed = pair.both(lambda m: with_lora(m, name, 0.5))
    equal(*(extract(m, memory, "full_diff") for m in (changed.packed, changed.dense)))
    difference = changed.both(lambda m: m)
    found, truth = (
        run_node(f"{MERGING}ModelSubtract", model1=m1, model2=m2, multiplier=1.0)
        for m1, m2 in ((difference.packed, pair.packed), (difference.dense, pair.dense))
    )
    equal(extract(found, memory, "full_diff"), extract(truth, memory, "full_diff"))


def changes(make_pair: Callable[..., Pair], lora_file: Callable[..., str]) -> dict[str, Callable[[Pair], Pair]]:
    """{kind: what makes a pair with patches of it}."""
    layer, shape = QKV.removesuffix(".weight"), SHAPES[QKV]
    dora = low_rank({layer: shape}, names=("lora_up.weight", "lora_down.weight"))
    dora[f"{layer}.dora_scale"] = torch.ones(shape[0], 1)

    def merge(pair: Pair) -> Pair:
        other = make_pair("binary")
        node = f"{MERGING}ModelMergeSimple"
        return Pair(
            pair.path,
            run_node(node, model1=pair.packed, model2=other.packed, ratio=0.3),
            run_node(node, model1=pair.dense, model2=other.dense, ratio=0.3),
        )

    return {
        "nothing": lambda pair: pair,
        "lora": lambda pair: pair.both(lambda m: with_lora(m, lora_file(bfl_lora()), 0.7)),
        "dora": lambda pair: pair.both(lambda m: with_lora(m, lora_file(dora), 0.7)),
        "merge": merge,
        "merge and lora": lambda pair: merge(pair).both(lambda m: with_lora(m, lora_file(bfl_lora()), 0.7)),
    }


@pytest.mark.parametrize("kind", ["nothing", "lora", "dora", "merge", "merge and lora"])
@pytest.mark.parametrize("memory", [None, 0, 1], ids=["never loaded", "resident", "offloaded"])
def test_whoever_asks_for_a_weight_gets_it(
    pair: Pair, make_pair: Callable[..., Pair], lora_file: Callable[..., str], kind: str, memory: float | None
) -> None:
    """Each way in which a ModelPatcher gives weights, by key, in each state: dense, patched, as the twin's."""
    changed = changes(make_pair, lora_file)[kind](pair)
    fresh = changed.both(lambda m: m.clone())
    asked = {k: fresh.dense.patch_weight_to_device(k, device_to=load_device(), return_weight=True) for k in PACKED}
    for model in (changed.packed, changed.dense) if memory is not None else ():
        loaded(model, memory)
    state, truth = (m.model_state_dict("diffusion_model.") for m in (changed.packed, changed.dense))
    patches, true_patches = (m.get_key_patches("diffusion_model.") for m in (changed.packed, changed.dense))
    assert truth.keys() <= state.keys() and true_patches.keys() <= patches.keys()
    assert all(key.endswith(("weight_scale", "weight_zero")) for key in state.keys() - truth.keys())
    for key in PACKED:
        for device in (load_device(), None):
            weight = changed.packed.patch_weight_to_device(key, device_to=device, return_weight=True)
            assert type(weight) is torch.Tensor and weight.dtype == torch.float32
            assert relative(weight, asked[key]) < 1e-6
    for key, tensor in truth.items():
        assert relative(state[key], tensor) < 1e-6
        assert state[key].dtype == tensor.dtype or key not in PACKED
        (base, convert), (true_base, true_convert) = patches[key][0], true_patches[key][0]
        base, true_base = convert(base.to(torch.float32, copy=True)), true_convert(true_base.clone())
        assert relative(base, true_base) < 1e-6 and len(patches[key]) == len(true_patches[key])
    assert {k: t.shape for k, t in dict(state).items() if k in SHAPES} == {k: torch.Size(s) for k, s in SHAPES.items()}


def test_reading_a_state_dict_unpacks_what_is_read(pair: Pair) -> None:
    """As a dict: its values by key, by get, by items and copied are one another; what is set is what is read."""
    state = pair.packed.model_state_dict()
    dense = module_of(pair.packed, LINEAR1).weight.dequantize()
    assert list(state) == list(state.keys()) == list(pair.packed.model.state_dict())
    for found in (state[LINEAR1], state.get(LINEAR1), dict(state.items())[LINEAR1], dict(state)[LINEAR1]):
        assert torch.equal(found, dense)
    assert state.get("nothing") is None and len(list(state.values())) == len(state)
    state[LINEAR1] = torch.ones(1)
    assert torch.equal(state[LINEAR1], torch.ones(1))
    assert torch.equal(pair.packed.model_state_dict()[LINEAR1], dense)


def test_weights_in_the_dtype_that_the_model_computes_in(
    comfy: Any, packs: dict[str, Path], make_pair: Callable[..., Pair]
) -> None:
    """A bf16 model gives bf16 weights, merges too, though they are computed in fp32."""
    from bonsai_ops.host.loader import load_bonsai_model

    model = load_bonsai_model(packs["ternary"], {"compute_dtype": "bf16"})
    plain = model.patch_weight_to_device(QKV, device_to=load_device(), return_weight=True)
    assert plain.dtype == torch.bfloat16 and torch.equal(plain.cpu(), module_of(model, QKV).weight.dequantize().cpu())
    merged = run_node(f"{MERGING}ModelMergeSimple", model1=model, model2=make_pair("binary").dense, ratio=0.5)
    assert merged.patch_weight_to_device(QKV, device_to=load_device(), return_weight=True).dtype == torch.bfloat16


def test_a_weight_that_was_loaded_by_force_is_patched_once(make_pair: Callable[..., Pair], comfy_version: str) -> None:
    """Dynamic VRAM loads small layers by force: what lies there holds the merge already."""
    if comfy_version < "0.24":
        absent("load of single layers by force")
    a, b = make_pair("ternary"), make_pair("binary")
    merged, truth = (
        run_node(f"{MERGING}ModelMergeSimple", model1=m1, model2=m2, ratio=0.3)
        for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense))
    )
    expected = truth.patch_weight_to_device(QKV, device_to=load_device(), return_weight=True)
    merged.patch_weight_to_device(QKV, device_to=load_device(), force_cast=True)
    assert packed_layers(merged) == 21
    assert relative(merged.patch_weight_to_device(QKV, device_to=load_device(), return_weight=True), expected) < 1e-6
    saved = merged.state_dict_for_saving()[f"model.{QKV}"]
    assert relative(saved, expected) < 1e-6
    merged.unpatch_model(merged.offload_device)
    assert packed_layers(merged) == 22
