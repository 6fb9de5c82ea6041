"""Edit and guidance nodes on a packed model against its dense twin, fp32, relative 1e-5; interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from twins import (
    SMALL,
    Pair,
    bfl_lora,
    draw,
    latent,
    loaded,
    predict,
    relative,
    run_node,
    text,
    unloaded,
    with_lora,
    with_short_texts,
)

pytestmark = pytest.mark.host


@pytest.fixture
def make_pair(make_pair: Callable[..., Pair]) -> Callable[..., Pair]:
    """Pairs that read a text without its padding."""
    return lambda variant="ternary": make_pair(variant).both(with_short_texts)


def changed(found: torch.Tensor, other: torch.Tensor) -> bool:
    """True if a setting had an effect that one can see."""
    return relative(found, other) > 1e-3


def custom_sampler(model: Any, *, cfg: float = 1.0, steps: int = 2, add_noise: bool = True) -> torch.Tensor:
    """SamplerCustomAdvanced with Flux2Scheduler, as in ComfyUI's own Klein workflow."""
    positive, negative, folder = text(), text(2), "comfy_extras.nodes_custom_sampler."
    guider = (
        run_node(f"{folder}BasicGuider", model=model, conditioning=positive)
        if cfg == 1.0
        else run_node(f"{folder}CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
    )
    return run_node(
        f"{folder}SamplerCustomAdvanced",
        noise=run_node(f"{folder}RandomNoise", noise_seed=5),
        guider=guider,
        sampler=run_node(f"{folder}KSamplerSelect", sampler_name="euler"),
        sigmas=run_node("comfy_extras.nodes_flux.Flux2Scheduler", steps=steps, width=96, height=64),
        latent_image=latent(),
    )["samples"]


def test_each_variant_draws_what_its_twin_draws(each_pair: Pair) -> None:
    """The second and third run equal the first to the bit."""
    first = each_pair.check()
    assert torch.equal(draw(each_pair.packed), first) and torch.equal(draw(each_pair.packed), first)


@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_negative_prompt(pair: Pair, cfg: float) -> None:
    """KSampler with CFG: the negative prompt counts from CFG > 1 on."""
    first = pair.check(cfg=cfg)
    other = pair.check(cfg=cfg, negative=text(9))
    assert changed(other, first) == (cfg > 1)


@pytest.mark.parametrize("cfg", [1.0, 3.5])
def test_sampler_custom_advanced(pair: Pair, cfg: float) -> None:
    found, truth = custom_sampler(pair.packed, cfg=cfg), custom_sampler(pair.dense, cfg=cfg)
    assert relative(found, truth) < 1e-5
    assert torch.equal(custom_sampler(pair.packed, cfg=cfg), found)


def test_batch(pair: Pair) -> None:
    """Batch 3 equals its first picture drawn alone."""
    found = pair.check(start=latent(batch=3), cfg=2.0)
    assert found.shape[0] == 3 and changed(found[1], found[0])
    assert relative(found[:1], draw(pair.packed, cfg=2.0)) < 1e-5


@pytest.mark.parametrize("references", [1, 2])
def test_reference_latents(pair: Pair, references: int) -> None:
    positive = text()
    for number in range(references):
        positive = run_node(
            "comfy_extras.nodes_edit_model.ReferenceLatent", conditioning=positive, latent=latent(20 + number)
        )
    found = pair.check(positive=positive)
    assert changed(found, draw(pair.packed))


def test_image_to_image(pair: Pair) -> None:
    found = pair.check(start=latent(8), denoise=0.5, steps=4)
    assert changed(found, draw(pair.packed, denoise=0.5, steps=4))


def masked(seed: int = 8) -> tuple[dict, torch.Tensor]:
    """(a LATENT whose right half is to be drawn anew, that half's mask in latent pixels)."""
    mask = torch.zeros(1, 64, 96)
    mask[..., 48:] = 1
    return run_node("nodes.SetLatentNoiseMask", samples=latent(seed), mask=mask), mask[0, ::16, ::16].bool()


def test_inpainting_keeps_what_is_not_masked(pair: Pair) -> None:
    start, mask = masked()
    found = pair.check(start=start, steps=4)
    assert relative(found[..., ~mask], start["samples"][..., ~mask]) < 1e-5
    assert changed(found[..., mask], start["samples"][..., mask])


def test_differential_diffusion(pair: Pair) -> None:
    start, _ = masked()
    start["noise_mask"] = start["noise_mask"] * 0.6
    node = "comfy_extras.nodes_differential_diffusion.DifferentialDiffusion"
    found = pair.both(lambda m: run_node(node, model=m)).check(start=start, steps=4)
    assert changed(found, draw(pair.packed, start=start, steps=4))


def test_model_sampling_flux(pair: Pair) -> None:
    """Also changed between two runs of one model, and gone with the node."""
    node, sizes = "comfy_extras.nodes_model_advanced.ModelSamplingFlux", {"width": 2048, "height": 2048}
    first = draw(pair.packed)
    shifted = pair.both(lambda m: run_node(node, model=m, max_shift=3.0, base_shift=1.5, **sizes))
    assert changed(shifted.check(), first)
    assert torch.equal(draw(pair.packed), first)


def test_attention_override(pair: Pair) -> None:
    """A model patch that replaces attention: transformer_options["optimized_attention_override"]."""
    calls: list[int] = []

    def override(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return function(*args, **kwargs) * 0.5

    def change(model: Any) -> Any:
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    first = draw(pair.packed)
    assert changed(pair.both(change).check(), first)
    assert len(calls) == 2 * 2 * (SMALL.double_blocks + SMALL.single_blocks)
    assert torch.equal(draw(pair.packed), first)


def test_block_replacement_patch(pair: Pair) -> None:
    """set_model_patch_replace on a double and a single block: the block runs, its result is changed."""

    def halve(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        out["img"] = out["img"] * 0.5
        return out

    def change(model: Any) -> Any:
        model = model.clone()
        model.set_model_patch_replace(halve, "dit", "double_block", 0)
        model.set_model_patch_replace(halve, "dit", "single_block", 1)
        return model

    first = draw(pair.packed)
    assert changed(pair.both(change).check(), first)
    assert torch.equal(draw(pair.packed), first)


def test_key_value_cache_node(pair: Pair) -> None:
    """FluxKVCache, an object patch together with attention patches."""
    positive = run_node("comfy_extras.nodes_edit_model.ReferenceLatent", conditioning=text(), latent=latent(20))
    pair.both(lambda m: run_node("comfy_extras.nodes_flux.FluxKVCache", model=m)).check(positive=positive)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_interrupt_at_any_step_then_again(pair: Pair, comfy: Any, lora_file: Any, step: int) -> None:
    """Interrupted in a callback of KSampler: the next run draws what an undisturbed one does; no thread is left."""
    import latent_preview

    model = with_lora(pair.packed, lora_file(bfl_lora()), 0.5)
    whole = draw(model, steps=3)
    plain = draw(pair.packed, steps=3)
    threads, prepare = threading.active_count(), latent_preview.prepare_callback

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        inner = prepare(*args, **kwargs)

        def callback(number: int, *rest: Any) -> None:
            if number == step:
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            inner(number, *rest)

        return callback

    latent_preview.prepare_callback = interrupting
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            draw(model, steps=3)
    finally:
        latent_preview.prepare_callback = prepare
    assert threading.active_count() == threads
    assert torch.equal(draw(model, steps=3), whole)
    assert torch.equal(draw(pair.packed, steps=3), plain)


@pytest.mark.parametrize("layer", ["double_blocks.0.img_attn.qkv", "single_blocks.2.linear2"])
@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_interrupt_inside_a_layer(pair: Pair, comfy: Any, lora_file: Any, layer: str, memory: int) -> None:
    """An exception while a packed layer works leaves no hook, patch or changed attribute behind."""
    model = loaded(with_lora(pair.packed, lora_file(bfl_lora()), 0.5), memory)
    whole = predict(model)
    module = model.model.diffusion_model.get_submodule(layer)
    before = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    functions = list(module.weight_function)
    handle = module.register_forward_hook(lambda *_: comfy.model_management.throw_exception_if_processing_interrupted())
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        predict(model)
    handle.remove()
    assert {name: value for name, value in vars(module).items() if not name.startswith("_")}.keys() == before.keys()
    assert module.weight_function == functions
    assert torch.equal(predict(model), whole)
    unloaded(model)
    assert module.weight_function == [] and module.resident_patch is None and module.hook_patch is None
