"""Activations beyond fp16: packed layers inside ComfyUI's blocks do what dense ones do there.

ComfyUI's FLUX blocks clamp in fp16 what they hand on: the text after a double block, the picture after the last of
them, both after a single block; nothing within a block, so neither what feeds its last layer. Lumina's clamp that too.
A packed layer stands inside that code, so it needs no clamp of its own as long as it is infinite, or not a number,
where a dense one is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import patch, random_tensors, sample, stock
from twins import Pair, draw, load_stock, packed_layers, read_dense, relative

from bonsai_ops.weights.formats import native
from bonsai_ops.weights.packed_weight import PackedWeight

pytestmark = pytest.mark.host

TOLERANCE = 2e-2
"""Relative, of values that an infinity or the largest number of fp16 took part in."""
LAYERS = {
    "into the last layer": ("img_mlp.0.", "txt_mlp.0.", "linear1."),
    "out of the last layer": ("img_mlp.2.", "txt_mlp.2.", "linear2."),
    "out of the attention": ("img_attn.proj.", "txt_attn.proj."),
}
"""{where numbers overflow: layers whose weights are made too large}."""
CASES = [
    ("binary", "into the last layer", 1e3),
    ("ternary", "into the last layer", 1e3),
    ("binary", "out of the last layer", 3e4),
    ("binary", "out of the attention", 3e4),
]


@pytest.fixture
def make_strong(comfy: Any, packs: Mapping[str, Path], tmp_path: Path) -> Callable[[str, str, float], Pair]:
    """A function that makes a packed model and its dense twin with some layers' weights `factor` times as large."""
    from bonsai_ops.host.loader import load_bonsai_model
    from bonsai_ops.weights.read import open_transformer, read_weights

    def make(variant: str, where: str, factor: float) -> Pair:
        weights, path = read_weights(open_transformer(packs[variant])), tmp_path / "strong.safetensors"
        for name, weight in weights.items():
            if isinstance(weight, PackedWeight) and any(layer in name for layer in LAYERS[where]):
                zero = None if weight.zero is None else weight.zero * factor
                weights[name] = replace(weight, scale=weight.scale * factor, zero=zero)
        native.write(path, weights, native.make_record(weights))
        return Pair(path, load_bonsai_model(path, {"compute_dtype": "fp32"}), load_stock(read_dense(path)))

    comfy.model_management.unload_all_models()
    yield make
    comfy.model_management.unload_all_models()


def in_fp16(model: Any, sampled: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(what `sampled` gives of a model that computes in fp16, values of linear layers that were not finite)."""
    inner, broken = model.model.diffusion_model, []
    if not packed_layers(model):
        inner.half()
    model.model.manual_cast_dtype = torch.float16
    layers = [m for m in inner.modules() if getattr(m, "in_features", 0)]
    hooks = [m.register_forward_hook(lambda m, x, y: broken.append(int((~y.isfinite()).sum()))) for m in layers]
    found = sampled(model)
    for hook in hooks:
        hook.remove()
    return found, sum(broken)


def check(pair: Pair, sampled: Callable[[Any], torch.Tensor]) -> None:
    """Numbers overflow in both models, in as many places, and both give the same finite result."""
    (found, broken), (truth, expected) = (in_fp16(model, sampled) for model in (pair.packed, pair.dense))
    assert expected > 0 and abs(broken - expected) <= 0.01 * expected
    assert truth.isfinite().all() and float(truth.abs().max()) > 0
    assert relative(found, truth) < TOLERANCE


@pytest.mark.parametrize(("variant", "where", "factor"), CASES)
def test_klein(make_strong: Callable[..., Pair], variant: str, where: str, factor: float) -> None:
    check(make_strong(variant, where, factor), lambda model: draw(model, steps=1))


def test_an_architecture_that_clamps_what_feeds_the_last_layer(comfy: Any) -> None:
    """Z-Image, packed by Patch to BitLinear, beside a dense model of the same values."""
    from bonsai_ops.host.layout import is_packed

    tensors = random_tensors(stock("zimage").model)
    strong = {n: t * 1000 if "feed_forward.w" in n and ".w2." not in n else t for n, t in tensors.items()}
    packed, _ = patch(stock("zimage", strong))
    for name, module in packed.model.diffusion_model.named_modules():
        if is_packed(getattr(module, "weight", None)):
            strong[f"{name}.weight"] = module.resident_weight()
    check(Pair(Path(), packed, stock("zimage", strong)), lambda model: sample("zimage", model))
