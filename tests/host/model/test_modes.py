"""Modes and layouts of the loader: kept by clones, files and compilation, apart in two models, explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import QKV, bfl_lora, draw, module_of, relative, with_lora

pytestmark = pytest.mark.host

LAYERS = {"compact": "trit5", "fast": "crumb"}


@pytest.fixture
def load(comfy: Any, packs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that loads the ternary pack, or a file, in fp32. Every processor has int8 here, fast or not."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.kernels import machine

    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: True)
    return lambda path=None, **options: load_bonsai_model(
        path or packs["ternary"], {"compute_dtype": "fp32", **options}
    )


def codecs_of(model: Any) -> set[str]:
    from bonsai_ops.host.layout import is_packed, unwrap

    return {unwrap(p).codec for p in model.model.diffusion_model.parameters() if is_packed(p)}


@pytest.mark.processor
def test_two_models_in_two_modes(load: Callable[..., Any], lora_file: Callable[..., str]) -> None:
    """Each keeps its own, also in clones, in what the factory makes and under a LoRA."""
    from bonsai_ops.host.info import describe

    exact, rounded = load(), load(mode="a8")
    truth, found = draw(exact), draw(rounded)
    assert 1e-4 < relative(found, truth) < 0.1
    assert torch.equal(draw(exact), truth) and torch.equal(draw(rounded.clone()), found)
    function, arguments = rounded.cached_patcher_init[:2]
    assert torch.equal(draw(function(*arguments, disable_dynamic=True)), found)
    name = lora_file(bfl_lora())
    assert 1e-4 < relative(draw(with_lora(rounded, name)), draw(with_lora(exact, name))) < 0.1
    assert [m.get_attachment("bonsai").mode for m in (exact, rounded)] == ["exact", "a8"]
    assert [dict(describe(m))["backend"] for m in (exact, rounded)] == ["cpu, exact", "cpu, a8"]


@pytest.mark.processor
def test_every_activation_is_rounded_once(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No two packed layers of FLUX.2 read one tensor: a8 has nothing to share between them (kernels/triton/int8.py)."""
    from bonsai_ops.host.layout import is_packed
    from bonsai_ops.kernels import cpu

    model, read, rounded = load(mode="a8"), [], []
    layers = [m for m in model.model.modules() if is_packed(getattr(m, "weight", None))]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    multiply = cpu.multiply
    monkeypatch.setattr(cpu, "multiply", lambda x, *rest: (rounded.append(rest[2]), multiply(x, *rest))[1])
    draw(model, steps=1)
    assert len(layers) == len(read) == len(rounded) and set(rounded) == {"a8"}
    assert len({id(x) for x in read}) == len({(x.data_ptr(), x.shape) for x in read}) == len(read)


def test_layouts_draw_the_same(load: Callable[..., Any], tmp_path: Path) -> None:
    """fast takes more memory; a saved file is compact again and loads in either."""
    from bonsai_ops.host.save import save_bonsai_model

    compact, fast = load(), load(layout="fast")
    truth = draw(compact)
    assert torch.equal(draw(fast), truth)
    assert (codecs_of(compact), codecs_of(fast)) == ({LAYERS["compact"]}, {LAYERS["fast"]})
    sizes = [m.get_attachment("bonsai").packed_bytes for m in (compact, fast)]
    assert sizes[0] < sizes[1]
    for model, name in ((compact, "a"), (fast, "b")):
        save_bonsai_model(model, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load(tmp_path / "b.safetensors", layout="fast")
    assert codecs_of(again) == {LAYERS["fast"]} and torch.equal(draw(again), truth)


def test_a_stock_save_keeps_the_layout(load: Callable[..., Any], tmp_path: Path) -> None:
    """ComfyUI's ModelSave writes what is in memory, without a record; it is read as what it is."""
    from safetensors.torch import save_file

    fast = load(layout="fast")
    truth, path = draw(fast), tmp_path / "model.safetensors"
    state = fast.model.state_dict_for_saving(fast.model.diffusion_model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    for layout, name in LAYERS.items():
        model = load(path, layout=layout)
        assert codecs_of(model) == {name} and torch.equal(draw(model), truth)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_mode_is_compiled_in(load: Callable[..., Any], backend: str) -> None:
    """No graph break, the same values; the other mode is another graph."""
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    exact, rounded = (module_of(load(mode=mode), QKV) for mode in ("exact", "a8"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x) * 2, fullgraph=True, backend=backend)
    assert torch.equal(compiled(rounded, x), rounded(x) * 2)
    assert torch.equal(compiled(exact, x), exact(x) * 2)
    assert not torch.equal(exact(x), rounded(x))
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            assert torch.equal(torch.nn.functional.linear(x, rounded.weight, rounded.bias), rounded(x))
    torch._dynamo.reset()


@pytest.mark.processor
@pytest.mark.parametrize("mode", ["fp16_accumulate", "a8_fp8"])
def test_a_declined_mode_is_explained(mode: str, load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """In the log line, in the report and in Bonsai Model Info."""
    from bonsai_ops.host.info import describe

    with caplog.at_level("INFO"):
        model = load(mode=mode)
    report, reason = model.get_attachment("bonsai"), f"it has no mode {mode}"
    assert report.mode == "exact" and reason in report.declined[mode]
    assert any(f"not {mode}: " in r.getMessage() and reason in r.getMessage() for r in caplog.records)
    lines = dict(describe(model))
    assert lines["backend"] == "cpu, exact" and reason in lines[f"not {mode}"]


@pytest.mark.processor
def test_what_was_timed_is_told(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bonsai Model Info names the faster one for layers of the model's shapes, and for no others."""
    from bonsai_ops.host.info import describe, draw
    from bonsai_ops.host.inventory import take_inventory
    from bonsai_ops.kernels import Call, contest
    from bonsai_ops.kernels.choices import FUSED, UNPACK, Choices, Timed

    model = load()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(contest, "choices", Choices())
    device, dtype = model.load_device, getattr(torch, take_inventory(model).dtype)
    monkeypatch.setitem(contest.timers, device.type, lambda calls: [1.0 for _ in calls])
    before = describe(model)
    rows, columns = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.shape
    for taken in (columns, columns + 128):
        call = Call(device, dtype, rows, taken, "ternary", "trit5", 128, mode="exact")
        key = contest.key_of(call, 1536)
        contest.choices.add(key.text, Timed(UNPACK, {FUSED: 2.0, UNPACK: 1.0}))
    lines = describe(model)
    assert [line for line in lines if line not in before] == [
        ("timed", f"{columns} to {rows}, 1536 tokens, trit5 exact: unpack is faster (fused 2 ms, unpack 1 ms)")
    ]
    assert draw(take_inventory(model), lines).shape[1] > draw(take_inventory(model), before).shape[1]


@pytest.mark.parametrize("option", ["mode", "layout", "memory"])
def test_an_unknown_option_is_refused(load: Callable[..., Any], option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.* 'best' is unknown, expected"):
        load(**{option: "best"})
