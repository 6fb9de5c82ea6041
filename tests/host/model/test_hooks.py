"""LoRAs as hooks: on one conditioning, scheduled over the steps, beside ordinary LoRAs; against the dense twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from twins import (
    DENSE,
    QKV,
    SHAPES,
    SMALL,
    Pair,
    bfl_lora,
    draw,
    loaded,
    low_rank,
    packed_layers,
    predict,
    relative,
    run_node,
    run_node_outputs,
    same_state,
    state_bytes,
    text,
    unloaded,
    with_lora,
)

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import flux2

pytestmark = pytest.mark.host

HOOKS = "comfy_extras.nodes_hooks."


def lora_hook(name: str, strength: float = 1.0) -> Any:
    """HOOKS of CreateHookLora."""
    return run_node(f"{HOOKS}CreateHookLora", lora_name=name, strength_model=strength, strength_clip=0.0)


def hooked(conditioning: list, hooks: Any) -> list:
    """The conditioning with hooks, as ConditioningSetProperties sets them."""
    return run_node(
        f"{HOOKS}ConditioningSetProperties", cond_NEW=conditioning, strength=1.0, set_cond_area="default", hooks=hooks
    )


def nothing_left(model: Any) -> bool:
    """True if no hook is on any layer or on the patcher."""
    modules = [m for m in model.model.modules() if hasattr(m, "hook_patch")]
    return not model.hook_backup and model.current_hooks is None and all(m.hook_patch is None for m in modules)


def test_a_hook_equals_the_lora_itself(pair: Pair, lora_file: Callable[..., str]) -> None:
    """On the only conditioning of a run: the dense twin's, the picture of an ordinary LoRA, and nothing stays."""
    name, state, first = lora_file(bfl_lora()), state_bytes(pair.packed), draw(pair.packed)
    positive = hooked(text(), lora_hook(name, 0.6))
    found = pair.check(positive=positive)
    assert relative(found, draw(with_lora(pair.packed, name, 0.6))) < 1e-5
    assert relative(found, first) > 1e-2
    assert nothing_left(pair.packed) and packed_layers(pair.packed) == 22
    assert torch.equal(draw(pair.packed, positive=positive), found)
    assert torch.equal(draw(pair.packed), first)
    unloaded(pair.packed)
    assert same_state(state_bytes(pair.packed), state)


def test_a_hook_on_the_positive_prompt_only(pair: Pair, lora_file: Callable[..., str]) -> None:
    """With CFG the LoRA acts on one of the two predictions of each step."""
    positive = hooked(text(), lora_hook(lora_file(bfl_lora()), 0.6))
    found = pair.check(positive=positive, cfg=2.5)
    assert relative(found, draw(pair.packed, cfg=2.5)) > 1e-2
    both = pair.check(positive=positive, negative=hooked(text(2), lora_hook(lora_file(bfl_lora()), 0.6)), cfg=2.5)
    assert relative(found, both) > 1e-3
    assert nothing_left(pair.packed)


def test_two_hooks_at_once(pair: Pair, lora_file: Callable[..., str]) -> None:
    a, b = lora_hook(lora_file(bfl_lora()), 0.5), lora_hook(lora_file(bfl_lora(seed=9, rank=2, alpha=1.0)), -0.7)
    hooks = run_node(f"{HOOKS}CombineHooks", hooks_A=a, hooks_B=b)
    pair.check(positive=hooked(text(), hooks))
    pair.check(positive=hooked(text(), a), negative=hooked(text(2), b), cfg=2.0)
    assert nothing_left(pair.packed)


def test_a_hook_beside_an_ordinary_lora(pair: Pair, lora_file: Callable[..., str]) -> None:
    """The LoRA on the model and the hook's add up; without the hook the LoRA is what it was."""
    plain, other = lora_file(bfl_lora()), lora_file(bfl_lora(seed=4, rank=3))
    changed = pair.both(lambda m: with_lora(m, plain, 0.4))
    first = draw(changed.packed)
    found = changed.check(positive=hooked(text(), lora_hook(other, 0.5)))
    assert relative(found, first) > 1e-3
    assert relative(found, draw(with_lora(changed.packed, other, 0.5))) < 1e-5
    assert torch.equal(draw(changed.packed), first)


def test_a_scheduled_hook(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Keyframes: strength 1 in the first half of the steps, 0.2 in the second; other than any constant strength."""
    keyframes = run_node(f"{HOOKS}CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    keyframes = run_node(f"{HOOKS}CreateHookKeyframe", strength_mult=0.2, start_percent=0.3, prev_hook_kf=keyframes)
    name = lora_file(bfl_lora())
    hooks = run_node(f"{HOOKS}SetHookKeyframes", hooks=lora_hook(name, 0.8), hook_kf=keyframes)
    positive = hooked(text(), hooks)
    found = pair.check(positive=positive, steps=4)
    for strength in (0.8, 0.16, 0.48):
        assert relative(found, draw(with_lora(pair.packed, name, strength), steps=4)) > 1e-3
    assert torch.equal(draw(pair.packed, positive=positive, steps=4), found)
    assert nothing_left(pair.packed)


def test_a_hook_over_a_range_of_steps(pair: Pair, lora_file: Callable[..., str]) -> None:
    """PairConditioningSetProperties with a timestep range and a default for the rest."""
    timesteps, _, _ = run_node_outputs(f"{HOOKS}ConditioningTimestepsRange", start_percent=0.0, end_percent=0.4)
    positive, negative = run_node_outputs(
        f"{HOOKS}PairConditioningSetProperties",
        positive_NEW=text(),
        negative_NEW=text(2),
        strength=1.0,
        set_cond_area="default",
        hooks=lora_hook(lora_file(bfl_lora()), 0.7),
        timesteps=timesteps,
    )
    positive, negative = run_node_outputs(
        f"{HOOKS}PairConditioningSetDefaultAndCombine",
        positive=positive,
        negative=negative,
        positive_DEFAULT=text(),
        negative_DEFAULT=text(2),
    )
    pair.check(positive=positive, negative=negative, cfg=2.0, steps=4)
    assert nothing_left(pair.packed)


def test_a_hook_that_is_no_plain_lora(pair: Pair, lora_file: Callable[..., str]) -> None:
    layer, (rows, columns) = QKV.removesuffix(".weight"), SHAPES[QKV]
    tensors = low_rank({layer: (rows, columns)}, names=("lora_up.weight", "lora_down.weight"))
    name = lora_file(tensors | {f"{layer}.dora_scale": torch.ones(rows, 1)})
    pair.check(positive=hooked(text(), lora_hook(name, 0.8)))
    assert nothing_left(pair.packed)


@pytest.fixture
def checkpoint(comfy_base_directory: Path) -> Iterator[Callable[..., str]]:
    """A function that writes weights {BFL name: tensor} to models/checkpoints and returns the file's name there."""
    folder = comfy_base_directory / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test-hook.safetensors"

    def write(weights: Mapping[str, torch.Tensor]) -> str:
        save_file({f"model.diffusion_model.{n}": t.contiguous() for n, t in weights.items()}, path)
        return path.name

    yield write
    path.unlink(missing_ok=True)


def checkpoint_hook(name: str, strength: float = 1.0, node: str = "CreateHookModelAsLoraModelOnly") -> Any:
    """HOOKS of a Create Hook Model as LoRA node."""
    return run_node(f"{HOOKS}{node}", ckpt_name=name, strength_model=strength, strength_clip=0.0)


def model_hook(weights: Mapping[str, torch.Tensor], strength: float = 1.0) -> Any:
    """HOOKS as Create Hook Model as LoRA makes them of a loaded model's weights {key: tensor}."""
    import comfy.hooks

    return comfy.hooks.create_hook_model_as_lora(weights, None, strength, 0.0)


def other_weights() -> dict[str, torch.Tensor]:
    """The weights of another dense model of that size, {BFL name: tensor}."""
    generator = torch.Generator().manual_seed(77)
    return {n: synthetic.dense_tensor(s, generator).float() for n, s in flux2.expected_shapes(SMALL).items()}


@pytest.mark.parametrize("node", ["CreateHookModelAsLora", "CreateHookModelAsLoraModelOnly"])
def test_a_model_as_lora(each_pair: Pair, checkpoint: Callable[..., str], node: str) -> None:
    """Create Hook Model as LoRA raised TypeError on a packed layer: the difference to the base weight was not known."""
    state, first = state_bytes(each_pair.packed), draw(each_pair.packed)
    name = checkpoint(other_weights())
    whole = each_pair.check(1e-7, positive=hooked(text(), checkpoint_hook(name, 1.0, node)))
    half = each_pair.check(1e-7, positive=hooked(text(), checkpoint_hook(name, 0.5, node)), cfg=2.0, steps=3)
    assert relative(whole, first) > 1e-2 and relative(half, whole) > 1e-2
    assert nothing_left(each_pair.packed) and torch.equal(draw(each_pair.packed), first)
    unloaded(each_pair.packed)
    assert same_state(state_bytes(each_pair.packed), state)


def test_a_model_as_lora_in_company(
    pair: Pair, make_pair: Callable[..., Pair], lora_file: Callable[..., str], checkpoint: Callable[..., str]
) -> None:
    """Beside an ordinary LoRA, beside a LoRA hook in either order, twice, scheduled, and on a merge."""
    name, other = lora_file(bfl_lora()), checkpoint(other_weights())
    keyframes = run_node(f"{HOOKS}CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    keyframes = run_node(f"{HOOKS}CreateHookKeyframe", strength_mult=0.2, start_percent=0.3, prev_hook_kf=keyframes)
    alone, lora = checkpoint_hook(other, 0.6), lora_hook(name, 0.5)
    scheduled = run_node(f"{HOOKS}SetHookKeyframes", hooks=alone, hook_kf=keyframes)

    def both(a: Any, b: Any) -> list:
        return hooked(text(), run_node(f"{HOOKS}CombineHooks", hooks_A=a, hooks_B=b))

    drawn = [
        pair.check(1e-7, positive=both(lora, alone)),
        pair.check(1e-7, positive=both(alone, lora)),
        pair.check(1e-7, positive=both(alone, checkpoint_hook(other, -0.3))),
        pair.check(1e-7, positive=hooked(text(), scheduled), steps=4),
        pair.both(lambda m: with_lora(m, name, 0.4)).check(1e-6, positive=hooked(text(), alone)),
        pair.check(positive=hooked(text(), alone), negative=hooked(text(2), lora), cfg=2.0),
    ]
    assert relative(drawn[0], drawn[1]) < 1e-6
    assert all(relative(a, b) > 1e-3 for i, a in enumerate(drawn) for b in drawn[1:i])
    b = make_pair("binary")
    node = "comfy_extras.nodes_model_merging.ModelMergeSimple"
    merged = Pair(
        pair.path,
        run_node(node, model1=pair.packed, model2=b.packed, ratio=0.3),
        run_node(node, model1=pair.dense, model2=b.dense, ratio=0.3),
    )
    merged.check(positive=hooked(text(), alone))
    unloaded(merged.packed)
    assert nothing_left(pair.packed) and packed_layers(pair.packed) == 22


def packed_source(pair: Pair) -> dict[str, torch.Tensor]:
    """What ComfyUI takes of a packed model as the weights of a hook."""
    import comfy.hooks

    return comfy.hooks.get_patch_weights_from_model(pair.packed)


def odd_sources(pair: Pair, other: Pair) -> dict[str, tuple[Mapping[str, torch.Tensor], str]]:
    """{what is wrong with it: (weights of a hook, what the message says)}."""
    dense = {f"diffusion_model.{n}": t for n, t in other_weights().items()}
    return {
        "packed": (packed_source(other), "brings codes"),
        "its own": (packed_source(pair), "brings codes"),
        "scaled": (dense | {f"{QKV}_scale": torch.ones(1)}, "brings codes"),
        "codes without a table": (dense | {QKV: torch.ones(SHAPES[QKV], dtype=torch.uint8)}, "brings codes"),
        "another size": (dense | {QKV: dense[QKV][:, :64]}, "needs a checkpoint of the same model"),
    }


@pytest.mark.parametrize("kind", ["packed", "its own", "scaled", "codes without a table", "another size"])
@pytest.mark.parametrize("company", [False, True], ids=["alone", "behind a LoRA"])
def test_a_hook_of_codes_is_refused(
    pair: Pair, make_pair: Callable[..., Pair], lora_file: Callable[..., str], kind: str, company: bool
) -> None:
    """In a sentence, and nothing stays: its tables were written over this model's, and every later sampling raised."""
    weights, message = odd_sources(pair, make_pair("affine"))[kind]
    lora = lora_hook(lora_file(bfl_lora()), 0.6)
    refused_then_as_before(pair, model_hook(weights, 0.7), lora, message, company)


def refused_then_as_before(pair: Pair, hooks: Any, lora: Any, message: str | None, company: bool) -> None:
    """Sampling with these hooks raises, alone or behind the LoRA; the model is then what it was, to the bit."""
    state, first = state_bytes(pair.packed), draw(pair.packed)
    hooked_first = draw(pair.packed, positive=hooked(text(), lora))
    failing = run_node(f"{HOOKS}CombineHooks", hooks_A=lora, hooks_B=hooks) if company else hooks
    for _ in range(2):
        with pytest.raises(Exception, match=message):
            draw(pair.packed, positive=hooked(text(), lora), negative=hooked(text(2), failing), cfg=2.0)
        assert nothing_left(pair.packed) and packed_layers(pair.packed) == 22
    assert torch.equal(draw(pair.packed), first)
    assert torch.equal(draw(pair.packed, positive=hooked(text(), lora)), hooked_first)
    unloaded(pair.packed)
    assert same_state(state_bytes(pair.packed), state)
    assert torch.equal(draw(pair.packed), first)


@pytest.mark.parametrize("company", [False, True], ids=["alone", "behind a LoRA"])
@pytest.mark.parametrize("kind", ["dense layer", "packed layer", "unknown", "table"])
def test_a_hook_that_fails_poisons_nothing(pair: Pair, lora_file: Callable[..., str], kind: str, company: bool) -> None:
    """Whatever goes wrong while hooks are put on, or at the first call: the model is then what it was."""
    import comfy.hooks

    dense = {f"diffusion_model.{n}": ("model_as_lora", (t,)) for n, t in other_weights().items()}
    patches: dict[str, Any] = {
        "dense layer": dense | {DENSE: ("model_as_lora", (torch.ones(3, 5),))},
        "packed layer": dense | {QKV: ("diff", None)},
        "unknown": dense | {DENSE: (1, 2, 3, 4)},
        "table": {f"{QKV}_scale": ("diff", (torch.ones(SHAPES[QKV][0], 1),))},
    }[kind]
    hooks = comfy.hooks.create_hook_model_as_lora(None, None, 0.7, 0.0)
    hooks.hooks[0].weights = patches
    lora = lora_hook(lora_file(bfl_lora()), 0.6)
    refused_then_as_before(pair, hooks, lora, None, company)


@pytest.mark.parametrize("memory", [0, 1], ids=["resident", "offloaded"])
def test_hooks_that_fail_halfway_are_taken_off(pair: Pair, lora_file: Callable[..., str], memory: float) -> None:
    """A model that is loaded and not sampled, so that nobody cleans up behind it: as it was before, without a call."""
    import comfy.hooks

    name = lora_file(bfl_lora())
    model = loaded(with_lora(pair.packed, name, 0.4), memory)
    first = predict(model)
    weights = {key: t for n, t in other_weights().items() if (key := f"diffusion_model.{n}") != DENSE}
    hooks = model_hook(weights | {DENSE: torch.ones(3, 5)})  # the last: all others are on by then
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    model.register_all_hook_patches(hooks, target, model_options=model.model_options)
    with pytest.raises(RuntimeError, match="must match"):
        model.apply_hooks(hooks)
    assert nothing_left(model) and torch.equal(predict(model), first)
    unloaded(model)


@pytest.mark.parametrize("mode", ["MaxSpeed", "MinVram"])
def test_hook_modes(pair: Pair, comfy: Any, lora_file: Callable[..., str], mode: str) -> None:
    """ComfyUI keeps merged weights of the dense layers between the steps or not."""
    import comfy.hooks

    def change(model: Any) -> Any:
        model = model.clone()
        model.set_hook_mode(getattr(comfy.hooks.EnumHookMode, mode))
        return model

    positive = hooked(text(), lora_hook(lora_file(bfl_lora()), 0.6))
    pair.both(change).check(positive=positive, negative=text(2), cfg=2.0, steps=3)


def test_hooks_on_an_offloaded_model(pair: Pair, comfy: Any, lora_file: Callable[..., str]) -> None:
    """No layer resident: the hook is applied to the packed layers all the same."""
    import comfy.hooks

    name = lora_file(bfl_lora())
    hooks = lora_hook(name, 0.6)
    model = pair.packed.clone()
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    model.register_all_hook_patches(hooks, target, model_options=model.model_options)
    loaded(model, 1)
    model.patch_hooks(hooks)
    modules = [m for m in model.model.modules() if getattr(m, "hook_patch", None) is not None]
    assert len(modules) == 22
    model.patch_hooks(None)
    assert nothing_left(model)
    unloaded(model)


def test_a_text_encoder_hook_registers_nothing_on_the_model(pair: Pair, lora_file: Callable[..., str]) -> None:
    """A LoRA that has no key of this model changes nothing."""
    name = lora_file(low_rank({"text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj": (512, 256)}))
    assert torch.equal(draw(pair.packed, positive=hooked(text(), lora_hook(name))), draw(pair.packed))


def test_interrupted_with_a_hook(pair: Pair, comfy: Any, lora_file: Callable[..., str]) -> None:
    """An interrupt in the middle of a run with hooks leaves no hook on any layer."""
    positive = hooked(text(), lora_hook(lora_file(bfl_lora()), 0.6))
    whole, plain = draw(pair.packed, positive=positive), draw(pair.packed)
    module = pair.packed.model.diffusion_model.single_blocks[2].linear2
    handle = module.register_forward_hook(lambda *_: comfy.model_management.throw_exception_if_processing_interrupted())
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(pair.packed, positive=positive)
    handle.remove()
    assert nothing_left(pair.packed)
    assert torch.equal(draw(pair.packed), plain)
    assert torch.equal(draw(pair.packed, positive=positive), whole)
