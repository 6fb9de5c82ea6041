"""ComfyUI's LoRA loaders on packed layers against the dense twin with the same LoRA merged, fp32, relative 1e-5."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_forms import FORMS, adapters
from twins import (
    DENSE,
    HIDDEN,
    LINEAR1,
    LINEAR2,
    QKV,
    SHAPES,
    Pair,
    bfl_lora,
    draw,
    load_device,
    loaded,
    low_rank,
    module_of,
    packed_layers,
    predict,
    relative,
    run_node,
    run_node_outputs,
    same_state,
    state_bytes,
    stock_text_encoder,
    unloaded,
    with_lora,
    with_short_texts,
)

pytestmark = pytest.mark.host

TEXT_WIDTH = 128
"""Of the text encoder, which reads 512 tokens in every test of it."""


@pytest.fixture
def make_pair(make_pair: Callable[..., Pair]) -> Callable[..., Pair]:
    """Pairs that read a text without its padding."""
    return lambda variant="ternary": make_pair(variant).both(with_short_texts)


LoraFile = Callable[[Mapping[str, torch.Tensor]], str]


def layers_with_branch(model: Any) -> int:
    return sum(getattr(m, "resident_patch", None) is not None for m in model.model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_key_forms(pair: Pair, lora_file: LoraFile, caplog: pytest.LogCaptureFixture, form: str) -> None:
    """Every key of the file is taken, the result is the dense one's, and nothing stays once the LoRA is gone."""
    size, state, first = pair.packed.model_size(), state_bytes(pair.packed), draw(pair.packed)
    name = lora_file(FORMS[form])
    with caplog.at_level(logging.WARNING):
        changed = pair.both(lambda m: with_lora(m, name))
    assert [r.message for r in caplog.records if "lora" in r.message.lower()] == []
    found = changed.check()
    assert relative(found, first) > 1e-2
    assert layers_with_branch(changed.packed) == sum(
        key in changed.packed.patches and key != DENSE and "modulation" not in key and "final" not in key
        for key in changed.packed.patches
    )
    assert changed.packed.model_size() == size and pair.packed.model_size() == size
    assert torch.equal(draw(changed.packed), found)
    assert torch.equal(draw(pair.packed), first)
    assert same_state(state_bytes(pair.packed), state)


def test_each_variant(each_pair: Pair, lora_file: LoraFile) -> None:
    name = lora_file(bfl_lora(alpha=2.0))
    each_pair.both(lambda m: with_lora(m, name, 0.7)).check()


def test_three_stacked(pair: Pair, lora_file: LoraFile) -> None:
    """Other ranks and forms on the same layers, one of them split into q, k and v."""
    names = [lora_file(FORMS["bfl"]), lora_file(bfl_lora(rank=7, alpha=1.0, seed=5)), lora_file(FORMS["diffusers"])]

    def stack(model: Any) -> Any:
        for name, strength in zip(names, (0.8, -0.5, 1.3), strict=True):
            model = with_lora(model, name, strength)
        return model

    found = pair.both(stack).check()
    assert relative(found, draw(pair.both(lambda m: with_lora(m, names[0], 0.8)).packed)) > 1e-2


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_many_rows(pair: Pair, lora_file: LoraFile, memory: float) -> None:
    """Load LoRA (Model) of newer versions: up to 20 rows, files twice, switched off, in all forms of names."""
    kinds = adapters()
    forms = [FORMS["bfl"], FORMS["kohya"], FORMS["diffusers"], FORMS["onetrainer"], kinds["loha"], kinds["dora"]]
    names = [lora_file(tensors) for tensors in forms]
    rows = [{"lora_name": names[i % len(names)], "strength": (-1) ** i * 0.04 * i} for i in range(20)]

    def stacked(model: Any) -> Any:
        import comfy.sd
        import comfy.utils
        import folder_paths

        if importlib.util.find_spec("comfy_extras.nodes_lora_stack"):
            return run_node("comfy_extras.nodes_lora_stack.LoadLoraModel", model=model, loras=rows)
        for row in rows:  # what that node does
            if row["strength"]:
                lora = comfy.utils.load_torch_file(
                    folder_paths.get_full_path("loras", row["lora_name"]), safe_load=True
                )
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, row["strength"], 0)
        return model

    first = predict(loaded(pair.packed))
    unloaded(pair.packed)
    changed = pair.both(stacked)
    assert len(changed.packed.patches[QKV]) > 10 and packed_layers(changed.packed) == 22
    found = predict(loaded(changed.packed, memory))
    assert relative(found, predict(loaded(changed.dense))) < 2e-5 and relative(found, first) > 1e-2
    unloaded(changed.packed)
    assert torch.equal(predict(loaded(pair.packed)), first)


def test_strength_is_changed_between_runs(pair: Pair, lora_file: LoraFile) -> None:
    """1, -1, 0.3, 1 again: each is the dense one's, the last equals the first to the bit."""
    name = lora_file(FORMS["bfl"])
    drawn = [pair.both(lambda m, s=s: with_lora(m, name, s)).check() for s in (1.0, -1.0, 0.3, 1.0)]
    assert torch.equal(drawn[0], drawn[3])
    assert all(relative(a, drawn[0]) > 1e-2 for a in drawn[1:3])


def test_a_lora_and_its_negative_cancel(pair: Pair, lora_file: LoraFile) -> None:
    name = lora_file(FORMS["bfl"])
    first = draw(pair.packed)
    assert relative(draw(with_lora(with_lora(pair.packed, name, 0.6), name, -0.6)), first) < 1e-5


def test_the_factor_is_strength_times_alpha_over_rank(pair: Pair) -> None:
    """One layer by hand: y = x W^T + strength alpha / rank * up(down(x)) on the rows of the value projection."""
    from bonsai_ops.host.lora import LayerPatches

    module = module_of(pair.packed, QKV)
    from comfy.weight_adapter import LoRAAdapter

    tensors = low_rank({"x": (HIDDEN, HIDDEN)}, rank=4)
    up, down = tensors["x.lora_B.weight"], tensors["x.lora_A.weight"]
    patch = (0.5, LoRAAdapter(set(), (up, down, 3.0, None, None, None)), 1.0, (0, 2 * HIDDEN, HIDDEN), None)
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(4))
    plain = module(x)
    module.resident_patch = LayerPatches(QKV, [patch], module.weight.shape)
    expected = plain.clone()
    expected[..., 2 * HIDDEN :] += 0.5 * 3.0 / 4 * (x @ down.t() @ up.t())
    assert relative(module(x), expected) < 1e-6
    module.resident_patch = None
    assert torch.equal(module(x), plain)


def test_slices_of_the_input(pair: Pair) -> None:
    """A patch whose offset lies on dimension 1 reads only these columns."""
    from comfy.weight_adapter import LoRAAdapter

    tensors = low_rank({"x": (HIDDEN, HIDDEN)}, rank=2)
    weights = (tensors["x.lora_B.weight"], tensors["x.lora_A.weight"], None, None, None, None)
    adapter = LoRAAdapter(set(), weights)

    def change(model: Any) -> Any:
        model = model.clone()
        assert model.add_patches({(LINEAR2, (1, 2 * HIDDEN, HIDDEN)): adapter}, 0.8)
        return model

    pair.both(change).check()


@pytest.mark.parametrize("kind", adapters())
@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_other_adapters(
    pair: Pair, lora_file: LoraFile, caplog: pytest.LogCaptureFixture, kind: str, memory: int
) -> None:
    """DoRA, LoHa, LoKr, full differences: exact, said once in the log, the weights stay packed."""
    name = lora_file(adapters()[kind])
    changed = pair.both(lambda m: with_lora(m, name, 0.8))
    with caplog.at_level(logging.INFO):
        found, truth = predict(loaded(changed.packed, memory)), predict(loaded(changed.dense))
        again = predict(loaded(unloaded(changed.packed), memory))
    assert relative(found, truth) < 1e-5 and torch.equal(found, again)
    told = [r.message for r in caplog.records if "not plain LoRA" in r.message]
    assert len(told) == 1 and "exact, but slower" in told[0]
    assert packed_layers(changed.packed) == 8 * 2 + 2 * 3
    unloaded(changed.packed)
    assert relative(predict(loaded(pair.packed)), found) > 1e-3


def test_a_plain_lora_beside_another_adapter(pair: Pair, lora_file: LoraFile) -> None:
    """Both on the same layer, in both orders."""
    plain, dora = lora_file(FORMS["bfl"]), lora_file(adapters()["dora"])
    for first, second in ((plain, dora), (dora, plain)):
        pair.both(lambda m, a=first, b=second: with_lora(with_lora(m, a, 0.5), b, 0.8)).check()


def test_a_lora_of_another_size_is_left_out(pair: Pair, lora_file: LoraFile, caplog: pytest.LogCaptureFixture) -> None:
    """As ComfyUI does with a dense layer; the rest of the file counts."""
    tensors = low_rank({QKV.removesuffix(".weight"): (3 * HIDDEN, 2 * HIDDEN), LINEAR1[:-7]: SHAPES[LINEAR1]})
    name = lora_file(tensors)
    with caplog.at_level(logging.ERROR):
        pair.both(lambda m: with_lora(m, name)).check()
    assert any("does not fit" in r.message and QKV in r.message for r in caplog.records)


def test_plain_loras_never_touch_the_codes(pair: Pair, lora_file: LoraFile) -> None:
    """While it is applied: every layer still packed, the same codes; no backup, no log about slowness."""
    state = state_bytes(pair.packed)
    model = loaded(with_lora(pair.packed, lora_file(FORMS["bfl"])))
    assert packed_layers(model) == 22
    assert [key for key in model.backup if key in SHAPES and "modulation" not in key] == []
    kept = {n: t for n, t in state_bytes(model).items() if "modulation" not in n}
    assert all(torch.equal(t, state[n]) for n, t in kept.items())
    unloaded(model)
    assert same_state(state_bytes(model), state)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(comfy: Any, packs: Mapping[str, Path], lora_file: LoraFile, dtype: str) -> None:
    """bf16 and fp16 stay within a few roundings of fp32."""
    from bonsai_ops.host.loader import load_bonsai_model

    name = lora_file(FORMS["bfl"])
    exact, found = (
        predict(loaded(with_lora(load_bonsai_model(packs["ternary"], {"compute_dtype": d}), name, 0.3)))
        for d in ("fp32", dtype)
    )
    assert relative(found, exact) < (3e-2 if dtype == "bf16" else 5e-3)


def test_two_models_with_different_loras(make_pair: Callable[..., Pair], lora_file: LoraFile) -> None:
    """Nothing of one model reaches the other: trap 9."""
    first, second = make_pair("ternary"), make_pair("binary")
    names = lora_file(FORMS["bfl"]), lora_file(FORMS["diffusers"])
    a = first.both(lambda m: with_lora(m, names[0]))
    b = second.both(lambda m: with_lora(m, names[1]))
    drawn = a.check(), b.check()
    assert torch.equal(a.check(), drawn[0]) and torch.equal(b.check(), drawn[1])
    second.check()


@pytest.fixture(scope="module")
def text_encoders(comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(our CLIP, a CLIP of ComfyUI's own operations with the same weights in fp32)."""
    from bonsai_ops.host import text_encoder
    from bonsai_ops.tools import synthetic

    folder = tmp_path_factory.mktemp("pack")
    geometry = synthetic.TextGeometry(hidden=TEXT_WIDTH, mlp=256, heads=2, key_heads=1)
    synthetic.write_text_encoder(folder / "text_encoder-mlx-4bit", geometry)
    stock = stock_text_encoder(folder / "text_encoder-mlx-4bit" / "model.safetensors", geometry)
    return text_encoder.load_bonsai_text_encoder(folder, compute_dtype="fp32"), stock


def test_text_encoder_lora(pair: Pair, text_encoders: tuple[Any, Any], lora_file: LoraFile) -> None:
    """LoraLoader on MODEL and CLIP; a difference on the packed embedding table goes through the dense path."""
    layer = "text_encoders.qwen3_4b.transformer.model.layers.3"
    tensors = low_rank({f"{layer}.self_attn.q_proj": (256, TEXT_WIDTH), f"{layer}.mlp.down_proj": (TEXT_WIDTH, 256)})
    name = lora_file(FORMS["bfl"] | tensors)

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens_scheduled(clip.tokenize("a tree"))[0][0]

    base = [encode(clip) for clip in text_encoders]
    assert relative(*base) < 1e-5
    changed = [
        run_node_outputs("nodes.LoraLoader", model=m, clip=c, lora_name=name, strength_model=0.5, strength_clip=0.8)
        for m, c in zip((pair.packed, pair.dense), text_encoders, strict=True)
    ]
    found, truth = (encode(clip) for _, clip in changed)
    assert relative(found, truth) < 1e-5 and relative(found, base[0]) > 1e-3
    Pair(pair.path, changed[0][0], changed[1][0]).check()
    key = "qwen3_4b.transformer.model.embed_tokens.weight"
    table = torch.zeros(151936, TEXT_WIDTH)
    table[:2000] = 0.3
    embedded = []
    for clip in text_encoders:
        clip = clip.clone()
        assert clip.add_patches({key: ("diff", (table,))}, 1.0) == [key]
        embedded.append(encode(clip))
    assert relative(*embedded) < 1e-5 and relative(embedded[0], base[0]) > 1e-3
    assert torch.equal(encode(text_encoders[0]), base[0])


def test_the_text_encoder_gives_its_weights_too(text_encoders: tuple[Any, Any], lora_file: LoraFile) -> None:
    """CLIPSubtract and a LoRA on a packed CLIP: offloaded layers were given as codes."""
    layer = "text_encoders.qwen3_4b.transformer.model.layers.3.self_attn.q_proj"
    key = f"{layer.removeprefix('text_encoders.')}.weight"
    name = lora_file(low_rank({layer: (256, TEXT_WIDTH)}))
    weights = []
    for clip in text_encoders:
        _, changed = run_node_outputs(
            "nodes.LoraLoader", model=None, clip=clip, lora_name=name, strength_model=0, strength_clip=0.8
        )
        added = run_node("comfy_extras.nodes_model_merging.CLIPSubtract", clip1=changed, clip2=clip, multiplier=0.25)
        patchers = (changed.patcher, added.patcher)
        device = load_device()
        weights.append([p.patch_weight_to_device(key, device_to=device, return_weight=True) for p in patchers])
    for found, truth in zip(*weights, strict=True):
        assert relative(found, truth) < 1e-6


def test_a_model_as_lora_on_the_text_encoder(text_encoders: tuple[Any, Any]) -> None:
    """Set CLIP Hooks with another encoder as a LoRA, embedding table and all: as the twin; codes are refused."""
    import comfy.hooks

    def encode(clip: Any, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        if weights is not None:
            hooks = comfy.hooks.create_hook_model_as_lora(None, weights, 0.0, 0.6)
            node = "comfy_extras.nodes_hooks.SetClipHooks"
            clip = run_node(node, clip=clip, hooks=hooks, apply_to_conds=False, schedule_clip=False)
        return clip.encode_from_tokens_scheduled(clip.tokenize("a tree"))[0][0]

    ours, stock = text_encoders
    weights = comfy.hooks.get_patch_weights_from_model(stock.patcher)
    changed = {n: 1.3 * t for n, t in weights.items() if "layers.3." in n or "embed_tokens" in n}
    first = encode(ours)
    found = encode(ours, changed)
    assert relative(found, encode(stock, changed)) < 1e-5 and relative(found, first) > 1e-3
    with pytest.raises(ValueError, match="brings codes"):
        encode(ours, comfy.hooks.get_patch_weights_from_model(ours.patcher))
    assert torch.equal(encode(ours), first)


def test_save_clip_node(text_encoders: tuple[Any, Any], comfy_base_directory: Path) -> None:
    """CLIPSave writes the codes and tables of the text encoder as they are."""
    from safetensors.torch import load_file

    clip = text_encoders[0]
    state = clip.patcher.model.state_dict()
    run_node_outputs("comfy_extras.nodes_model_merging.CLIPSave", clip=clip, filename_prefix="clip/test")
    (path,) = (comfy_base_directory / "output" / "clip").glob("*.safetensors")
    saved = load_file(path)
    path.unlink()
    suffix = "model.layers.3.self_attn.q_proj.weight"
    for ending in ("", "_scale", "_zero"):
        (found,) = (t for n, t in saved.items() if n.endswith(suffix + ending))
        (expected,) = (t for n, t in state.items() if n.endswith(suffix + ending))
        assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize(("missing", "memory"), [("PLAIN_LORA", 0), ("LOWVRAM_PATCH", 1), ("LOWVRAM_PATCH", 0)])
def test_loras_are_exact_in_a_comfyui_without_a_class(
    missing: str, memory: float, pair: Pair, lora_file: LoraFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower, as the contract says: each call unpacks the layer."""
    from bonsai_ops.host import linear, lora

    for module in (linear, lora):
        if hasattr(module, missing):
            monkeypatch.setattr(module, missing, ())
    name = lora_file(bfl_lora())
    found, truth = (loaded(with_lora(model, name), memory) for model in (pair.packed, pair.dense))
    assert relative(predict(found), predict(truth)) < 1e-5
