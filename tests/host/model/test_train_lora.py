"""ComfyUI's Train LoRA on a packed model: with each algorithm and option what it makes of the dense twin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_training import DenseWeights, learned, point, right_twin, train_lora
from random_weights import random_weight
from safetensors.torch import save_file
from twins import Pair, module_of, relative, text, with_lora

pytestmark = pytest.mark.host

SIZES = {"latents": [point(4, 6), point(6, 4, 2)], "positive": [text(), text(2)]}
SAME = {"latents": [point(seed=n) for n in (1, 2, 3)], "positive": [text(n) for n in (1, 2, 3)]}
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "lora": (1e-5, {}),
    "lokr": (1e-5, {"algorithm": "LoKr"}),
    "oft": (1e-5, {"algorithm": "OFT"}),
    "batches": (1e-3, {"optimizer": "AdamW", "loss_function": "L1", "batch_size": 2, "learning_rate": 1e-3, **SAME}),
    "accumulated": (1e-3, {"optimizer": "RMSprop", "grad_accumulation_steps": 2, "learning_rate": 1e-3, **SAME}),
    "sizes": (1e-3, {"optimizer": "Adam", "loss_function": "Huber", "learning_rate": 1e-3, **SIZES}),
    "buckets": (1e-5, {"bucket_mode": True, "loss_function": "SmoothL1", "gradient_checkpointing": False, **SIZES}),
    "bf16": (5e-2, {"steps": 1, "training_dtype": "bf16", "lora_dtype": "bf16"}),
    "bf16 but for the lora": (5e-2, {"steps": 1, "training_dtype": "bf16", "lora_dtype": "fp32"}),
    "offloaded": (1e-5, {"offloading": True, "bypass_mode": True, "checkpoint_depth": 1}),
    "offloaded, blocks": (1e-5, {"offloading": True, "checkpoint_depth": 2}),
    "deep": (1e-5, {"checkpoint_depth": 5}),
    "as loaded": (2e-2, {"steps": 1, "training_dtype": "none"}),
    "quantized backward": (1e-5, {"quantized_backward": True}),
    "loha": (1e-5, {"algorithm": "LoHa"}),
    "lokr, bypass": (1e-5, {"algorithm": "LoKr", "bypass_mode": True}),
    "oft, bypass": (1e-5, {"algorithm": "OFT", "bypass_mode": True}),
    "bf16, bypass": (5e-2, {"steps": 1, "training_dtype": "bf16", "lora_dtype": "bf16", "bypass_mode": True}),
}
"""{name: (distance of what was learned from what the twin learned, options)}; bf16 rounds the twin's sums elsewhere."""
BEGINNING = ("algorithm", "rank", "lora_dtype", "training_dtype", "bypass_mode")
"""Options that decide what a training begins with, or whether it can begin."""


@pytest.fixture(scope="module")
def beginnings() -> dict[tuple, dict[str, torch.Tensor]]:
    """{options: LoRA before the first step}, filled as it is needed."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_as_the_dense_twin(pair: Pair, name: str, beginnings: dict[tuple, dict[str, torch.Tensor]]) -> None:
    """The same losses and the same changes, of the same tensors."""
    tolerance, chosen = CASES[name]
    options = {"steps": 2, "bypass_mode": False, "checkpoint_depth": 2, "rank": 4, **chosen}
    found, truth = train_lora(pair.packed, **options), train_lora(right_twin(pair), **options)
    first = {option: options[option] for option in BEGINNING if option in options}
    if (key := tuple(first.items())) not in beginnings:
        beginnings[key] = train_lora(pair.packed, **first, learning_rate=0.0).lora
    assert len(found.losses) == len(truth.losses)
    assert relative(torch.tensor(found.losses), torch.tensor(truth.losses)) < tolerance
    wanted = learned(truth.lora, beginnings[key])
    assert wanted.any() and relative(learned(found.lora, beginnings[key]), wanted) < tolerance


@pytest.mark.parametrize(("algorithm", "whole"), [("LoRA", False), ("LoKr", False), ("OFT", False), ("LoHa", True)])
def test_no_weight_is_unpacked(pair: Pair, algorithm: str, whole: bool) -> None:
    """Nor is there a gradient or a difference of its size, but with LoHa, which is one."""
    from bonsai_ops.host.layout import is_packed

    shapes: dict[bool, set] = {True: set(), False: set()}
    for module in pair.packed.model.modules():
        if (weight := getattr(module, "weight", None)) is not None:
            shapes[is_packed(weight)].add(tuple(weight.shape))
    only = shapes[True] - shapes[False] - {shape[::-1] for shape in shapes[False]}
    only = {shape for shape in only if 512 not in shape}  # as many tokens has a text
    assert only
    with DenseWeights(only) as weights:
        train_lora(pair.packed, algorithm=algorithm, rank=4, bypass_mode=False)
    assert bool(weights.count) == whole


@pytest.fixture
def trained_file(comfy_base_directory: Path) -> Iterator[Path]:
    """Where a LoRA of two steps lies, by the name that Save LoRA Weights gives it."""
    path = comfy_base_directory / "models" / "loras" / "test_trained_2_steps_00001_.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def test_training_goes_on_and_the_file_loads(pair: Pair, trained_file: Path) -> None:
    """From a saved LoRA, and what comes out does to the packed model what it does to the dense one, by Load LoRA."""
    options = {"bypass_mode": False, "checkpoint_depth": 2, "steps": 2}
    start = train_lora(pair.packed, **options).lora
    save_file(start, trained_file)
    found, truth = (train_lora(m, **options, existing_lora=trained_file.name) for m in (pair.packed, right_twin(pair)))
    assert found.steps == truth.steps == 4
    same = {n: t for n, t in truth.lora.items() if n in start and start[n].shape == t.shape}
    assert same.keys() == start.keys()
    wanted = learned(same, start)
    assert wanted.any() and relative(learned({name: found.lora[name] for name in same}, start), wanted) < 1e-5
    save_file({name: tensor.contiguous() for name, tensor in found.lora.items()}, trained_file)
    pair.both(lambda model: with_lora(model, trained_file.name, 30.0)).check()


def test_within_autocast_as_torch(pair: Pair) -> None:
    """A packed layer computes in the dtype in which a dense one does, whatever comes in."""
    for key in ("diffusion_model.double_blocks.0.img_attn.qkv.weight", "diffusion_model.txt_in.weight"):
        packed, dense = (module_of(model, key) for model in (pair.packed, pair.dense))
        x = torch.randn(3, dense.weight.shape[1], device=dense.weight.device)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            found, truth = packed(x), dense(x)
        assert found.dtype == truth.dtype == torch.bfloat16
        assert relative(found, truth) < 1e-2
        assert packed(x).dtype == torch.float32


@pytest.mark.parametrize("order", [("lora", "lora"), ("lora", "oft"), ("oft", "lora"), ("lora", "oft", "lora")])
@pytest.mark.parametrize("rank", [0, 2])
def test_several_adapters_on_one_layer(comfy: Any, order: tuple[str, ...], rank: int) -> None:
    """In their order, with a bias and a residual: the result and the gradients of what ComfyUI makes of the weight."""
    from comfy.weight_adapter.lora import LoraDiff
    from comfy.weight_adapter.oft import OFTDiff

    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops

    torch.manual_seed(0)
    weight = random_weight("ternary", "trit5", 136, 256)
    if rank:
        weight = replace(weight, up=torch.randn(136, rank), down=torch.randn(rank, 256))
    layer = make_bonsai_ops().Linear(256, 136, bias=True, dtype=torch.float32)
    layer.load_state_dict({"weight": wrap(weight, torch.float32), "bias": torch.randn(136)})
    made = {
        "lora": lambda: LoraDiff((torch.randn(136, 4), torch.randn(4, 256) / 16, 2.0, None, None, None)),
        "oft": lambda: OFTDiff((0.1 * torch.randn(17, 8, 8), None, 0.0, None)),
    }
    adapters = [made[name]() for name in order]
    parameters = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    x = torch.randn(3, 256, requires_grad=True)
    dense = weight.dequantize()
    for adapter in adapters:
        dense = adapter(dense)
    truth = torch.nn.functional.linear(x, dense, layer.bias)
    layer.weight_function = adapters
    found, grad = layer(x), torch.randn(3, 136)
    assert relative(found, truth) < 1e-5
    gradients = (torch.autograd.grad(y, (x, *parameters), grad) for y in (found, truth))
    for ours, wanted in zip(*gradients, strict=True):
        assert wanted.any() and relative(ours, wanted) < 1e-5


def test_a_lora_at_its_beginning_fits_fp16(comfy: Any) -> None:
    """After a first step down is about 1e-4; times alpha / rank it would have three bits left."""
    from comfy.weight_adapter.lora import LoraDiff

    from bonsai_ops.host.adapters import low_rank

    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(136, 128, generator=generator) / 11, 1e-4 * torch.randn(128, 256, generator=generator)
    found = [tensor.half().double() for tensor in low_rank(LoraDiff((up, down, 1.0, None, None, None)))]
    assert relative(found[0] @ found[1], up.double() @ down.double() / 128) < 2e-3
