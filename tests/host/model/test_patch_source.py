"""What was set on the source of Patch to BitLinear, and what its layers compute, is there in the packed model too.

Otherwise the patch is refused in a sentence: no picture of the dense model under the name of a packed one.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from twins import (
    HIDDEN,
    LINEAR1,
    PROJ,
    QKV,
    SMALL,
    absent,
    bfl_lora,
    draw,
    latent,
    load_stock,
    low_rank,
    module_of,
    packed_layers,
    read_dense,
    relative,
    run_node,
    text,
    with_lora,
    write_pack,
)

pytestmark = pytest.mark.host

BYPASS = "comfy_extras.nodes_lora_debug.LoraLoaderBypassModelOnly"
BLOCK, LAYER = "diffusion_model.double_blocks.0", QKV.removesuffix(".weight")


def patch(model: Any, **options: Any) -> tuple[Any, Any]:
    from bonsai_ops.host.patch import PatchOptions, patch_model

    statistics = options.pop("statistics", None)
    return patch_model(model, PatchOptions(**options), statistics)


def sampling(steps: int = 2) -> Any:
    from bonsai_ops.host.sampling import Sampling

    return Sampling(text(), text(2), latent(), 5, steps, 1.0, "euler", "simple")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, torch.Tensor]:
    """Dense weights of one double and one single block, of no few levels."""
    geometry = replace(SMALL, double_blocks=1, single_blocks=1)
    tensors = read_dense(write_pack(tmp_path_factory.mktemp("small") / "model.safetensors", "ternary", geometry))
    generator = torch.Generator().manual_seed(8)
    return {n: t + 0.2 * t.std() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


@pytest.fixture
def source(comfy: Any, small: Mapping[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A dense model; attention as on a GPU, because ComfyUI's own for processors cannot be traced."""
    import comfy.ldm.flux.math
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)
    torch._dynamo.reset()
    comfy.model_management.unload_all_models()
    yield load_stock(small)
    comfy.model_management.unload_all_models()
    torch._dynamo.reset()


# torch.compile


class Backend:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list) -> Any:
        self.graphs += 1
        return graph.forward


def compiled(model: Any, keys: list[str] | None, backend: Any) -> Any:
    """The model behind TorchCompileModel, or behind a node that compiles some of its modules as ComfyUI lets it."""
    if keys is None:
        return run_node("comfy_extras.nodes_torch_compile.TorchCompileModel", model=model, backend=backend)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, keys=keys, backend=backend, dynamic=False, fullgraph=False)
    return clone


KEYS = {"whole": None, "blocks": ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"]}


@pytest.mark.parametrize(("keys", "drawn_before"), [("whole", False), ("blocks", True)])
def test_a_compiled_source_is_compiled_anew(source: Any, keys: str, drawn_before: bool) -> None:
    """What draws are the packed layers, compiled by the same backend; a rebuilt one too."""
    backend = Backend()
    behind = compiled(source, KEYS[keys], backend)
    dense = draw(source, steps=1)
    if drawn_before:
        assert relative(draw(behind, steps=1), dense) < 1e-5
    plain = draw(patch(source, rank=2)[0], steps=1)
    assert relative(plain, dense) > 1e-3
    patched, report = patch(behind, rank=2)
    backend.graphs = 0
    assert len(report.packed) == packed_layers(patched) > 0
    assert relative(draw(patched, steps=1), plain) < 1e-5 and backend.graphs > 0
    asked, found = (m.model_options["torch_compile_kwargs"] for m in (behind, patched))
    assert found == asked and found["backend"] is backend
    if drawn_before:
        function, arguments = patched.cached_patcher_init[:2]
        backend.graphs, calls = 0, []
        again = function(*arguments, disable_dynamic=True)
        module_of(patched, QKV).register_forward_pre_hook(lambda *_: calls.append(1))
        assert relative(draw(again, steps=1), plain) < 1e-5 and backend.graphs > 0 and not calls
        assert relative(draw(behind, steps=1), dense) < 1e-5


@pytest.mark.parametrize("keys", KEYS)
def test_a_compiled_model_is_calibrated_and_measured(source: Any, keys: str) -> None:
    """Compiled and drawn before: every layer is recorded, with the values of the plain model; still compiled after."""
    from bonsai_ops.host.patch.calibrate import sample_recorded
    from bonsai_ops.host.patch.measure import sample_measured

    backend = Backend()
    behind = compiled(source, KEYS[keys], backend)
    drawn = draw(behind, steps=1)
    known, made = sample_recorded(behind, sampling(1), "power")
    truth, _ = sample_recorded(source, sampling(1), "power")
    assert known.layers.keys() == truth.layers.keys() and len(truth.layers) > 10
    for name, statistics in truth.layers.items():
        torch.testing.assert_close(known.layers[name].power, statistics.power, rtol=1e-4, atol=1e-6)
    assert relative(made["samples"], drawn) < 1e-5
    patched, report = patch(behind, statistics=known.layers)
    assert f"calibrated: {len(report.packed)} of {len(report.packed)} layers" in report.to_text()
    draw(patched, steps=1)
    measured, _ = sample_measured(behind, patched, sampling(1))
    count = len(report.packed)
    assert f"measured: {count} of {count} layers" in measured.to_text()
    assert behind.get_wrappers("apply_model", "torch.compile")


def test_layers_that_are_not_called_are_named(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    """By the calibration in the log, by the patch and the measurement in their reports."""
    from bonsai_ops.host.patch.calibrate import sample_recorded
    from bonsai_ops.host.patch.measure import sample_measured

    layer = LAYER.removeprefix("diffusion_model.")
    patched, _ = patch(source)
    shape = module_of(source, QKV).weight.shape
    for model in (source, patched):
        model.add_object_patch(LAYER, torch.nn.Linear(shape[1], shape[0], bias=False))
    with caplog.at_level(logging.INFO):
        known, _ = sample_recorded(source, sampling(1), "power")
    assert layer not in known.layers and f"not called: {layer}" in caplog.text
    measured, _ = sample_measured(source, patched, sampling(1))
    assert f"not called: {layer}" in measured.to_text()
    del source.object_patches[LAYER]
    _, report = patch(source, statistics=known.layers)
    assert f"not called: {layer}" in report.to_text()


# LoRAs in bypass


def bypass(model: Any, name: str, strength: float) -> Any:
    return run_node(BYPASS, model=model, lora_name=name, strength_model=strength)


def lokr(prefix: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        f"{prefix}.lokr_w1": torch.randn(4, 4, generator=generator) / 4,
        f"{prefix}.lokr_w2": torch.randn(rows // 4, columns // 4, generator=generator) / columns**0.5,
    }


def loha(prefix: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"w1_a": (rows, 4), "w1_b": (4, columns), "w2_a": (rows, 4), "w2_b": (4, columns)}
    made = {f"{prefix}.hada_{n}": torch.randn(s, generator=generator) / 3 for n, s in shapes.items()}
    return {**made, f"{prefix}.alpha": torch.tensor(2.0)}


SMALL_LORA = {n: t for n, t in bfl_lora(alpha=2.0).items() if ".1." not in n.replace("mlp.", "") and ".2." not in n}
KINDS = {
    "lora": SMALL_LORA,
    "lokr": lokr(LAYER, 3 * HIDDEN, HIDDEN),
    "loha": loha(LAYER, 3 * HIDDEN, HIDDEN),
}


@pytest.mark.parametrize("drawn_before", [False, True], ids=["fresh", "drawn"])
@pytest.mark.parametrize("kind", KINDS)
def test_bypass_loras_become_loras(source: Any, kind: str, drawn_before: bool, lora_file: Callable[..., str]) -> None:
    """The packed model with the LoRA in its weights, strength and alpha included; the source keeps its bypass."""
    name = lora_file(KINDS[kind])
    other = lora_file(low_rank({LINEAR1.removesuffix(".weight"): (9 * HIDDEN, HIDDEN)}, seed=3))
    behind = bypass(with_lora(source, other, 0.5), name, 0.7)
    before = draw(behind) if drawn_before else None
    patched, _ = patch(behind, recipe="8bit")
    assert not patched.injections
    truth = with_lora(with_lora(patch(source, recipe="8bit")[0], other, 0.5), name, 0.7)
    found = draw(patched)
    assert relative(found, draw(truth)) < 2e-6
    assert relative(found, draw(patch(source, recipe="8bit")[0])) > 1e-3
    assert relative(found, draw(behind)) < 0.02
    if drawn_before:
        assert torch.equal(draw(behind), before)
    function, arguments = patched.cached_patcher_init[:2]
    assert relative(draw(function(*arguments)), found) < 1e-6


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_an_adapter_that_bypass_changes_is_refused(source: Any, kind: str, lora_file: Callable[..., str]) -> None:
    tensors = (
        {**low_rank({LAYER: (3 * HIDDEN, HIDDEN)}), f"{LAYER}.dora_scale": torch.ones(3 * HIDDEN, 1)}
        if kind == "dora"
        else {f"{LAYER}.oft_blocks": torch.randn(3, HIDDEN, HIDDEN) / 50, f"{LAYER}.alpha": torch.tensor(1.0)}
    )
    with pytest.raises(ValueError, match="in bypass than in the weights: load it with Load LoRA"):
        patch(bypass(source, lora_file(tensors), 0.5))


# whatever else nodes set


def transformer(model: Any) -> torch.nn.Module:
    return model.model.diffusion_model


def holding(thing: Any) -> Callable[..., Any]:
    """A wrapper that keeps `thing` and passes the call on."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        assert thing is not None
        return executor(*args, **kwargs)

    return wrapper


class Attention:
    """A patch such as nodes make of a class; `to`: what ComfyUI calls when it moves a model."""

    def __init__(self, module: torch.nn.Module | None) -> None:
        self.kept = {"inner": [module]}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0]


def set_module(model: Any) -> None:
    model.add_object_patch(BLOCK, torch.compile(transformer(model).double_blocks[0], backend="eager"))


def set_transformer(model: Any) -> None:
    model.add_object_patch("diffusion_model", torch.compile(transformer(model), backend="eager"))


def set_weight(model: Any) -> None:
    model.add_object_patch(QKV, torch.nn.Parameter(torch.zeros_like(module_of(model, QKV).weight), False))


def set_forward(model: Any) -> None:
    module = module_of(model, QKV)
    model.add_object_patch(f"{LAYER}.forward", types.MethodType(type(module).forward, module))


def set_plain_forward(model: Any) -> None:
    model.add_object_patch(f"{LAYER}.forward", lambda x: torch.zeros(*x.shape[:-1], 3 * HIDDEN))


def set_method(model: Any) -> None:
    """As nodes do that exchange the loop over the blocks for their own."""
    module = transformer(model)
    model.add_object_patch("diffusion_model.forward_orig", module.forward_orig.__func__.__get__(module, type(module)))


def set_wrapper(model: Any) -> None:
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "mine", holding(transformer(model).double_blocks))


def set_function_wrapper(model: Any) -> None:
    module = transformer(model)
    model.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], module))


def set_callback(model: Any) -> None:
    import comfy.patcher_extension

    model.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, holding([transformer(model)]))


def set_injection(model: Any) -> None:
    import comfy.patcher_extension

    block = weakref.ref(transformer(model).single_blocks[0])
    model.set_injections("mine", [comfy.patcher_extension.PatcherInjection(holding(block), holding(None))])


def set_patch(model: Any) -> None:
    model.set_model_attn1_patch(Attention(transformer(model).double_blocks[0].img_attn))


def set_attachment(model: Any) -> None:
    model.set_attachments("mine", {"weight": module_of(model, PROJ.replace(".1.", ".0.")).weight})


def set_hook(model: Any) -> None:
    module_of(model, QKV).register_forward_hook(lambda module, inputs, output: output * 2)


def set_module_method(model: Any) -> None:
    module = transformer(model)
    module.forward_orig = types.MethodType(lambda self, *args, **kwargs: args[0], module)


def set_more_modules(model: Any) -> None:
    """As packs do that add layers of their own to a transformer."""
    transformer(model).guide = torch.nn.ModuleList([torch.nn.Linear(4, 4)])


SET = {
    name.removeprefix("set_"): function
    for name, function in list(globals().items())
    if name.startswith("set_") and callable(function)
}


@pytest.mark.parametrize("kind", SET)
def test_what_holds_the_sources_layers_is_refused(source: Any, kind: str) -> None:
    """Before anything is quantized, also in a dry run, in a sentence with the cure; nothing is left behind."""
    model = source.clone()
    SET[kind](model)
    for dry in (False, True):
        with pytest.raises(ValueError, match='connect the node that adds it behind "Patch to BitLinear"') as error:
            patch(model, dry_run=dry)
        assert "\n" not in str(error.value)
    if kind not in ("hook", "module_method", "more_modules"):  # these stand on the module itself
        patched, report = patch(source)
        assert packed_layers(patched) == len(report.packed) > 0


def test_what_holds_nothing_of_it_goes_along(source: Any) -> None:
    """Samplings, values, wrappers, patches and injections that work with any model."""
    import comfy.patcher_extension

    def inject(patcher: Any) -> None:
        module = transformer(patcher).double_blocks[0].img_mlp
        forward = module.forward
        patcher.model.put_back = (module, forward)
        module.forward = lambda x: 0.5 * forward(x)

    def eject(patcher: Any) -> None:
        module, forward = patcher.model.put_back
        module.forward = forward

    calls: list[str] = []

    def change(model: Any) -> Any:
        model = run_node("comfy_extras.nodes_model_advanced.ModelSamplingFlux", model=model, max_shift=1.3,
                         base_shift=0.4, width=64, height=64)  # fmt: skip
        model.set_injections("mine", [comfy.patcher_extension.PatcherInjection(inject, eject)])
        model.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, holding(calls))
        model.set_model_input_block_patch(Attention(torch.nn.Linear(2, 2)))
        model.add_object_patch("diffusion_model.my_choice", "a word")
        model.set_attachments("mine", {"words": ["plain"]})
        return model

    changed = change(source)
    draw(changed)  # it is loaded and injected now
    before, _ = patch(changed, recipe="8bit")
    behind = change(patch(source, recipe="8bit")[0])
    patch(source)  # whose clone is loaded and injected
    assert relative(draw(before), draw(behind)) < 2e-6
    assert relative(draw(before), draw(patch(source, recipe="8bit")[0])) > 1e-3
    assert before.model.diffusion_model.my_choice == "a word"


def test_functions_that_hold_the_model_get_the_packed_one(source: Any) -> None:
    """A node behind Patch to BitLinear would have given them that: wrappers, options, nested functions, injections."""
    import comfy.patcher_extension

    seen: list[bool] = []

    def change(model: Any) -> None:
        kept, base = model.clone(), model.model

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(executor.class_obj is base is kept.model)
            return base.diffusion_model(*args, **kwargs) if executor is None else executor(*args, **kwargs)

        model.add_wrapper(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL, lambda *args, **kwargs: wrapper(*args, **kwargs)
        )
        model.set_model_unet_function_wrapper(
            lambda apply, given: kept.model.apply_model(given["input"], given["timestep"], **given["c"])
        )
        model.set_injections("mine", [comfy.patcher_extension.PatcherInjection(
            lambda patcher: seen.append(patcher.model is base), lambda patcher: None)])  # fmt: skip

    model = source.clone()
    change(model)
    patched, _ = patch(model)
    seen.clear()
    assert torch.equal(draw(patched), draw(patch(source)[0])) and len(seen) > 2 and all(seen)
    seen.clear()
    assert torch.equal(draw(model), draw(source)) and len(seen) > 2 and all(seen)


def test_what_a_node_looks_up_in_the_model_is_no_part_of_it(source: Any) -> None:
    """ComfyUI's own that keep the model: RenormCFG, and context windows once they have been used."""
    renormed = run_node("comfy_extras.nodes_lumina2.RenormCFG", model=source, cfg_trunc=100.0, renorm_cfg=1.0)
    patched, _ = patch(renormed)
    truth = run_node("comfy_extras.nodes_lumina2.RenormCFG", model=patch(source)[0], cfg_trunc=100.0, renorm_cfg=1.0)
    assert torch.equal(draw(patched, cfg=2.0), draw(truth, cfg=2.0))


def test_object_patches_of_a_loaded_clone_are_not_in_the_way(source: Any) -> None:
    """A clone that replaces a block is on the device: the plain model is patched, calibrated and saved as it is."""
    from bonsai_ops.host.patch.calibrate import sample_recorded
    from bonsai_ops.host.tensors import base_tensors

    truth, first = patch(source)
    clone = source.clone()
    set_module(clone)
    shape = module_of(source, LINEAR1).weight.shape
    clone.add_object_patch(LINEAR1, torch.nn.Parameter(torch.zeros(shape), False))
    draw(clone)
    patched, report = patch(source)
    assert report.to_csv() == first.to_csv()
    assert relative(draw(patched), draw(truth)) < 1e-6
    draw(clone)
    assert base_tensors(source)[LINEAR1.removeprefix("diffusion_model.")].abs().sum() > 0
    known, _ = sample_recorded(source, sampling(1), "power")
    assert {layer.name for layer in report.layers} == known.layers.keys()


# layers that compute more than a product


def quantized(tensors: Mapping[str, torch.Tensor], kind: str, layers: list[str]) -> dict[str, torch.Tensor]:
    """The weights with some layers as ComfyUI's own quantized files have them, by its own code."""
    import json

    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if kind.removesuffix("-rotated") not in QUANT_ALGOS:
        absent(kind)
    made = dict(tensors)
    algorithm = kind.removesuffix("-rotated")
    for layer in layers:
        description: dict[str, Any] = {"format": algorithm}
        options: dict[str, Any] = {}
        if kind.endswith("-rotated"):
            description |= {"convrot": True, "convrot_groupsize": 64}
            options = {"per_channel": True, "convrot": True, "convrot_groupsize": 64}
        layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
        weight = QuantizedTensor.from_float(made.pop(f"{layer}.weight"), layout, scale="recalculate", **options)
        made |= weight.state_dict(f"{layer}.weight")
        made[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
    return made


def product(model: Any, layer: str, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.model.diffusion_model.get_submodule(layer)(x)


ODD = ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear2", "double_stream_modulation_img.lin"]
"""Two layers that are packed and one that stays."""


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise", "int8_tensorwise-rotated"])
def test_quantized_layers_are_read_as_they_compute(comfy: Any, small: Mapping[str, torch.Tensor], kind: str) -> None:
    """Packed to 8 bits, and left as they are: the source's own product."""
    source = load_stock(quantized(small, kind, ODD))
    patched, report = patch(source, recipe="8bit", group_size=32)
    forms = {layer.name: layer.form for layer in report.layers}
    assert [forms[layer] for layer in ODD] == ["8bit", "8bit", "kept"]
    for layer in ODD:
        x = torch.randn(5, transformer(source).get_submodule(layer).in_features)
        assert relative(product(patched, layer, x), product(source, layer, x)) < 0.01, layer


def scaled(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An nvfp4 file with AWQ's scales of the inputs, as ModelOpt writes it."""
    from bonsai_ops.host import comfyui

    if not comfyui.scales_columns():
        absent("pre_quant_scale")
    generator = torch.Generator().manual_seed(2)
    made = quantized(tensors, "nvfp4", ODD)
    for layer in ODD:
        columns = tensors[f"{layer}.weight"].shape[1]
        made[f"{layer}.pre_quant_scale"] = 0.3 + 3 * torch.rand(columns, generator=generator)
        made[f"{layer}.input_scale"] = torch.tensor(0.01)
    return made


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_scaled_inputs_are_part_of_the_weight(comfy: Any, small: Mapping[str, torch.Tensor], merged: bool) -> None:
    """AWQ: the source's own product in packed layers, in those that stay, in a merge and in a measurement."""
    from bonsai_ops.host.patch.measure import sample_measured

    source = load_stock(scaled(small))
    if merged:
        other = load_stock({n: t + 0.02 * torch.randn(t.shape) for n, t in small.items()})
        clone = source.clone()
        keys = [f"diffusion_model.{layer}.weight" for layer in ODD]
        clone.add_patches({key: other.get_key_patches("diffusion_model.")[key] for key in keys}, 0.4, 0.6)
        source = clone
    patched, _ = patch(source, recipe="8bit", group_size=32)
    drawn = draw(source)  # a merge is in its weights now
    for layer in ODD:
        x = torch.randn(5, transformer(source).get_submodule(layer).in_features)
        assert relative(product(patched, layer, x), product(source, layer, x)) < (0.2 if merged else 0.01), layer
    assert relative(draw(patched), drawn) < (0.3 if merged else 0.03)
    measured, _ = sample_measured(source, patched, sampling())
    assert measured.total("output") < 0.02 and measured.total("relative") < 0.02
    names = set(patched.model.diffusion_model.state_dict())
    assert not any(name.endswith(("input_scale", "pre_quant_scale")) for name in names)
    assert not merged or not patched.patches


def test_a_lora_on_scaled_inputs_is_refused(comfy: Any, small: Mapping[str, torch.Tensor], lora_file: Any) -> None:
    """ComfyUI scales its inputs too, so before and behind the patch it would be another LoRA. In bypass it is one."""
    source, name = load_stock(scaled(small)), lora_file(low_rank({LAYER: (3 * HIDDEN, HIDDEN)}))
    with pytest.raises(ValueError, match=r"img_attn\.qkv scales its inputs .* connect the LoRA behind"):
        patch(with_lora(source, name))
    behind = bypass(source, name, 0.5)
    patched, _ = patch(behind, recipe="8bit", group_size=32)
    assert relative(draw(patched), draw(behind)) < 0.03


@pytest.mark.parametrize("kind", ["parameter", "buffer", "hidden buffer"])
@pytest.mark.parametrize("layer", ODD)
def test_a_tensor_that_nobody_knows_is_named(source: Any, layer: str, kind: str) -> None:
    module = transformer(source).get_submodule(layer)
    if kind == "parameter":
        module.register_parameter("gate", torch.nn.Parameter(torch.ones(3), False))
    else:
        module.register_buffer("gate", torch.ones(3), persistent=kind == "buffer")
    with pytest.raises(ValueError, match=rf"{layer}\.gate is a tensor that Patch to BitLinear does not know"):
        patch(source)


class Coded(torch.Tensor):
    """A weight as packs have it that unpack it in their own layers."""


@pytest.mark.parametrize("layer", ODD)
@pytest.mark.parametrize("codes", [torch.uint8, torch.bfloat16], ids=["bytes", "class"])
def test_a_weight_that_cannot_be_unpacked_is_named(source: Any, layer: str, codes: torch.dtype) -> None:
    """Also of a layer that stays: it would be multiplied as if its codes were values."""
    module = transformer(source).get_submodule(layer)
    weight = torch.ones(module.weight.shape, dtype=codes)
    module.weight = torch.nn.Parameter(weight.as_subclass(Coded) if codes.is_floating_point else weight, False)
    with pytest.raises(ValueError, match=rf"{layer}\.weight is a \w+ of {codes}, which .* cannot unpack"):
        patch(source)


def test_a_packed_layer_takes_no_key_that_it_does_not_use(comfy: Any) -> None:
    """Whoever loads a state dict hears of what was left over, as with any module of torch."""
    from bonsai_ops.host.linear import make_bonsai_ops

    layer = make_bonsai_ops().Linear(4, 3)
    given = {"weight": torch.ones(3, 4), "bias": torch.zeros(3), "pre_quant_scale": torch.ones(4)}
    assert layer.load_state_dict(given, strict=False).unexpected_keys == ["pre_quant_scale"]
    with pytest.raises(RuntimeError, match="pre_quant_scale"):
        layer.load_state_dict(given)
