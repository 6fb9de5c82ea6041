"""Clones, the factory behind them, what can be copied, and torch.compile.

The product must not need a compiler, so these tests compile with the backends eager and aot_eager, which trace and
lower as inductor does and then run ordinary operators. ComfyUI's TorchCompileModel node is called with one of them too:
its list offers inductor and cudagraphs only, its code takes any.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import (
    HIDDEN,
    LATENT,
    LINEAR1,
    QKV,
    SMALL,
    TOLERANCE,
    Pair,
    absent,
    bfl_lora,
    draw,
    load_device,
    load_stock,
    loaded,
    low_rank,
    module_of,
    packed_layers,
    predict,
    read_dense,
    relative,
    run_node,
    state_bytes,
    text,
    unloaded,
    with_lora,
    write_pack,
)

pytestmark = pytest.mark.host


def test_clones_share_weights_and_keep_their_patches_apart(pair: Pair, lora_file: Callable[..., str]) -> None:
    """A clone of a clone is of our class, shares the module, and its LoRA does not reach its parent."""
    from bonsai_ops.host.patcher import PackedPatcher

    first = draw(pair.packed)
    child = with_lora(pair.packed.clone().clone(), lora_file(bfl_lora()))
    assert isinstance(child, PackedPatcher) and type(child) is type(pair.packed)
    assert child.model is pair.packed.model and child.model_size() == pair.packed.model_size()
    assert relative(draw(child), first) > 1e-2
    assert torch.equal(draw(pair.packed), first)
    assert child.get_attachment("bonsai") is pair.packed.get_attachment("bonsai")


def test_the_factory_makes_the_same_model(pair: Pair) -> None:
    """cached_patcher_init: a function of this package with plain arguments, as SelectModelDevice and others call it."""
    function, arguments = pair.packed.cached_patcher_init[:2]
    assert pickle.loads(pickle.dumps((function, arguments))) == (function, arguments)
    assert "<locals>" not in function.__qualname__
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not pair.packed.model
    assert torch.equal(draw(again), draw(pair.packed))


def test_a_clone_without_dynamic_vram(pair: Pair, lora_file: Callable[..., str], comfy_version: str) -> None:
    """What TorchCompileModel does on a model with dynamic VRAM: a plain ModelPatcher around a fresh load, with patches.

    The processor has no dynamic VRAM, so `is_dynamic` is set on the one model.
    """
    from comfy.model_patcher import ModelPatcher

    from bonsai_ops.host.patcher import PackedPatcher

    if comfy_version < "0.24":
        absent("clone without dynamic VRAM")
    model = with_lora(pair.packed, lora_file(bfl_lora()))
    drawn = draw(model)
    model.is_dynamic = lambda: True
    clone = model.clone(disable_dynamic=True)
    del model.is_dynamic
    assert isinstance(clone, ModelPatcher) and isinstance(clone, PackedPatcher)
    assert clone.model is not model.model
    assert torch.equal(draw(clone), drawn)


def test_a_deep_clone_for_another_device(pair: Pair, lora_file: Callable[..., str]) -> None:
    """deepclone_multigpu, here to the same device: weights of its own, the patches of the first."""
    if not hasattr(pair.packed, "deepclone_multigpu"):
        absent("deepclone_multigpu")
    model = with_lora(pair.packed, lora_file(bfl_lora()))
    drawn = draw(model)
    clone = model.deepclone_multigpu(new_load_device=model.load_device, models_cache={})
    assert clone.model is not model.model and packed_layers(clone) == packed_layers(model)
    assert torch.equal(draw(clone), drawn)


def test_select_device_node(pair: Pair) -> None:
    """SelectModelDevice with the device that it has already and with the processor."""
    drawn, own = draw(pair.packed), load_device().type
    for device in ("default", "cpu"):
        moved = run_node("comfy_extras.nodes_multigpu.SelectModelDeviceNode", model=pair.packed, device=device)
        assert relative(draw(moved), drawn) < (TOLERANCE if device == "cpu" != own else 1e-12)


def test_what_a_packed_weight_cannot_do(pair: Pair) -> None:
    """Trap 17: comfy-kitchen's tensor survives neither pickle nor deepcopy; models travel as (function, arguments)."""
    weight = module_of(pair.packed, QKV).weight
    with pytest.raises(Exception):  # noqa: B017 - which one depends on the version of comfy-kitchen
        pickle.loads(pickle.dumps(weight))
    assert pair.packed.cached_patcher_init is not None


def test_the_report_can_be_copied(pair: Pair) -> None:
    """The attachment on the model is plain data."""
    report = pair.packed.get_attachment("bonsai")
    assert copy.deepcopy(report) == report == pickle.loads(pickle.dumps(report))
    assert replace(report, backend="").resident_bytes == report.resident_bytes


# torch.compile


@pytest.fixture(scope="module")
def compiled_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One double and one single block: enough to trace."""
    geometry = replace(SMALL, double_blocks=1, single_blocks=1)
    return write_pack(tmp_path_factory.mktemp("compiled") / "model.safetensors", "ternary", geometry)


@pytest.fixture
def compilable(comfy: Any, compiled_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A small pair; ComfyUI chooses attention as on a GPU, because its own for processors asks for the free memory."""
    import comfy.ldm.flux.math
    from comfy.ldm.modules.attention import attention_pytorch

    from bonsai_ops.host.loader import load_bonsai_model

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)
    torch._dynamo.reset()
    packed = load_bonsai_model(compiled_pack, {"compute_dtype": "fp32"})
    yield Pair(compiled_pack, packed, load_stock(read_dense(compiled_pack)))
    torch._dynamo.reset()
    comfy.model_management.unload_all_models()


@dataclass
class Traced:
    """One compiled model. graphs: how many were traced; breaks: reasons, anywhere; packed_calls: our operator's."""

    graphs: int
    breaks: list[str]
    packed_calls: int


def trace(model: Any) -> Traced:
    """Compiles ComfyUI's whole transformer with aot_eager, counting what the graphs hold, and runs it three times."""
    from torch._dynamo.backends.common import aot_autograd

    graphs, calls = 0, 0

    def capture(graph: Any, inputs: list) -> Any:
        nonlocal graphs, calls
        graphs += 1
        calls += sum(str(node.target).startswith("bonsai.linear") for node in graph.graph.nodes)
        return graph

    transformer = model.model.diffusion_model
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(3))
    inputs = (x, torch.tensor([0.7]), text()[0][0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        compiled = torch.compile(transformer, backend=aot_autograd(fw_compiler=capture))
        for _ in range(2):  # the first call of a LoRA prepares its matrices, which may compile once more
            compiled(*inputs, transformer_options={})
        output = compiled(*inputs, transformer_options={})
        assert relative(output, transformer(*inputs, transformer_options={})) < 1e-5
    return Traced(graphs, list(torch._dynamo.utils.counters["graph_break"]), calls)


PATCHES: Mapping[str, Any] = {
    "plain": (None, 0),
    "lora": (bfl_lora, 0),
    "lora-offloaded": (bfl_lora, 1),
    "diff": (lambda: {f"{QKV.removesuffix('.weight')}.diff": torch.ones(3 * HIDDEN, HIDDEN) * 0.05}, 0),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_no_graph_break(compilable: Pair, lora_file: Callable[..., str], kind: str, capsys: Any) -> None:
    """The whole transformer is one graph; a packed layer is one operator in it, with its LoRA beside it."""
    make, memory = PATCHES[kind]
    layers = {LINEAR1, QKV}
    model = compilable.packed
    if make is not None:
        tensors = {n: t for n, t in make().items() if ".1." not in n and ".2." not in n.replace("mlp.2.", "")}
        assert any(key.removesuffix(".weight") in name for key in layers for name in tensors)
        model = with_lora(model, lora_file(tensors))
    traced = trace(loaded(unloaded(model), memory))
    with capsys.disabled():
        print(f"\n  torch.compile, {kind}: {traced.graphs} graphs, {len(traced.breaks)} graph breaks")
    assert traced.breaks == []
    assert traced.packed_calls == (9 if kind == "diff" else 10) * traced.graphs
    assert traced.graphs <= 2


def test_a_compiled_block(compilable: Pair) -> None:
    """One block under fullgraph=True, without inference mode, against the dense twin's."""
    block = loaded(compilable.packed).model.diffusion_model.double_blocks[0].img_mlp
    twin = loaded(compilable.dense).model.diffusion_model.double_blocks[0].img_mlp
    x = torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        assert relative(found, twin(x)) < 1e-5


def test_torch_compile_model_node(compilable: Pair, lora_file: Callable[..., str]) -> None:
    """TorchCompileModel, then a LoRA changed behind it: the result is the uncompiled one's within 1e-5."""
    first = draw(compilable.packed)
    node = "comfy_extras.nodes_torch_compile.TorchCompileModel"
    model = run_node(node, model=compilable.packed, backend="eager")
    assert relative(draw(model), first) < 1e-5
    layer = QKV.removesuffix(".weight")
    name = lora_file(low_rank({layer: (3 * HIDDEN, HIDDEN)}))
    changed = with_lora(model, name, 0.8)
    truth = draw(with_lora(compilable.packed, name, 0.8))
    assert relative(draw(changed), truth) < 1e-5 and relative(truth, first) > 1e-3
    assert relative(draw(model), first) < 1e-5


def test_a_loaded_model_is_left_as_it_was(pair: Pair) -> None:
    """Cloning and predicting change no weight."""
    state = state_bytes(pair.packed)
    predict(loaded(pair.packed.clone()))
    unloaded(pair.packed)
    assert all(torch.equal(t, state[n]) for n, t in state_bytes(pair.packed).items())
