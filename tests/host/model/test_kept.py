"""What LoRAs keep on a device between calls, and what ComfyUI is told that packed layers need.

The second device is meta, where nothing is computed: what is sent there is counted. Dynamic VRAM needs CUDA and is
imitated.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from random_weights import random_weight
from torch.utils._python_dispatch import TorchDispatchMode
from twins import SHAPES, Pair, bfl_lora, imitate_dynamic, loaded, module_of, predict, relative, unloaded, with_lora

pytestmark = [pytest.mark.host, pytest.mark.processor]

CPU = torch.device("cpu")
PACKED = [key for key in SHAPES if "modulation" not in key]
RANK = 4


class Sent(TorchDispatchMode):
    """How often one of these tensors, or a part of one, is copied to another device."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages, self.count = {t.untyped_storage().data_ptr() for t in tensors}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Tensor and args and type(args[0]) is torch.Tensor and args[0].device != out.device:
            self.count += args[0].untyped_storage().data_ptr() in self.storages
        return out


def sent(model: Any, keys: list[str]) -> int:
    """How many matrices of LoRAs one call of each of these layers sends to the device of its input."""
    matrices = [t for key in keys for patch in model.patches.get(key, ()) for t in patch[1].weights[:2]]
    with Sent(matrices) as mode, torch.inference_mode():
        for key in keys:
            y = module_of(model, key)(torch.ones(1, 3, SHAPES[key][1], device="meta"))
            assert y.device.type == "meta" and y.shape == (1, 3, SHAPES[key][0])
    return mode.count


def lora_bytes(keys: list[str] = PACKED) -> int:
    return sum(4 * RANK * sum(SHAPES[key]) for key in keys)


@pytest.fixture
def dynamic(pair: Pair, lora_file: Callable[..., str]) -> Iterator[Any]:
    """A model with a LoRA as dynamic VRAM leaves it: its weights stay where they were loaded."""
    model = with_lora(pair.packed, lora_file(bfl_lora(rank=RANK)))
    imitate_dynamic(model)
    yield model
    imitate_dynamic(pair.packed)


def test_matrices_are_sent_once(pair: Pair, dynamic: Any, lora_file: Callable[..., str]) -> None:
    """Not at each call, nor each time the model is sampled; other LoRAs are sent, and one that is gone leaves."""
    assert sent(dynamic, PACKED) == 2 * len(PACKED)
    assert sent(dynamic, PACKED) == 0
    imitate_dynamic(dynamic)  # each sampling makes new patches
    assert sent(dynamic, PACKED) == 0
    kept = module_of(dynamic, PACKED[0]).kept_loras
    assert kept.nbytes == lora_bytes()
    stronger = with_lora(dynamic, lora_file(bfl_lora(rank=RANK)), 0.5)
    imitate_dynamic(stronger)
    assert sent(stronger, PACKED) == 2 * 2 * len(PACKED) and sent(stronger, PACKED) == 0
    assert kept.nbytes == 2 * lora_bytes()
    imitate_dynamic(pair.packed)
    gc.collect()
    assert kept.nbytes == 0


def test_no_more_is_kept_than_the_limit(dynamic: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is sent at each call, which is said once."""
    kept = module_of(dynamic, PACKED[0]).kept_loras
    assert kept.limit == 512 << 20
    kept.limit = lora_bytes(PACKED[:5]) + 1
    with caplog.at_level(logging.INFO):
        assert [sent(dynamic, PACKED[:8]) for _ in range(2)] == [2 * 8, 2 * 3]
    assert kept.nbytes == lora_bytes(PACKED[:5])
    assert [r.message for r in caplog.records if "sent there at each step" in r.message] != []
    assert len([r for r in caplog.records if "LoRAs take more than" in r.message]) == 1


def test_an_unloaded_model_keeps_nothing(dynamic: Any) -> None:
    sent(dynamic, PACKED)
    held = [weakref.ref(m) for key in PACKED for m in module_of(dynamic, key)._layer_patches()[0].kept]
    assert len(held) == 2 * len(PACKED)
    unloaded(dynamic)
    gc.collect()
    assert [ref for ref in held if ref() is not None] == [] and module_of(dynamic, PACKED[0]).kept_loras.nbytes == 0
    assert sent(dynamic, PACKED) == 2 * len(PACKED)


def test_a_layer_that_is_moved_keeps_nothing(dynamic: Any) -> None:
    sent(dynamic, PACKED[:1])
    module_of(dynamic, PACKED[0]).to(CPU)
    assert module_of(dynamic, PACKED[0]).kept_loras.nbytes == 0


def test_an_offloaded_layer_keeps_nothing(pair: Pair, lora_file: Callable[..., str]) -> None:
    """Without dynamic VRAM ComfyUI left no more room than for one weight after the other."""
    model = loaded(with_lora(pair.packed, lora_file(bfl_lora(rank=RANK))), 1)
    assert [sent(model, PACKED) for _ in range(2)] == [2 * len(PACKED)] * 2
    assert module_of(model, PACKED[0]).kept_loras.nbytes == 0
    unloaded(model)


def test_what_is_kept_is_counted_and_given_back_first(pair: Pair, lora_file: Callable[..., str]) -> None:
    """It counts as loaded; when memory is short it goes, and comes again with the next load."""
    model = loaded(with_lora(pair.packed, lora_file(bfl_lora(rank=RANK))))
    size, weights = model.model_size(), model.loaded_size()
    drawn = predict(model)
    assert model.loaded_size() == weights + lora_bytes() and model.model_size() == size
    first = next(m for m in model.model.modules() if getattr(m, "comfy_patched_weights", False))
    before = model.model.model_loaded_weight_memory
    freed = model.partially_unload(CPU, 1)
    assert freed == lora_bytes() + before - model.model.model_loaded_weight_memory
    assert model.loaded_size() == model.model.model_loaded_weight_memory and first is not None
    assert relative(predict(model), drawn) < 1e-6
    assert model.loaded_size() == model.model.model_loaded_weight_memory, "kept again while memory is short"
    model.partially_load(CPU, 1e32)
    assert torch.equal(predict(model), drawn)
    assert model.loaded_size() == model.model.model_loaded_weight_memory + lora_bytes()
    unloaded(model)
    assert model.loaded_size() == 0


def encoder_like(vocabulary: int) -> Any:
    """ComfyUI's ModelPatcher, as a CLIP has it, around a packed table of tokens and six dense layers of 1 MiB."""
    import comfy.model_patcher
    import comfy.ops

    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops
    from bonsai_ops.host.patcher import adopt

    model = torch.nn.Module()
    model.embed = make_bonsai_ops().Embedding(vocabulary, 128, dtype=torch.float32)
    model.embed.load_state_dict({"weight": wrap(random_weight("affine", "nibble", vocabulary, 128), torch.float32)})
    model.layers = torch.nn.ModuleList(
        comfy.ops.manual_cast.Linear(512, 512, bias=False, dtype=torch.float32) for _ in range(6)
    )
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    patcher.set_model_compute_dtype(torch.float32)
    adopt(patcher)
    return patcher


def test_a_packed_embedding_is_never_unpacked_whole(comfy: Any) -> None:
    """Without dynamic VRAM ComfyUI kept room for all rows in fp32, 1.5 GB of Qwen3, and offloaded layers for it."""
    patcher = encoder_like(16384)
    dense, room = 16384 * 128 * 4, patcher.model_size() * 3 // 4
    assert dense > room
    patcher.partially_load(CPU, room)
    assert room // 2 < patcher.loaded_size() <= room
    assert patcher.model.model_offload_buffer_memory < room // 2
    patcher.detach()


def test_a_patched_embedding_is_unpacked_whole(comfy: Any) -> None:
    """And ComfyUI keeps the room for it that it did."""
    patcher = encoder_like(16384)
    patcher.add_patches({"embed.weight": ("diff", (torch.ones(16384, 128),))}, 0.1)
    patcher.partially_load(CPU, patcher.model_size() * 3 // 4)
    assert patcher.loaded_size() == 0
    patcher.detach()


@pytest.mark.parametrize(("algorithm", "branch"), [("LoRA", True), ("LoKr", True), ("OFT", True), ("LoHa", False)])
def test_a_layer_that_is_trained_needs_room_for_its_branch(comfy: Any, algorithm: str, branch: bool) -> None:
    """Train LoRA without bypass_mode: ComfyUI kept room for the unpacked weight, 64 MiB here, and offloaded layers."""
    import comfy.model_patcher
    import comfy.ops
    from comfy.weight_adapter import adapter_maps

    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops
    from bonsai_ops.host.patcher import adopt

    model, side = torch.nn.Module(), 4096
    model.large = make_bonsai_ops().Linear(side, side, bias=False, dtype=torch.float32)
    model.large.load_state_dict({"weight": wrap(random_weight("binary", "bit", side, side), torch.float32)})
    model.layers = torch.nn.ModuleList(
        comfy.ops.manual_cast.Linear(1024, 1024, bias=False, dtype=torch.float32) for _ in range(15)
    )
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    patcher.set_model_compute_dtype(torch.float32)
    adopt(patcher)
    patcher.add_weight_wrapper(
        "large.weight", adapter_maps[algorithm].create_train(model.large.weight, rank=4, alpha=1.0)
    )
    room = patcher.model_size() * 7 // 8
    assert room < 4 * side * side
    patcher.partially_load(CPU, room)
    assert (patcher.loaded_size() > room // 2) == branch and patcher.loaded_size() <= room
    patcher.detach()
