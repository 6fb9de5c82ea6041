"""Save Bonsai Model with include_loras: the file alone draws what the model with its LoRAs drew, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_forms import FORMS, adapters
from lora_training import train_lora
from twins import (
    DENSE,
    HIDDEN,
    LINEAR2,
    QKV,
    SHAPES,
    Pair,
    bfl_lora,
    draw,
    load_stock,
    loaded,
    low_rank,
    packed_layers,
    read_dense,
    relative,
    run_node,
    same_state,
    state_bytes,
    unloaded,
    with_lora,
)

pytestmark = pytest.mark.host

TOLERANCE = 1e-6
"""Of the picture against that of the model with its LoRAs, fp32: the sums are taken in another order."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saved" / "m.safetensors"


def save(model: Any, path: Path) -> str:
    from bonsai_ops.host.save import save_bonsai_model

    return save_bonsai_model(model, path, include_loras=True)


def load(path: Path, dtype: str = "fp32") -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(path, {"compute_dtype": dtype})


def residual_ranks(model: Any) -> dict[str, int]:
    """{key: rank} of the packed weights with a residual."""
    from bonsai_ops.host.layout import is_packed, unwrap

    weights = {f"{n}.weight": getattr(m, "weight", None) for n, m in model.model.named_modules()}
    return {key: unwrap(w).rank for key, w in weights.items() if is_packed(w) and unwrap(w).rank}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", [None, 0, 1], ids=["never loaded", "resident", "offloaded"])
def test_the_file_is_the_model_with_its_lora(
    pair: Pair, lora_file: Callable[..., str], path: Path, form: str, memory: float | None
) -> None:
    """Every way in which LoRA files name layers, in each state of the model; still packed, and the source unchanged."""
    state = state_bytes(pair.packed)
    model = with_lora(pair.packed, lora_file(FORMS[form]), 0.7)
    drawn = draw(model)
    if memory is not None:
        loaded(unloaded(model), memory)
    said = save(model, path)
    again = load(path)
    assert relative(draw(again), drawn) < TOLERANCE
    assert packed_layers(again) == 22 and not again.patches
    packed = {key for key in model.patches if key in SHAPES and "modulation" not in key}
    assert residual_ranks(again).keys() == packed
    assert ("packed layers (rank" in said) == bool(packed) and "MB" in said
    unloaded(model)
    assert same_state(state_bytes(pair.packed), state)


def test_each_variant_and_several_loras(each_pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """Ranks, strengths and alphas of three LoRAs add up, one split into q, k and v; the twin agrees."""
    names = [lora_file(FORMS["bfl"]), lora_file(bfl_lora(rank=7, alpha=1.0, seed=5)), lora_file(FORMS["diffusers"])]

    def stack(model: Any) -> Any:
        for name, strength in zip(names, (0.8, -0.5, 1.3), strict=True):
            model = with_lora(model, name, strength)
        return model

    changed = each_pair.both(stack)
    drawn = changed.check()
    said = save(changed.packed, path)
    again = load(path)
    assert relative(draw(again), drawn) < TOLERANCE
    ranks = residual_ranks(again)
    assert ranks[QKV] == 4 + 7 + 3 * 4 and ranks[LINEAR2] == 4 + 7
    assert f"in 22 packed layers (rank {min(ranks.values())} to {max(ranks.values())})" in said
    assert "merged into 3 dense tensors" in said
    truth = load_stock(read_dense(path))
    assert relative(draw(truth), drawn) < 1e-5


def test_what_was_trained_is_one_file_with_its_model(pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """What ComfyUI's Train LoRA makes, with its differences of norms and of the layers that are dense."""
    trained = train_lora(pair.packed, bypass_mode=False, checkpoint_depth=2, steps=2).lora
    model = with_lora(pair.packed, lora_file(trained), 30.0)
    drawn = draw(model)
    assert relative(drawn, draw(pair.packed)) > 1e-3
    said = save(model, path)
    again = load(path)
    assert relative(draw(again), drawn) < TOLERANCE and not again.patches
    assert len(residual_ranks(again)) == packed_layers(again) == 22 and "merged into" in said


def test_a_residual_that_is_there_is_kept(pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """Saved, loaded, given another LoRA and saved again: both are in the file."""
    first, second = lora_file(bfl_lora()), lora_file(bfl_lora(rank=2, seed=8))
    save(with_lora(pair.packed, first, 0.5), path)
    model = with_lora(load(path), second, -0.6)
    expected = draw(with_lora(with_lora(pair.packed, first, 0.5), second, -0.6))
    assert relative(draw(model), expected) < TOLERANCE
    again = path.with_name("again.safetensors")
    save(model, again)
    assert relative(draw(load(again)), expected) < TOLERANCE
    assert set(residual_ranks(load(again)).values()) == {6}


def test_slices_of_rows_and_columns(pair: Pair, path: Path) -> None:
    """Offsets on either dimension: rows or columns of zeros around them, the other values untouched to the bit."""
    from comfy.weight_adapter import LoRAAdapter

    tensors = low_rank({"x": (HIDDEN, HIDDEN)}, rank=2)
    adapter = LoRAAdapter(set(), (tensors["x.lora_B.weight"], tensors["x.lora_A.weight"], 3.0, None, None, None))
    model = pair.packed.clone()
    keys = [(QKV, (0, HIDDEN, HIDDEN)), (LINEAR2, (1, 2 * HIDDEN, HIDDEN))]
    assert len(model.add_patches(dict.fromkeys(keys, adapter), 0.8)) == 2
    drawn = draw(model)
    save(model, path)
    assert relative(draw(load(path)), drawn) < TOLERANCE
    before, after = read_dense(pair.path), read_dense(path)
    rows, columns = (key.removeprefix("diffusion_model.") for key in (QKV, LINEAR2))
    untouched = torch.ones(before[rows].shape, dtype=torch.bool)
    untouched[HIDDEN : 2 * HIDDEN] = False
    assert torch.equal(before[rows][untouched], after[rows][untouched])
    untouched = torch.ones(before[columns].shape, dtype=torch.bool)
    untouched[:, 2 * HIDDEN : 3 * HIDDEN] = False
    assert torch.equal(before[columns][untouched], after[columns][untouched])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_the_dtype_of_the_model(
    comfy: Any, packs: dict[str, Path], lora_file: Callable[..., str], path: Path, dtype: str
) -> None:
    """A 16-bit model rounds its LoRA and its dense layers; the file, loaded so, is within those roundings."""
    name = lora_file(bfl_lora(dtype=torch.bfloat16))
    model = with_lora(load(packs["ternary"], dtype), name, 0.5)
    save(model, path)
    assert relative(draw(load(path, dtype)), draw(model)) < (3e-2 if dtype == "bf16" else 5e-3)
    exact = draw(with_lora(load(packs["ternary"]), name, 0.5))
    assert relative(draw(load(path, dtype)), exact) < (3e-2 if dtype == "bf16" else 5e-3)


def test_the_matrices_are_as_small_as_they_are_exact(pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """bf16 LoRAs stay bf16 at strengths that are powers of two; else the upper matrix, with the strength, is fp32."""
    from safetensors.torch import load_file

    name = lora_file(bfl_lora(dtype=torch.bfloat16))
    layer = QKV.removeprefix("diffusion_model.")
    for strength, dtype in ((0.5, torch.bfloat16), (0.7, torch.float32)):
        target = path.with_name(f"{strength}.safetensors")
        save(with_lora(pair.packed, name, strength), target)
        saved = load_file(target)
        assert (saved[f"{layer}_up"].dtype, saved[f"{layer}_down"].dtype) == (dtype, torch.bfloat16)


@pytest.mark.parametrize("kind", adapters())
def test_what_is_no_plain_lora_is_refused_by_name(
    pair: Pair, lora_file: Callable[..., str], path: Path, kind: str
) -> None:
    """DoRA, LoHa, LoKr, differences on a packed layer: nothing is written; off, they are left out as ever."""
    from bonsai_ops.host.save import save_bonsai_model

    names = {"diff": "full difference", "set": "new weight", "locon": "middle matrix", "dora": "DoRA"}
    model = with_lora(with_lora(pair.packed, lora_file(bfl_lora()), 0.5), lora_file(adapters()[kind]), 0.8)
    with pytest.raises(ValueError, match=rf"\.weight carries .*{names.get(kind, kind)}.*include_loras"):
        save(model, path)
    assert not path.parent.exists()
    save_bonsai_model(model, path)
    assert torch.equal(draw(load(path)), draw(pair.packed))


def test_other_changes_are_refused_by_name(
    pair: Pair, make_pair: Callable[..., Pair], lora_file: Callable[..., str], path: Path
) -> None:
    """Merges, LoRAs in bypass mode and wrapped weights."""
    merged = run_node(
        "comfy_extras.nodes_model_merging.ModelMergeSimple",
        model1=pair.packed,
        model2=make_pair("binary").packed,
        ratio=0.5,
    )
    bypass = pair.packed.clone()
    bypass.set_injections("bypass_lora", [])
    wrapped = pair.packed.clone()
    wrapped.add_weight_wrapper(QKV, lambda weight: weight * 0.5)
    damaged = bfl_lora()
    damaged[f"{QKV.removesuffix('.weight')}.lora_B.weight"][0, 0] = torch.nan
    cases = {
        "is a merge": merged,
        "bypass mode": bypass,
        f"wraps the weight {QKV}": wrapped,
        "not finite": with_lora(pair.packed, lora_file(damaged)),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            save(model, path)
        assert not path.parent.exists()


def test_any_patch_on_a_dense_layer_is_merged(pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """A full difference on the modulation and a LoRA on norms' neighbours: exactly what the model computes with."""
    generator = torch.Generator().manual_seed(3)
    layer = DENSE.removesuffix(".weight")
    model = with_lora(
        pair.packed, lora_file({f"{layer}.diff": 0.1 * torch.randn(SHAPES[DENSE], generator=generator)}), 0.5
    )
    drawn = draw(model)
    said = save(model, path)
    assert torch.equal(draw(load(path)), drawn) and "merged into 1 dense tensors" in said
    assert residual_ranks(load(path)) == {}


def test_a_lora_without_effect_takes_no_room(pair: Pair, lora_file: Callable[..., str], path: Path) -> None:
    """One of strength 0, and one of another size, which is left out as the model leaves it out."""
    from comfy.weight_adapter import LoRAAdapter

    tensors = low_rank({"x": SHAPES[QKV]})
    adapter = LoRAAdapter(set(), (tensors["x.lora_B.weight"], tensors["x.lora_A.weight"], None, None, None, None))
    model = with_lora(pair.packed, lora_file(low_rank({LINEAR2.removesuffix(".weight"): (HIDDEN, HIDDEN)})))
    assert model.add_patches({QKV: adapter}, 0.0) == [QKV]
    assert "none" in save(model, path)
    assert residual_ranks(load(path)) == {} and torch.equal(draw(load(path)), draw(pair.packed))


def test_without_loras_the_file_is_the_same(pair: Pair, path: Path) -> None:
    from bonsai_ops.host.save import save_bonsai_model

    assert "none" in save(pair.packed, path)
    plain = path.with_name("plain.safetensors")
    assert save_bonsai_model(pair.packed, plain) == ""
    assert plain.read_bytes() == path.read_bytes()
