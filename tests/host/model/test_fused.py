"""Code that multiplies by a layer's weight itself, or hands the layer to a function of ComfyUI's, misses nothing.

Newer versions of ComfyUI and packs for it do both: with an activation, in parts of a sequence, for a text's logits.
Whatever the layer's forward adds belongs to each of these products: LoRAs, other patches, hooks, the residual.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import patch, sample, stock
from random_weights import random_weight
from twins import QKV, Pair, bfl_lora, loaded, low_rank, module_of, relative, unloaded, with_lora

pytestmark = pytest.mark.host

linear = torch.nn.functional.linear


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def by_the_host(layer: Any, x: torch.Tensor, activation: str) -> torch.Tensor:
    """ComfyUI's function for a layer and the activation before it."""
    import comfy.ops

    return comfy.ops.linear_input_act(layer, x, activation)


def by_the_weight(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """As comfy-kitchen tells a caller of its fused product to go on where a layout declines it, or after the cast."""
    import comfy.ops

    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    y = weight.linear_input_act(x, bias, "gelu_tanh") if hasattr(weight, "_layout_cls") else NotImplemented
    if y is NotImplemented:
        y = linear(gelu(x), weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return y


def cast_first(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """As ComfyUI computes the logits of a text with the table of its embedding."""
    import comfy.ops

    weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
    y = linear(x, weight, bias)
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return y


def ways() -> dict[str, tuple[Callable, Callable]]:
    """{name: (product of a layer and x, activation in it)} of those that this ComfyUI has; all ask for the cast."""
    import comfy.ops
    from comfy_kitchen.tensor import QuantizedTensor

    found: dict[str, tuple[Callable, Callable]] = {
        "forward": (lambda layer, x: layer(x), as_it_is),
        "cast first": (cast_first, as_it_is),
        "cast to another dtype": (lambda layer, x: cast_first(layer, x.double()).float(), as_it_is),
    }
    if hasattr(comfy.ops, "linear_input_act"):
        found["gelu and layer"] = (lambda layer, x: by_the_host(layer, x, "gelu_tanh"), gelu)
        found["swiglu and layer"] = (lambda layer, x: by_the_host(layer, x, "swiglu"), swiglu)
    if hasattr(QuantizedTensor, "linear_input_act"):
        found["gelu and weight"] = (by_the_weight, gelu)
    return found


RESIDENT: dict[str, tuple[Callable, Callable]] = {
    "linear": (lambda layer, x: linear(x, layer.weight, layer.bias), as_it_is),
    "unpacked": (lambda layer, x: linear(x, layer.weight.dequantize(), layer.bias), as_it_is),
    "moved": (lambda layer, x: linear(x, layer.weight.to(torch.float64).float(), layer.bias), as_it_is),
}
"""Ways that ask no cast, and miss the patches of an offloaded dense layer too."""
TURNED: dict[str, tuple[Callable, Callable]] = {
    "matmul": (lambda layer, x: x @ layer.weight.t() + (0 if layer.bias is None else layer.bias), as_it_is),
    "addmm": (
        lambda layer, x: torch.addmm(torch.zeros(1) if layer.bias is None else layer.bias, x[0], layer.weight.t())[
            None
        ],
        as_it_is,
    ),
}
"""Of those, what comfy-kitchen's tensors cannot in inference mode."""


def inputs(act: Callable, columns: int) -> torch.Tensor:
    width = 2 * columns if act is swiglu else columns
    return torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0))


def hold(layer: Any, truth: torch.Tensor, bias: torch.Tensor | None, chosen: dict) -> None:
    """Each of the chosen ways gives the product with the dense weight `truth`, in every mode of torch."""
    for name, (way, act) in chosen.items():
        x = inputs(act, truth.shape[1])
        for mode in (torch.no_grad, torch.inference_mode)[: 1 if name in TURNED else 2]:
            with mode():
                assert relative(way(layer, x), linear(act(x), truth, bias)) < 1e-5, (name, mode)


def streamed(model: Any) -> Any:
    """What dynamic VRAM sets on a layer that it streams: the patch in weight_lowvram_function."""
    from comfy.model_patcher import LowVramPatch

    module_of(model, QKV).weight_lowvram_function = LowVramPatch(QKV, model.patches)
    return model


def hooked(model: Any) -> Any:
    """What a hook with this LoRA sets."""
    from bonsai_ops.host.lora import LayerPatches

    layer = module_of(model, QKV)
    layer.hook_patch = LayerPatches(QKV, model.patches[QKV], layer.weight.shape)
    return model


STATES: dict[str, Callable] = {
    "resident": loaded,
    "offloaded": lambda model: loaded(model, 1),
    "streamed": streamed,
    "hooked": hooked,
}


@pytest.mark.parametrize("kind", ["lora", "difference"])
@pytest.mark.parametrize("state", STATES)
def test_a_patch_belongs_to_every_product(pair: Pair, lora_file: Callable[..., str], state: str, kind: str) -> None:
    """In each place that the layer and its patch may have; without it as before."""

    def patched(model: Any) -> Any:
        if kind == "lora":
            return with_lora(with_lora(model, name, 0.7), name, -0.2)
        model = model.clone()
        assert model.add_patches({QKV: ("diff", (difference,))}, 0.3) == [QKV]
        return model

    name = lora_file(bfl_lora())
    difference = torch.randn(module_of(pair.packed, QKV).weight.shape, generator=torch.Generator().manual_seed(1))
    plain = module_of(pair.dense, QKV).weight.detach().clone()
    changed = pair.both(patched)
    truth = module_of(loaded(changed.dense), QKV).weight
    assert relative(truth, plain) > 1e-2
    model = STATES[state](changed.packed)
    layer = module_of(model, QKV)
    hold(layer, truth, None, ways() | ({} if state == "offloaded" else RESIDENT | TURNED))
    assert relative(layer.convert_weight(layer.weight), plain) < 1e-6  # what patches are added to is without them
    layer.weight_lowvram_function = layer.hook_patch = None
    unloaded(model)
    hold(layer, plain, None, ways() | RESIDENT | TURNED)


@pytest.mark.parametrize("bias", [False, True])
def test_the_residual_belongs_to_every_product(comfy: Any, bias: bool) -> None:
    """And the bias. Copies of the weight know its layer; a layer that is gone takes nothing with it."""
    from bonsai_ops.host.layout import unwrap, wrap
    from bonsai_ops.host.linear import make_bonsai_ops

    generator = torch.Generator().manual_seed(3)
    weight = replace(
        random_weight("ternary", "trit5", 72, 128),
        up=torch.randn(72, 3, generator=generator),
        down=torch.randn(3, 128, generator=generator),
    )
    shift = torch.randn(72, generator=generator) if bias else None
    layer = make_bonsai_ops().Linear(128, 72, bias=bias, dtype=torch.float32)
    layer.load_state_dict({"weight": wrap(weight, torch.float32)} | ({"bias": shift} if bias else {}))
    hold(layer, weight.dequantize(), shift, ways() | RESIDENT | TURNED)
    owner = layer.weight._params.owner
    assert copy.deepcopy(owner) is owner and owner.layer() is layer
    assert pickle.loads(pickle.dumps(owner)) == owner and pickle.loads(pickle.dumps(owner)).layer() is None
    for kept in (layer.weight, layer.weight.detach().clone(), layer.weight.t().t()):
        assert kept._params.owner.layer() is layer and unwrap(kept).rank == 3
    del layer
    assert kept._params.owner.layer() is None
    assert relative(linear(torch.eye(128), kept).t(), weight.dequantize()) < 1e-5


def test_a_patched_wan_with_a_lora_on_its_fused_layer(comfy: Any, lora_file: Callable[..., str]) -> None:
    """Newer versions of ComfyUI call blocks.0.ffn.2 together with the GELU before it."""
    from bonsai_ops.host.layout import is_packed
    from bonsai_ops.host.tensors import tensors_of

    source = stock("wan")
    patched, _ = patch(source, rank=2)
    layer = "blocks.0.ffn.2"
    tensors = tensors_of(patched.model.diffusion_model)
    twin = stock("wan", {n: t.dequantize() if is_packed(t) else t.detach() for n, t in tensors.items()})
    shape = patched.model.diffusion_model.get_submodule(layer).weight.shape
    name = lora_file(low_rank({f"diffusion_model.{layer}": tuple(shape)}))
    found, truth = (sample("wan", with_lora(m, name)) for m in (patched, twin))
    assert relative(found, truth) < 1e-5 and relative(found, sample("wan", patched)) > 1e-4


def test_ltxs_feed_forward_with_a_lora(comfy: Any) -> None:
    """As Wan's."""
    from comfy.ldm.lightricks.model import FeedForward

    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops
    from bonsai_ops.host.lora import LayerPatches

    weights = {
        "net.0.proj": random_weight("ternary", "trit5", 128, 128),
        "net.2": random_weight("binary", "bit", 64, 128),
    }
    block = FeedForward(128, 64, mult=1, dtype=torch.float32, operations=make_bonsai_ops())
    biases = {f"{name}.bias": torch.linspace(-1, 1, w.shape[0]) for name, w in weights.items()}
    block.load_state_dict({f"{n}.weight": wrap(w, torch.float32) for n, w in weights.items()} | biases)
    difference = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    block.net[2].resident_patch = LayerPatches("w", [(0.5, ("diff", (difference,)), 1.0, None, None)], (64, 128))
    x = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(1))
    inner = gelu(linear(x, weights["net.0.proj"].dequantize(), biases["net.0.proj.bias"]))
    truth = linear(inner, weights["net.2"].dequantize() + 0.5 * difference, biases["net.2.bias"])
    with torch.inference_mode():
        assert relative(block(x), truth) < 1e-5
