"""One test for each known trap of packed weights in ComfyUI; `python -m tests.guards` removes the guards one by one.

A test is named by what a user would see if the trap were open, and its first line tells what was seen. In this order,
with the numbers of the list that this plugin was written against: LoRAs 01, 02, 13; merging and saving 01, 03, 04, 05;
a layer 06, 07, 12, 14; memory 08, 10, 11, 20; several models 09, 17, 19; files and prompts 15, 16, 18.
"""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import (
    HIDDEN,
    LINEAR1,
    QKV,
    SHAPES,
    Pair,
    bfl_lora,
    draw,
    loaded,
    module_of,
    packed_layers,
    predict,
    relative,
    run_node,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
)

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[3]
PACKED = [key for key in SHAPES if "modulation" not in key]


@pytest.fixture(autouse=True)
def _comfy(comfy: Any) -> None:
    """Every test here runs with ComfyUI imported."""


def linear_layer(rows: int = 64, columns: int = 128) -> Any:
    """A packed Linear of random ternary codes that was loaded from a state dict."""
    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops
    from bonsai_ops.tools import synthetic
    from bonsai_ops.weights.packed_weight import pack_signs

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (rows, columns), dtype=torch.uint8, generator=generator)
    weight = pack_signs(codes, synthetic.magnitudes(rows, columns, generator), 128, "ternary")
    layer = make_bonsai_ops().Linear(columns, rows, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": wrap(weight, torch.float32)})
    return layer


def test_a_lora_is_no_silent_no_op(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Trap 01. The LoRA had no effect, without a word."""
    changed = pair.both(lambda m: with_lora(m, lora_file(bfl_lora())))
    assert relative(changed.check(), draw(pair.packed)) > 1e-2


def test_a_lora_is_not_gone_after_a_step(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Trap 02. The LoRA was gone after the first step."""
    from bonsai_ops.host.layout import is_packed

    name = lora_file(bfl_lora())
    state = state_bytes(pair.packed)
    model = loaded(with_lora(pair.packed, name))
    predict(model)
    assert packed_layers(model) == len(PACKED)
    assert all(torch.equal(t, state[n]) for n, t in state_bytes(model).items() if "modulation" not in n)
    weight = module_of(model, QKV).weight
    assert is_packed(weight)
    with pytest.raises(RuntimeError, match="never requantized"):
        type(weight).from_float(torch.ones(8, 128), weight._layout_cls)


def test_dynamic_vram_rounds_no_lora_away(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Trap 02. With dynamic VRAM the LoRA was rounded away by the cast that fills the memory."""
    from comfy.model_patcher import LowVramPatch

    model = with_lora(pair.packed, lora_file(bfl_lora()))
    module = module_of(model, QKV)
    x = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    plain = module(x)
    module.weight_lowvram_function = LowVramPatch(QKV, model.patches)
    assert getattr(module, "weight_lowvram_function", None) is None
    assert relative(module(x), plain) > 1e-2


def test_nothing_recommends_a_loader_that_drops_loras() -> None:
    """Trap 13. ComfyUI's LoraLoaderBypass drops split LoRAs and the first of two: nothing we ship names it."""
    folders = ("web", "workflows", "subgraphs", "locales", "nodes")
    files = [f for folder in folders for f in (REPOSITORY / folder).rglob("*") if f.suffix in (".md", ".json", ".py")]
    files.append(REPOSITORY / "README.md")
    assert [str(f) for f in files if "loraloaderbypass" in f.read_text(encoding="utf-8").lower().replace(" ", "")] == []


def test_a_merge_adds_nothing_to_codes(make_pair: Callable[..., Pair]) -> None:
    """Trap 01. Merges added floats to codes."""
    a, b = make_pair("ternary"), make_pair("binary")
    node = "comfy_extras.nodes_model_merging.ModelMergeSimple"
    found, truth = (
        run_node(node, model1=m1, model2=m2, ratio=0.5) for m1, m2 in ((a.packed, b.packed), (a.dense, b.dense))
    )
    assert relative(draw(found), draw(truth)) < 1e-5


def test_model_save_writes_no_garbage(each_pair: Pair) -> None:
    """Trap 03. ModelSave wrote garbage."""
    state = each_pair.packed.model.state_dict()
    weight = module_of(each_pair.packed, QKV).weight
    assert torch.equal(state[QKV], weight._qdata) and state[QKV].dtype == torch.uint8
    assert torch.equal(state[f"{QKV}_scale"], weight._params.scale)
    assert (f"{QKV}_zero" in state) == (weight._params.zero is not None)


def test_merges_miss_no_attribute(each_pair: Pair) -> None:
    """Trap 04. Every merge node raised "Linear has no attribute weight_scale"."""
    patches = each_pair.packed.get_key_patches("diffusion_model.")
    assert f"{QKV}_scale" in patches and set(patches) == {
        n for n in each_pair.packed.model.state_dict() if n.startswith("diffusion_model.")
    }
    merged = run_node(
        "comfy_extras.nodes_model_merging.ModelMergeSimple", model1=each_pair.dense, model2=each_pair.packed, ratio=0.5
    )
    assert relative(draw(merged), draw(each_pair.dense)) < 1e-5


def test_an_offloaded_model_can_be_saved(pair: Pair) -> None:
    """Trap 05. Save Model raised "Only Tensors of floating point and complex dtype can require gradients"."""
    state = {n: t for n, t in state_bytes(pair.packed).items() if n.startswith("diffusion_model.")}
    saved = loaded(pair.packed, 1).state_dict_for_saving()
    assert all(torch.equal(saved[f"model.{name}"].cpu(), tensor.cpu()) for name, tensor in state.items())
    unloaded(pair.packed)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "enable_grad"])
def test_a_product_unpacks_no_layer(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Trap 06. F.linear is dispatched whole in inference mode and in parts elsewhere; each unpacked the whole layer.

    In inference mode a tensor of comfy-kitchen that was made outside cannot be transposed; nothing asks for it there.
    """
    from bonsai_ops.host.layout import BonsaiPackedLayout

    layer = linear_layer()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    dense = layer.weight.dequantize()

    def refuse(*args: object) -> None:
        raise AssertionError("the layer was unpacked")

    monkeypatch.setattr(BonsaiPackedLayout, "dequantize", refuse)
    with getattr(torch, mode)():
        assert relative(torch.nn.functional.linear(x, layer.weight), x @ dense.t()) < 1e-6
        assert relative(torch.nn.functional.linear(x, layer.weight, dense[:, 0]), x @ dense.t() + dense[:, 0]) < 1e-6
        if mode == "inference_mode":
            return
        assert relative(torch.mm(x, layer.weight.t()), x @ dense.t()) < 1e-6
        assert relative(torch.addmm(dense[:, 0], x, layer.weight.t()), x @ dense.t() + dense[:, 0]) < 1e-6


def test_a_layer_can_be_moved_and_cast() -> None:
    """Trap 07. Moving or casting a layer raised or changed nothing, also if made or moved in inference mode."""
    layer = linear_layer()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    layer.to(torch.float64)
    assert layer.weight.dtype == layer.weight._params.orig_dtype == torch.float64
    assert torch.equal(layer.to(torch.float32).to(x.device)(x), before)
    with torch.inference_mode():
        made = linear_layer()
    for move in (x.device, torch.float64, torch.float32):
        made.to(move)
        assert not made.weight.is_inference() and not made.weight._qdata.is_inference()
    assert torch.equal(made(x), before)
    with torch.inference_mode():
        layer.to(torch.float64).to(torch.float32).to(x.device)
        assert torch.equal(layer(x), before)
    assert not layer.weight.is_inference() and not layer.weight._qdata.is_inference()
    watched = weakref.ref(layer.weight)  # as torch.compile holds one: torch would refuse to swap the tensor
    layer.to("meta")
    assert watched() is not layer.weight
    assert {layer.weight.device.type, layer.weight._qdata.device.type, layer.weight_scale.device.type} == {"meta"}


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_activations_are_not_cast_to_uint8(packs: Mapping[str, Path], name: str) -> None:
    """Trap 12. Activations were cast to uint8."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.host.precision import DTYPES

    model = load_bonsai_model(packs["ternary"], {"compute_dtype": name})
    assert {module_of(model, key).weight.dtype for key in PACKED} == {DTYPES[name]}
    assert model.model_dtype() == DTYPES[name]
    assert bool(torch.isfinite(predict(loaded(model))).all())


def test_a_newer_comfy_kitchen_misses_nothing() -> None:
    """Trap 14. A newer comfy-kitchen asked the layout for something it did not have."""
    import dataclasses

    from comfy_kitchen.tensor import get_layout_class

    from bonsai_ops.host.layout import LAYOUT, PackedParams

    layout = get_layout_class(LAYOUT)
    assert not getattr(layout, "__abstractmethods__", None)
    weight = linear_layer().weight
    assert layout.supports_fast_matmul() and layout.get_plain_tensors(weight)[0] is weight._qdata
    assert issubclass(layout.Params, PackedParams) or layout.Params.__name__ == PackedParams.__name__
    assert [f.name for f in dataclasses.fields(layout.Params)][:3] == ["scale", "orig_dtype", "orig_shape"]
    inner, context = weight.__tensor_flatten__()
    again = type(weight).__tensor_unflatten__(
        {name: getattr(weight, name) for name in inner}, context, weight.shape, weight.stride()
    )
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_loading_takes_no_memory_for_dense_layers() -> None:
    """Trap 08. Loading took the memory of the dense model first."""
    from bonsai_ops.host.linear import make_bonsai_ops

    ops = make_bonsai_ops()
    for layer in (ops.Linear(1 << 13, 1 << 13, dtype=torch.float32), ops.Embedding(1 << 13, 1 << 10)):
        assert list(layer.parameters()) == [] and list(layer.buffers()) == []


def test_no_codes_stay_in_vram(each_pair: Pair) -> None:
    """Trap 10. Codes or tables in a second parameter or buffer stayed in VRAM whatever the memory management did."""
    for key in PACKED:
        module = module_of(each_pair.packed, key)
        assert [name for name, _ in module.named_parameters()] == ["weight"]
        assert list(module.buffers()) == []


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_offload_stays_asynchronous(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Trap 11. Asynchronous offload was lost: the stream of a cast was never waited for.

    The device that the codes are brought to is meta, where nothing is computed.
    """
    import comfy.ops

    casts, returned = [], []
    cast, uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def watch_cast(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["offloadable"] is True
        casts.append(cast(*args, **kwargs))
        return casts[-1]

    def watch_uncast(module: Any, weight: Any, bias: Any, stream: Any) -> None:
        returned.append((weight, bias, stream))
        uncast(module, weight, bias, stream)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", watch_cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", watch_uncast)
    layer = linear_layer()
    if kind == "dense":
        layer.set_weight(layer.weight.dequantize())
    layer(torch.ones(1, 128, device="meta" if kind == "packed" else None))
    assert len(casts) == len(returned) == 1
    assert all(a is b for a, b in zip(casts[0], returned[0], strict=True))


def test_dynamic_vram_can_be_turned_off(packs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 20. Where dynamic VRAM misbehaves there was no way around it: memory = classic asks ComfyUI for none."""
    import comfy.sd

    from bonsai_ops.host.loader import load_bonsai_model

    asked, load = {}, comfy.sd.load_diffusion_model_state_dict
    for memory in ("auto", "classic"):

        def watch(*args: Any, memory: str = memory, **kwargs: Any) -> Any:
            asked[memory] = kwargs.get("disable_dynamic", False)
            return load(*args, **kwargs)

        monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", watch)
        model = load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32", "memory": memory})
        assert LINEAR1 in model.model.state_dict()
    assert asked == {"auto": False, "classic": True}


def test_what_one_model_sets_no_other_sees() -> None:
    """Trap 09. What one model set was seen by the other."""
    from bonsai_ops.host.linear import make_bonsai_ops

    first, second = make_bonsai_ops(), make_bonsai_ops()
    first.Linear.comfy_cast_weights = False
    assert second.Linear.comfy_cast_weights is True
    a, b = linear_layer(), linear_layer()
    a.weight_function.append(None)
    assert b.weight_function == [] and b.bias_function == []


def test_a_model_can_be_made_for_another_device(pair: Pair) -> None:
    """Trap 17. Nodes that clone a model for another device raised: packed tensors cannot be copied."""
    function, arguments = pair.packed.cached_patcher_init[:2]
    again = function(*arguments, disable_dynamic=True)
    assert same_state(state_bytes(again), state_bytes(pair.packed))


def test_a_second_import_breaks_no_model(
    pair: Pair, second_import: str, packs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 19. The second import raised, or models of the first lost their layout."""
    from comfy_kitchen.tensor import get_layout_class

    from bonsai_ops.host.layout import LAYOUT

    layout = get_layout_class(LAYOUT)

    def refuse(name: str, *args: object, **kwargs: object) -> None:
        raise AssertionError(f"{name} was registered again")

    monkeypatch.setattr(torch.library, "custom_op", refuse)
    loader = importlib.import_module(f"{second_import}.host.loader")
    assert get_layout_class(LAYOUT) is layout
    other = loader.load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32"})
    drawn = draw(pair.packed)
    assert torch.equal(draw(other), drawn) and torch.equal(draw(pair.packed), drawn)
    node = "comfy_extras.nodes_model_merging.ModelMergeSimple"
    assert relative(draw(run_node(node, model1=pair.packed, model2=other, ratio=0.5)), drawn) < 1e-5


def test_scale_and_shift_are_not_exchanged(packs: Mapping[str, Path], pair: Pair) -> None:
    """Trap 15. Wrong pictures: diffusers stores scale before shift."""
    scale, shift = load_file(packs["ternary"])["norm_out.linear.weight"].chunk(2)
    assert torch.equal(
        pair.packed.model.diffusion_model.final_layer.adaLN_modulation[1].weight, torch.cat([shift, scale])
    )


def test_another_quantization_is_refused(packs: Mapping[str, Path], pair: Pair, tmp_path: Path) -> None:
    """Trap 16. Keys of another quantization switched ComfyUI to its own operations."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.weights.errors import PackError

    assert getattr(pair.packed.model.model_config, "quant_config", None) is None
    described = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name, tensor in (("comfy_quant", described), ("input_scale", torch.ones(1))):
        tensors = load_file(packs["affine"]) | {f"double_blocks.0.img_attn.qkv.{name}": tensor}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(PackError, match=name):
            load_bonsai_model(tmp_path / "model.safetensors")


def test_a_short_prompt_is_padded_on_the_right() -> None:
    """Trap 18. ComfyUI pads shorter text with zeros on the left, which Klein never saw."""
    from bonsai_ops.host.text_encoder import TruncatingTokenizer

    tokenizer = TruncatingTokenizer()
    for prompt in ("a tree", "a tree " * 600):
        (row,) = tokenizer.tokenize_with_weights(prompt)["qwen3_4b"]
        assert len(row) == 512
        assert (row[-1][0] == 151643) == (prompt == "a tree") and row[0][0] != 151643
