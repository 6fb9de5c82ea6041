"""Recover BitLinear on ComfyUI's own model classes, small and with random weights."""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONTEXT, KINDS, POOLED, patch, random_tensors, sample, stock
from lora_training import DenseWeights
from small_disk import small_disk
from twins import load_device, low_rank, packed_layers, run_node, same_state, state_bytes, with_lora

pytestmark = pytest.mark.host
SIGMAS = {"sdxl": (14.6, 3.0, 0.0)}
FLOW = (1.0, 0.6, 0.0)


def prompt(kind: str, seed: int = 1) -> list:
    """A CONDITIONING of this kind."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 12, CONTEXT, generator=generator)
    pooled = torch.randn(1, POOLED.get(kind, 8), generator=generator)
    return [[states, {"pooled_output": pooled, "guidance": 3.5}]]


def recovery(kind: str, **options: Any) -> Any:
    """Two prompts, two steps a sampling; few steps of training."""
    from bonsai_ops.host.patch.recover import Recovery
    from bonsai_ops.quantize.recover import Plan

    plan = {"steps": 4, "learning_rate": 3e-3, "batch": 2, **options.pop("plan", {})}
    given = {
        "conditionings": [prompt(kind), prompt(kind, 2)],
        "latent": {"samples": torch.zeros(KINDS[kind].latent)},
        "sigmas": torch.tensor(SIGMAS.get(kind, FLOW)),
        "points": 8,
        **options,
    }
    return Recovery(plan=Plan(**plan), **given)


def recover(original: Any, patched: Any, kind: str, progress: Any = None, **options: Any) -> Any:
    """(MODEL, what became of it), in inference mode as ComfyUI runs its nodes."""
    from bonsai_ops.host.patch import recover as module

    with torch.inference_mode():
        return module.recover(original, patched, recovery(kind, **options), progress)


def residuals(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from bonsai_ops.host.layout import is_packed, unwrap
    from bonsai_ops.host.tensors import base_tensors

    packed = {n: unwrap(t) for n, t in base_tensors(model).items() if is_packed(t)}
    return {n: (w.up, w.down) for n, w in packed.items() if w.rank}


@pytest.fixture
def unload(comfy: Any) -> Iterator[Callable[[], None]]:
    comfy.model_management.unload_all_models()
    yield comfy.model_management.unload_all_models
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind: str, unload: Callable[[], None], tmp_path: Path) -> None:
    """The error falls; codes, tables and the models given stay; the result is saved into one file that draws it."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.save import save_bonsai_model

    with torch.inference_mode():  # as loaders run: no backward pass may keep such weights
        source = stock(kind)
        patched, _ = patch(source, rank=4)
    dense, packed, before = state_bytes(source), state_bytes(patched), sample(kind, patched)
    found, report = recover(source, patched, kind)
    assert report.tuned.best.held_out < 0.99 * report.tuned.before.held_out, report.to_text()
    assert same_state(state_bytes(source), dense) and same_state(state_bytes(patched), packed)
    assert torch.equal(sample(kind, patched), before)
    assert packed_layers(found) == packed_layers(patched) and type(found.model) is type(patched.model)
    changed = {n for n, t in state_bytes(found).items() if not torch.equal(t.cpu(), packed[n].cpu())}
    assert changed and all(name.endswith(("weight_up", "weight_down")) for name in changed)
    drawn = sample(kind, found)
    assert not torch.equal(drawn, before)
    save_bonsai_model(found, tmp_path / "recovered.safetensors")
    again = load_bonsai_model(tmp_path / "recovered.safetensors", {"compute_dtype": "fp32"})
    assert torch.equal(sample(kind, again), drawn) and same_state(state_bytes(again), state_bytes(found))


@pytest.fixture(scope="module")
def models(comfy: Any) -> tuple[Any, Any]:
    """A dense FLUX.2 and its ternary one with residuals; tests leave both as they are."""
    source = stock("flux2")
    return source, patch(source, rank=8)[0]


@pytest.fixture(scope="module")
def recovered(models: tuple[Any, Any]) -> tuple[Any, Any]:
    """(MODEL, what became of it) of the two."""
    return recover(*models, "flux2")


def test_deterministic_and_it_goes_on(
    models: tuple[Any, Any], recovered: tuple[Any, Any], unload: Callable[[], None]
) -> None:
    """The same twice, to the bit; its own result goes in with the error that it came out with."""
    source, patched = models
    (first, one), (second, other) = recovered, recover(source, patched, "flux2")
    assert one.tuned == other.tuned and same_state(state_bytes(first), state_bytes(second))
    _, more = recover(source, first, "flux2", plan={"learning_rate": 1e-3})
    assert more.tuned.before.held_out == pytest.approx(one.tuned.best.held_out, rel=1e-5)
    assert more.tuned.best.held_out < one.tuned.best.held_out


def test_never_worse(models: tuple[Any, Any], unload: Callable[[], None]) -> None:
    source, patched = models
    found, report = recover(source, patched, "flux2", plan={"learning_rate": 1e3})
    assert report.tuned.best is report.tuned.before and "no step made it better" in report.to_text()
    for name, (up, down) in residuals(found).items():
        assert torch.equal(up, residuals(patched)[name][0]) and torch.equal(down, residuals(patched)[name][1])


def test_gradients_are_right(
    models: tuple[Any, Any], unload: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of finite differences of the error, through checkpointed blocks that write into their inputs."""
    from bonsai_ops.host.patch import recover as module

    source, patched = models
    seen: dict[str, Any] = {}
    real = module.tune

    def tune(residuals: list, error: Callable, trained: list, held: list, plan: Any, *rest: Any) -> Any:
        for residual in residuals:
            residual.zero_grad()
        error(0).backward()
        seen["checked"] = []
        for residual in (residuals[0], residuals[-1]):
            direction = torch.randn(residual.up.shape, generator=torch.Generator().manual_seed(1)).to(residual.up)
            slope = float((residual.up.grad * direction).sum())
            with torch.no_grad():
                values = []
                for step in (1e-2, -1e-2):
                    residual.up += step * direction
                    values.append(float(error(0)))
                    residual.up -= step * direction
            seen["checked"].append((slope, (values[0] - values[1]) / 2e-2))
            residual.zero_grad()
        return real(residuals, error, trained, held, plan, *rest)

    monkeypatch.setattr(module, "tune", tune)
    recover(source, patched, "flux2", plan={"steps": 1})
    for slope, difference in seen["checked"]:
        assert slope == pytest.approx(difference, rel=2e-3)


def test_blocks_keep_nothing_that_they_compute(unload: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a backward pass: of four blocks more less than a tensor each is kept outside of their checkpoints."""
    from bonsai_ops.host.patch import recover as module

    real, counts = module.tune, []

    def tune(residuals: list, error: Callable, *rest: Any) -> Any:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            error(0)
        counts.append(len(kept))
        return real(residuals, error, *rest)

    monkeypatch.setattr(module, "tune", tune)
    for double, single in ((1, 1), (2, 4)):
        config = {**KINDS["flux2"].config, "depth": double, "depth_single_blocks": single}
        monkeypatch.setitem(KINDS, "flux2", dataclasses.replace(KINDS["flux2"], config=config))
        source = stock("flux2")
        recover(source, patch(source, rank=2)[0], "flux2", plan={"steps": 1})
    assert 0 <= counts[1] - counts[0] < 4


def test_one_model_at_a_time(
    models: tuple[Any, Any], unload: Callable[[], None], comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the residuals are trained ComfyUI has loaded neither of the models given; in the end it has none loaded."""
    from bonsai_ops.host.patch import recover as module

    source, patched = models
    sample("flux2", source)
    sample("flux2", patched)
    seen, real = [], module.tune

    def tune(*args: Any, **options: Any) -> Any:
        loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
        seen.append((len(loaded), any(model in (source.model, patched.model) for model in loaded)))
        return real(*args, **options)

    monkeypatch.setattr(module, "tune", tune)
    recover(source, patched, "flux2")
    assert seen == [(1, False)]
    assert comfy.model_management.current_loaded_models == []


def test_weights_lie_in_memory_once(unload: Callable[[], None], comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained reads the weights of the model that was given, packed and dense ones, and copies none of them."""
    from bonsai_ops.host.layout import is_packed, unwrap
    from bonsai_ops.host.patch import recover as module
    from bonsai_ops.host.tensors import base_tensors

    def places(model: Any) -> dict[str, list[int]]:
        found = {}
        for name, tensor in base_tensors(model).items():
            weight = unwrap(tensor).without_residual() if is_packed(tensor) else None
            parts = (tensor,) if weight is None else (weight.codes, *weight.tables().values())
            found[name] = [part.data_ptr() for part in parts]
        return found

    if load_device().type != "cpu":
        pytest.skip("what ComfyUI has loaded lies on the device, what was given does not")
    with torch.inference_mode():  # as nodes run: no backward pass may keep such weights
        source = stock("flux2")
        patched, _ = patch(source, rank=8)
    before = state_bytes(patched)
    seen, real = [], module.tune

    def tune(*args: Any, **options: Any) -> Any:
        seen.extend(places(entry.model) for entry in comfy.model_management.current_loaded_models)
        return real(*args, **options)

    monkeypatch.setattr(module, "tune", tune)
    recover(source, patched, "flux2")
    assert seen == [places(patched)]
    assert same_state(before, state_bytes(patched))


def test_no_weight_is_unpacked(
    models: tuple[Any, Any], unload: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is there a gradient of its size, forward or backward."""
    from bonsai_ops.host.layout import is_packed
    from bonsai_ops.host.patch import recover as module

    source, patched = models
    modules = [m for m in patched.model.modules() if getattr(m, "weight", None) is not None]
    packed = {tuple(m.weight.shape) for m in modules if is_packed(m.weight)}
    others = {tuple(m.weight.shape) for m in modules if not is_packed(m.weight)}
    shapes = packed - others - {shape[::-1] for shape in others}
    shapes = {shape for shape in shapes if 512 not in shape}  # as many tokens has a text
    assert shapes
    real, weights = module.tune, DenseWeights(shapes)

    def tune(*args: Any, **options: Any) -> Any:
        with weights:
            return real(*args, **options)

    monkeypatch.setattr(module, "tune", tune)
    recover(source, patched, "flux2", plan={"steps": 1})
    assert weights.count == 0


def test_many_points_lie_on_the_disk(
    models: tuple[Any, Any],
    recovered: tuple[Any, Any],
    unload: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The result is the same, and the file is gone afterwards."""
    import folder_paths

    from bonsai_ops.host.patch import points

    source, patched = models
    monkeypatch.setattr(points, "MOST_BYTES", 0)
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    made, real = [], tempfile.TemporaryDirectory

    def folder(*args: Any, **options: Any) -> Any:
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(points.tempfile, "TemporaryDirectory", folder)
    second, _ = recover(source, patched, "flux2")
    assert same_state(state_bytes(recovered[0]), state_bytes(second))
    assert len(made) == 1 and Path(made[0].name).parent == tmp_path / "temp" and not any((tmp_path / "temp").iterdir())


def test_no_room_for_the_points(comfy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mapped page without room on the disk ends the process when something is written into it."""
    import folder_paths

    from bonsai_ops.host.patch import points

    monkeypatch.setattr(points, "MOST_BYTES", 0)
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "disk"))
    with small_disk(tmp_path / "disk", 4 << 20, "disk"):
        said = r"points need 8\.4 MB in .*disk, .*No space left.*: free some room on that disk, or ask for fewer points"
        with pytest.raises(ValueError, match=said), points.room_for(512, (128, 8, 4)):
            pass
        assert not any((tmp_path / "disk").iterdir())
        with points.room_for(2, (128, 8, 4)) as held:
            held.add(0, 1.0, torch.ones(1, 128, 8, 4), torch.ones(1, 128, 8, 4))
            assert held.get(0, load_device())[1].sum() == 128 * 32


class Canceller:
    """progress that cancels at its call number `at`."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, done: int, total: int) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError


def cancelled(original: Any, patched: Any, at: int, **options: Any) -> None:
    with pytest.raises(InterruptedError):
        recover(original, patched, "flux2", Canceller(at), **options)


def test_cancel_leaves_no_model(models: tuple[Any, Any], unload: Callable[[], None], comfy: Any) -> None:
    """In either phase: what progress raises comes out, no model is left beside the two, both draw as before."""
    from bonsai_ops.host.patcher import PackedPatcher

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), PackedPatcher) for found in gc.get_objects())

    source, patched = models
    drawn = [sample("flux2", model) for model in models]
    comfy.model_management.unload_all_models()
    count, calls = alive(), []
    recover(source, patched, "flux2", lambda *call: calls.append(call))
    assert calls == sorted(calls) and calls[-1][0] <= calls[-1][1]
    comfy.model_management.unload_all_models()
    for at in (2, len(calls) // 2, len(calls)):
        cancelled(source, patched, at)
        comfy.model_management.unload_all_models()
        assert alive() == count
    assert all(torch.equal(sample("flux2", model), one) for model, one in zip(models, drawn, strict=True))
    recover(source, patched, "flux2")  # to the end, which forgets what was kept


def test_cancel_keeps_the_best(models: tuple[Any, Any], recovered: tuple[Any, Any], unload: Callable[[], None]) -> None:
    """The next run with the same inputs begins from it, once; any other begins from what comes in."""
    source, patched = models
    calls: list[tuple[int, int]] = []
    recover(source, patched, "flux2", lambda *call: calls.append(call))
    whole = recovered[1].tuned
    last = len(calls)  # in the last look: those before it have found better states
    for other in ({"plan": {"seed": 1}}, {"conditionings": [prompt("flux2"), prompt("flux2", 3)]}):
        cancelled(source, patched, last)
        assert recover(source, patched, "flux2", **other)[1].begun is None
    cancelled(source, patched, last)
    found, report = recover(source, patched, "flux2")
    begun, best = report.begun, min(whole.looks[:-1], key=lambda look: look.held_out)
    assert begun is not None and begun.before == whole.before and begun.best == best
    assert report.tuned.before.held_out == pytest.approx(best.held_out, rel=1e-6)
    assert report.tuned.best.held_out < best.held_out < whole.before.held_out
    assert f"kept at Cancel, after step {best.step}: error {whole.before.held_out:.4f} ->" in report.to_text()
    again, fresh = recover(source, patched, "flux2")
    assert fresh.begun is None and fresh.tuned == whole and same_state(state_bytes(again), state_bytes(recovered[0]))
    assert not same_state(state_bytes(again), state_bytes(found))


def test_cancel_again_keeps_the_better_one(models: tuple[Any, Any], unload: Callable[[], None]) -> None:
    """Also where the second run is cancelled before it found anything; it goes with the model, and not before."""
    from bonsai_ops.host.patch.unfinished import Unfinished

    def kept() -> int:
        gc.collect()
        return sum(type(found) is Unfinished for found in gc.get_objects())

    source, _ = models
    patched, _ = patch(source, rank=8)
    calls: list[tuple[int, int]] = []
    recover(source, patched, "flux2", lambda *call: calls.append(call))
    count = kept()
    for at in (len(calls), 2, len(calls) // 2):
        cancelled(source, patched, at)
        assert kept() == count + 1
    clone = patched.clone()
    assert recover(source, clone, "flux2")[1].begun is None
    del patched, clone  # which knows what it is a clone of
    assert kept() == count


def test_of_a_conditioning_only_the_text_counts(
    models: tuple[Any, Any], recovered: tuple[Any, Any], unload: Callable[[], None]
) -> None:
    """Entries of a combined one are prompts of their own; areas, masks and ranges of time are left out."""
    source, patched = models
    ((one, rest),), ((two, more),) = prompt("flux2"), prompt("flux2", 2)
    limits = {"area": (2, 2, 0, 0), "strength": 0.5, "mask": torch.zeros(1, 4, 4), "start_percent": 0.7}
    combined = [[one, {**rest, **limits}], [two, {**more, "end_percent": 0.1}]]
    found, report = recover(source, patched, "flux2", conditionings=[combined])
    assert report.asked[0] == 2 and same_state(state_bytes(recovered[0]), state_bytes(found))


def test_held_out_points() -> None:
    """All of the last prompts where there are many, else whole samplings."""
    from bonsai_ops.host.patch.recover import _held_out

    assert _held_out(2, 1, 4) == [4, 5, 6, 7]
    assert _held_out(16, 1, 1) == [14, 15]
    assert _held_out(20, 8, 2) == [14, 15, 30, 31]
    assert _held_out(4, 100, 1) == [3]


def test_a_packed_file_is_recovered_too(
    models: tuple[Any, Any], recovered: tuple[Any, Any], unload: Callable[[], None], tmp_path: Path
) -> None:
    """Saved, loaded with a density of its own, recovered: it is what it was loaded as."""
    from bonsai_ops.host.inventory import attached_inventory
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.save import save_bonsai_model

    source, patched = models
    save_bonsai_model(patched, tmp_path / "a.safetensors")
    loaded = load_bonsai_model(tmp_path / "a.safetensors", {"compute_dtype": "fp32", "layout": "fast"})
    found, report = recover(source, loaded, "flux2")
    assert report.tuned == recovered[1].tuned
    origin, codecs = (getattr(attached_inventory(found), name) for name in ("origin", "codecs"))
    assert origin == attached_inventory(loaded).origin and codecs == ("crumb",)


def test_a_merged_model(unload: Callable[[], None]) -> None:
    """A merge is in the codes of packed layers, and stays a patch of the others on both models."""
    node = "comfy_extras.nodes_model_merging.ModelMergeSimple"
    first = stock("flux2")
    second = stock("flux2", {name: 0.9 * tensor for name, tensor in random_tensors(first.model).items()})
    with torch.inference_mode():
        source = run_node(node, model1=first, model2=second, ratio=0.5)
        patched, _ = patch(source, rank=4)
    found, report = recover(source, patched, "flux2")
    assert report.tuned.best.held_out < 0.99 * report.tuned.before.held_out, report.to_text()
    assert patched.patches and {key: len(p) for key, p in found.patches.items()} == {
        key: len(p) for key, p in patched.patches.items()
    }
    unload()
    with pytest.raises(ValueError, match="the patched model carries LoRAs"):
        recover(first, patched, "flux2")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("not packed", "no layer of the patched model is packed"),
        (
            "no residual",
            r"no packed layer of the patched model has a residual to train: set rank in Patch to BitLinear",
        ),
        ("other model", "in the patched model and missing in the original: connect the model that was patched"),
        ("one model", "original and patched are one model: connect the dense model"),
        ("lora", "the patched model carries LoRAs: connect them behind Recover BitLinear"),
        ("lora on a kept layer", "the patched model carries LoRAs: connect them behind Recover BitLinear"),
        ("no prompt", "there is no conditioning to recover with: connect CLIP Text Encode to prompts"),
        ("few points", "3 points are less than two samplings of 2 steps: ask for 4 points or more"),
        ("no step", "sigmas has no step: connect a scheduler"),
        ("other text", "prompts"),
        ("not finite", "the original model computes values that are not finite at sigma 1: look at what it draws"),
        ("zeros", "the original model predicts nothing but zeros"),
    ],
)
def test_wrong_inputs(
    wrong: str,
    message: str,
    models: tuple[Any, Any],
    unload: Callable[[], None],
    lora_file: Callable[..., str],
) -> None:
    """One sentence with the cure, before anything is trained."""
    source, patched = models
    options: dict[str, Any] = {}
    if wrong == "not packed":
        patched = stock("flux2")
    if wrong == "no residual":
        patched = patch(source)[0]
    if wrong == "other model":
        source = stock("sd3")
    if wrong == "one model":
        source = patched.clone()
    if wrong.startswith("lora"):
        layer = KINDS["flux2"].layer if wrong == "lora" else "final_layer.linear"
        shape = tuple(dict(source.model.diffusion_model.named_modules())[layer].weight.shape)
        patched = with_lora(patched, lora_file(low_rank({f"diffusion_model.{layer}": shape})))
    if wrong == "no prompt":
        options = {"conditionings": [[]]}
    if wrong == "few points":
        options = {"points": 3}
    if wrong == "no step":
        options = {"sigmas": torch.tensor([0.0])}
    if wrong == "other text":
        options = {"conditionings": [[[torch.zeros(1, 12, CONTEXT + 8), {"pooled_output": None}]]]}
    if wrong in ("not finite", "zeros"):
        value = math.nan if wrong == "not finite" else 0.0
        tensors = random_tensors(stock("flux2").model)
        source = stock("flux2", {n: t * value if n.startswith("final_layer") else t for n, t in tensors.items()})
    with pytest.raises(ValueError, match=message):
        recover(source, patched, "flux2", **options)


def test_a_prompt_of_another_encoder(unload: Callable[[], None]) -> None:
    """SDXL reads what FLUX.2's text encoder does not give."""
    source = stock("sdxl")
    patched, _ = patch(source, rank=2, include=("*attn1.to_q",))
    ((states, rest),) = prompt("sdxl")
    plain = [[states, {name: value for name, value in rest.items() if name != "pooled_output"}]]
    with pytest.raises(ValueError, match="a prompt has no pooled_output, which SDXL reads: encode the prompts"):
        recover(source, patched, "sdxl", conditionings=[plain])


def test_report_and_plot(recovered: tuple[Any, Any]) -> None:
    _, report = recovered
    text, picture = report.to_text(), report.draw()
    assert f"{report.tuned.before.held_out:.4f} -> {report.tuned.best.held_out:.4f} on 2 held-out points" in text
    assert "4 of 4 steps, 2 points each, of 6 points of 2 prompts; learning rate 0.003, seed 0" in text
    assert len(text.split("held out  trained on\n")[1].split("\n")) == 5
    assert picture.ndim == 3 and picture.shape[1:] == (640, 3) and 0 <= picture.min() < picture.max() <= 1
    bad = dataclasses.replace(report, tuned=dataclasses.replace(report.tuned, finite=False))
    assert "try a lower learning rate" in bad.to_text()
