"""Patch to BitLinear on ComfyUI's own model classes, small and with random weights, each beside a dense twin.

The twin has the packed weights' values in stock layers, so a patched model must draw what the twin draws.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, KINDS, POOLED, patch, random_tensors, sample, stock
from twins import (
    draw,
    load_stock,
    loaded,
    low_rank,
    packed_layers,
    relative,
    run_node,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
    write_pack,
)

pytestmark = pytest.mark.host


def twin_of(kind: str, patched: Any) -> Any:
    """A stock model with the dequantized weights of a patched one."""
    from bonsai_ops.host.layout import is_packed
    from bonsai_ops.host.tensors import tensors_of

    weights = tensors_of(patched.model.diffusion_model)
    return stock(kind, {n: t.dequantize() if is_packed(t) else t.detach() for n, t in weights.items()})


@pytest.fixture
def unload(comfy: Any) -> Iterator[Callable[[], None]]:
    comfy.model_management.unload_all_models()
    yield comfy.model_management.unload_all_models
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(
    kind: str, unload: Callable[[], None], lora_file: Callable[..., str], tmp_path: Path
) -> None:
    """Patch, sample, LoRA, save, reload, unload: what the twin draws, and the source is as it was."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.save import save_bonsai_model

    source = stock(kind)
    first, state = sample(kind, source), state_bytes(source)
    patched, report = patch(source, rank=4)
    unload()
    layer, kept = KINDS[kind].layer, KINDS[kind].kept
    assert packed_layers(patched) == len(report.packed) == KINDS[kind].packed
    assert {x.name: x.form for x in report.layers}[layer] == "ternary"
    assert {x.name: x.form for x in report.layers}[kept] == "kept"
    assert type(patched.model) is type(source.model) and patched.model is not source.model
    drawn = sample(kind, patched)
    assert torch.isfinite(drawn).all() and relative(drawn, first) > 1e-3
    twin = twin_of(kind, patched)
    assert relative(drawn, sample(kind, twin)) < 1e-5
    rows, columns = dict(source.model.diffusion_model.named_modules())[layer].weight.shape
    name = lora_file(low_rank({f"diffusion_model.{n}": s for n, s in {layer: (rows, columns)}.items()}))
    found, truth = (sample(kind, with_lora(m, name)) for m in (patched, twin))
    assert relative(found, truth) < 1e-5 and relative(found, drawn) > 1e-4
    unload()
    assert torch.equal(sample(kind, patched), drawn)
    path = tmp_path / "patched.safetensors"
    save_bonsai_model(patched, path)
    again = load_bonsai_model(path, {"compute_dtype": "fp32"})
    assert torch.equal(sample(kind, again), drawn)
    assert same_state(state_bytes(again), state_bytes(patched))
    unload()
    assert same_state(state_bytes(source), state) and torch.equal(sample(kind, source), first)


def text_of(kind: str) -> list:
    states = torch.randn(1, 12, CONTEXT, generator=torch.Generator().manual_seed(1))
    return [[states, {"pooled_output": torch.zeros(1, POOLED.get(kind, 8))}]]


def sampling(kind: str) -> Any:
    """Two steps of this kind, as the nodes that sample describe them."""
    from bonsai_ops.host.sampling import Sampling

    start = {"samples": torch.zeros(KINDS[kind].latent)}
    return Sampling(text_of(kind), text_of(kind), start, 3, 2, 1.0, "euler", "simple")


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_an_unpacked_bonsai_becomes_the_pack(comfy: Any, variant: str, tmp_path: Path) -> None:
    """Dense bf16 weights of a pack, loaded by ComfyUI and patched with defaults: codes and scales of the pack."""
    from bonsai_ops.host.layout import is_packed, unwrap
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.tensors import tensors_of
    from bonsai_ops.weights.packed_weight import PackedWeight
    from bonsai_ops.weights.read import open_transformer, read_weights

    pack = load_bonsai_model(write_pack(tmp_path / "model.safetensors", variant), {"compute_dtype": "fp32"})
    weights = read_weights(open_transformer(tmp_path / "model.safetensors"))
    dense = {n: w.dequantize(torch.bfloat16) if isinstance(w, PackedWeight) else w for n, w in weights.items()}
    patched, report = patch(load_stock(dense), recipe=variant)
    assert report.total("relative") == 0 and "exactly those of the model" in report.to_text()
    truth, found = (tensors_of(m.model.diffusion_model) for m in (pack, patched))
    assert truth.keys() == found.keys()
    for name, tensor in truth.items():
        assert is_packed(found[name]) == is_packed(tensor), name
        if is_packed(tensor):
            a, b = unwrap(tensor), unwrap(found[name])
            assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and a.scale.dtype == b.scale.dtype
    assert relative(draw(patched, steps=1), draw(pack, steps=1)) < 1e-6


@pytest.mark.parametrize("scheme", ["4bit", "8bit"])
def test_even_steps(scheme: str, unload: Callable[[], None], lora_file: Callable[..., str], tmp_path: Path) -> None:
    """4 and 8 bits: the twin's picture resident and offloaded, with a LoRA, saved and reloaded; close to the source."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.save import save_bonsai_model

    source = stock("flux2")
    patched, report = patch(source, recipe=scheme, rank=2)
    assert {x.form for x in report.packed} == {scheme} and packed_layers(patched) == KINDS["flux2"].packed
    drawn, twin = sample("flux2", patched), twin_of("flux2", patched)
    assert relative(drawn, sample("flux2", twin)) < 1e-5
    assert relative(drawn, sample("flux2", source)) < {"4bit": 0.2, "8bit": 0.01}[scheme]
    layer = KINDS["flux2"].layer
    shape = tuple(dict(source.model.diffusion_model.named_modules())[layer].weight.shape)
    name = lora_file(low_rank({f"diffusion_model.{layer}": shape}))
    found, truth = (sample("flux2", with_lora(m, name)) for m in (patched, twin))
    assert relative(found, truth) < 1e-5 and relative(found, drawn) > 1e-4
    unload()
    with_few_bytes = with_lora(patched, name)
    loaded(with_few_bytes, 1)
    assert torch.equal(sample("flux2", with_few_bytes), found)
    unloaded(with_few_bytes)
    path = tmp_path / "patched.safetensors"
    save_bonsai_model(patched, path)
    again = load_bonsai_model(path, {"compute_dtype": "fp32"})
    assert torch.equal(sample("flux2", again), drawn) and same_state(state_bytes(again), state_bytes(patched))


def test_lora_and_settings_on_the_source_go_along(unload: Callable[[], None], lora_file: Callable[..., str]) -> None:
    """A LoRA before the patch node equals one behind it, loaded or not; ModelSamplingSD3's shift is kept."""
    source = stock("sd3")
    layer = KINDS["sd3"].layer
    name = lora_file(low_rank({f"diffusion_model.{layer}": (512, 128)}))
    changed = run_node("comfy_extras.nodes_model_advanced.ModelSamplingSD3", model=with_lora(source, name), shift=7.0)
    sample("sd3", changed)  # the LoRA is merged into the source's weights now
    patched, _ = patch(changed)
    assert patched.get_model_object("model_sampling").shift == 7.0
    plain, _ = patch(source)
    again = run_node("comfy_extras.nodes_model_advanced.ModelSamplingSD3", model=with_lora(plain, name), shift=7.0)
    assert torch.equal(sample("sd3", patched), sample("sd3", again))
    assert relative(sample("sd3", patched), sample("sd3", plain)) > 1e-4


@pytest.mark.parametrize("room", [None, 0.1], ids=["all", "some"])
def test_a_merge_is_carried_out(unload: Callable[[], None], room: float | None) -> None:
    """The result of ModelMergeSimple is what is packed; layers that a target size keeps are merged as before."""
    from bonsai_ops.host.tensors import tensors_of

    first, second = stock("flux"), stock("flux", random_tensors(stock("flux").model, seed=3))
    merged = run_node("comfy_extras.nodes_model_merging.ModelMergeSimple", model1=first, model2=second, ratio=0.25)
    mixed = {
        n: 0.25 * t + 0.75 * tensors_of(second.model.diffusion_model)[n]
        for n, t in tensors_of(first.model.diffusion_model).items()
    }
    size = None if room is None else int(patch(first, recipe="8bit")[1].nbytes + room * first.model_size())
    found, report = patch(merged, recipe="8bit" if room else "ternary", target_bytes=size)
    truth, _ = patch(stock("flux", mixed), recipe="8bit" if room else "ternary", target_bytes=size)
    assert relative(sample("flux", found), sample("flux", truth)) < 1e-4
    assert packed_layers(found) == packed_layers(truth) == len(report.packed)
    assert room is None or 0 < len(report.packed) < KINDS["flux"].packed


def test_a_merge_of_packed_models(unload: Callable[[], None]) -> None:
    """A layer that a merge turns dense can be packed again and is not measured, whether the merge is loaded or not."""
    from bonsai_ops.host.patch.measure import sample_measured

    source = stock("flux")
    first, second = patch(source)[0], patch(stock("flux", random_tensors(stock("flux").model, seed=3)))[0]
    merged, key = first.clone(), f"diffusion_model.{KINDS['flux'].layer}.weight"
    merged.add_patches({key: second.get_key_patches("diffusion_model.")[key]}, 0.5, 0.5)
    expected = None
    for _ in range(2):
        packed, report = patch(merged)
        assert [x.name for x in report.packed] == [KINDS["flux"].layer]
        assert sum(x.reason == "is packed already" for x in report.layers) == KINDS["flux"].packed - 1
        drawn = sample("flux", packed)
        assert expected is None or torch.equal(drawn, expected)
        expected = drawn
        sample("flux", merged)  # it is loaded in the next round
    report, _ = sample_measured(source, merged, sampling("flux"))
    count = KINDS["flux"].packed - 1
    assert len(report.packed) == count and f"measured: {count} of {count} layers" in report.to_text()


def test_clone_factory_offload_and_messages(unload: Callable[[], None]) -> None:
    """The factory gives the same model while one is alive; clones are of our class; offloaded equals resident."""
    from bonsai_ops.host import attention
    from bonsai_ops.host.patcher import PackedPatcher

    patched, _ = patch(stock("qwen"), rank=2)
    drawn = sample("qwen", patched)
    function, arguments = patched.cached_patcher_init[:2]
    assert pickle.loads(pickle.dumps((function, arguments))) == (function, arguments)
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not patched.model and isinstance(again, PackedPatcher)
    assert torch.equal(sample("qwen", again), drawn)
    assert isinstance(patched.clone(), PackedPatcher)
    for model in (patched, again):
        assert model.model_options["transformer_options"][attention.OVERRIDE] is attention.in_parts
    assert patched.model_size() < 0.6 * stock("qwen").model_size()
    unload()
    loaded(patched, 1)
    assert packed_layers(patched) == KINDS["qwen"].packed
    unloaded(patched)
    del patched, again, model
    gc.collect()
    with pytest.raises(RuntimeError, match="Save Bonsai Model"):
        function(*arguments)


def test_patterns_have_any_comma_between_them() -> None:
    from bonsai_ops.host.patch.options import patterns

    text = "*.attn*, layers.3.*\uff0cblocks.?.to_q\u3001\n*norm*\u060c x "
    assert patterns(text) == ("*.attn*", "layers.3.*", "blocks.?.to_q", "*norm*", "x")
    assert patterns(" ,\n") == ()


def test_dry_run_patterns_and_report(unload: Callable[[], None]) -> None:
    """A dry run gives the source back; patterns choose layers; convolutions are counted, odd widths are told."""
    source = stock("sdxl")
    same, report = patch(source, dry_run=True)
    assert same is source and packed_layers(source) == 0 and "dry run" in report.to_text()
    assert report.conv_layers > 5 and f"{report.conv_layers} convolutions" in report.to_text()
    patched, report = patch(source, recipe="binary", group_size=32, include=("*.attn1.*",), exclude=("*to_out*",))
    assert {x.name.split(".")[-1] for x in report.packed} == {"to_q", "to_k", "to_v"}
    assert packed_layers(patched) == len(report.packed)
    reasons = {x.name: x.reason for x in report.layers}
    assert reasons["middle_block.1.transformer_blocks.0.attn2.to_q"] == "not included"
    assert reasons["middle_block.1.transformer_blocks.0.attn1.to_out.0"] == "excluded by *to_out*"
    with pytest.raises(ValueError, match=r"nothing is left to pack: .*not included"):
        patch(source, include=("no_such_layer",))
    _, report = patch(patched, recipe="ternary")
    assert sum(x.reason == "is packed already" for x in report.layers) == 3 * 4
    assert len(report.packed) == KINDS["sdxl"].packed - 3 * 4


def test_target_size(unload: Callable[[], None]) -> None:
    """Within the target, with less error than all-ternary; more room gives less error; too small says so."""
    source = stock("wan")
    _, smallest = patch(source)
    dense = source.model_size() // 2
    errors, forms = [], set()
    for share in (0.03, 0.1, 0.4):
        target = int(smallest.nbytes + share * dense)
        patched, report = patch(source, target_bytes=target)
        assert report.nbytes <= target and "reached" in report.to_text()
        assert packed_layers(patched) == len(report.packed)
        kept = [x for x in report.layers if x.reason == "room for it within the target size"]
        errors.append(sum(x.error.relative**2 for x in report.packed))
        assert {x.form for x in report.packed} - {"ternary"} or kept
        forms |= {x.form for x in report.packed}
        sample("wan", patched)
    assert errors[2] < errors[1] < errors[0] < sum(x.error.relative**2 for x in smallest.packed)
    assert forms == {"ternary", "4bit", "8bit"}
    same, report = patch(source, recipe="8bit", target_bytes=source.model_size())
    assert same is source and report.packed == [] and "goes through unchanged" in report.to_text()
    _, report = patch(source, target_bytes=1000)
    assert "not reachable" in report.to_text() and report.nbytes == smallest.nbytes


def test_calibration(unload: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    """What the node records is the mean of x x^T; hooks are gone afterwards; the model's output error falls."""
    from bonsai_ops.host.patch.calibrate import sample_recorded

    source = stock("flux")
    seen: list[torch.Tensor] = []
    module = dict(source.model.diffusion_model.named_modules())[KINDS["flux"].layer]
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().flatten(0, -2).clone()))
    known, latent = sample_recorded(source, sampling("flux"), "full")
    handle.remove()
    x = torch.cat(seen).double()
    statistics = known.layers[KINDS["flux"].layer]
    torch.testing.assert_close(statistics.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.power, statistics.gram.diagonal(), rtol=1e-4, atol=1e-5)
    assert statistics.count == len(x) and latent["samples"].shape == KINDS["flux"].latent
    assert all(not m._forward_pre_hooks for m in source.model.diffusion_model.modules())
    drawn = sample("flux", source)
    errors = {}
    for name, options in {
        "plain": {},
        "calibrated": {"statistics": known.layers},
        "calibrated, rank 16": {"statistics": known.layers, "rank": 16},
    }.items():
        patched, report = patch(source, **options)
        errors[name] = relative(sample("flux", patched), drawn)
        assert (report.total("output") is not None) == ("statistics" in options)
    with capsys.disabled():
        print("\n  error of the model's output: " + ", ".join(f"{n} {e:.4f}" for n, e in errors.items()))
    assert errors["calibrated, rank 16"] < errors["calibrated"] < errors["plain"]
    with pytest.raises(ValueError, match="recorded with another model"):
        patch(source, statistics={KINDS["flux"].layer: dataclasses.replace(statistics, power=torch.ones(64))})


def test_measuring_a_sampling(unload: Callable[[], None], lora_file: Callable[..., str], tmp_path: Path) -> None:
    """Each layer's error is that of its inputs as they come, LoRA or not; what is drawn stays the same."""
    from bonsai_ops.host.layout import unwrap
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.patch.measure import sample_measured
    from bonsai_ops.host.save import save_bonsai_model

    source, layer = stock("flux"), KINDS["flux"].layer
    patched, made = patch(source, rank=2)
    shape = tuple(dict(source.model.diffusion_model.named_modules())[layer].weight.shape)
    with_branch = with_lora(patched, lora_file(low_rank({f"diffusion_model.{layer}": shape})))
    for model in (patched, with_branch):
        seen: list[torch.Tensor] = []
        module = dict(model.model.diffusion_model.named_modules())[layer]
        handle = module.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0].detach().flatten(0, -2)))
        plain = sampling("flux").run(model)["samples"]
        handle.remove()
        report, latent = sample_measured(source, model, sampling("flux"))
        assert torch.equal(latent["samples"], plain)
        assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())
        rows = {x.name: x for x in report.layers}
        weight = source.model.diffusion_model.get_submodule(layer).weight.detach()
        x = torch.cat(seen)
        truth = x @ weight.T
        difference = x @ unwrap(module.weight).dequantize().T - truth
        assert rows[layer].error.output == pytest.approx(float(difference.norm() / truth.norm()), rel=1e-4)
        assert [(x.name, x.form, x.nbytes, x.rank) for x in report.packed] == [
            (x.name, x.form, x.nbytes, x.rank) for x in made.packed
        ]
        assert (report.nbytes, report.conv_layers) == (made.nbytes, made.conv_layers)
        assert report.total("relative") == pytest.approx(made.total("relative"), rel=1e-6)
        assert "inputs of this sampling" in report.to_text() and "measured: 10 of 10 layers" in report.to_text()
    save_bonsai_model(patched, tmp_path / "patched.safetensors")
    again, _ = sample_measured(source, load_bonsai_model(tmp_path / "patched.safetensors"), sampling("flux"))
    assert again.total("output") == pytest.approx(report.total("output"), rel=0.2)
    finer, _ = sample_measured(source, patch(source, recipe="8bit")[0], sampling("flux"))
    assert finer.total("output") < report.total("output") / 30 and {x.form for x in finer.packed} == {"8bit"}
    itself, _ = sample_measured(patched, patched, sampling("flux"))
    assert itself.total("output") < 1e-6 and itself.total("relative") == 0
    calls: list[tuple[int, int]] = []
    sample_measured(source, patched, sampling("flux"), lambda *call: calls.append(call))
    assert len(calls) == 11 and calls[0][0] == 0 and calls[-1][0] == calls[-1][1] == calls[0][1] > 0
    assert calls == sorted(set(calls))

    def cancel(done: int, total: int) -> None:
        if done > 0:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_measured(source, patched, sampling("flux"), cancel)
    assert not any(m._forward_pre_hooks for m in patched.model.diffusion_model.modules())
    with pytest.raises(ValueError, match="no layer of the patched model is packed"):
        sample_measured(source, source, sampling("flux"))
    with pytest.raises(ValueError, match=r"in the patched model and missing in the original"):
        sample_measured(stock("sd3"), patched, sampling("flux"))


def packed_models() -> int:
    """How many packed models are alive in this process."""
    from bonsai_ops.host.patcher import PackedPatcher

    gc.collect()
    return sum(issubclass(type(found), PackedPatcher) for found in gc.get_objects())


def test_cancel_leaves_nothing_behind(unload: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    """What the progress callback raises ends the work; the source draws as before; no half model is kept."""
    source = stock("flux2")
    first, alive = sample("flux2", source), packed_models()

    def progress(done: int, total: int) -> None:
        if done > 0:
            raise InterruptedError

    with caplog.at_level(logging.INFO), pytest.raises(InterruptedError):
        patch(source, progress=progress)
    assert packed_models() == alive and torch.equal(sample("flux2", source), first)
