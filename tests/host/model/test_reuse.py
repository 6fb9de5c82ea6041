"""Sampling keeps the memory of its results; afterwards none is kept, however it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import random_weight
from resident import resident
from twins import QKV, Pair, bfl_lora, draw, loaded, module_of, with_lora

from bonsai_ops.tools import synthetic
from bonsai_ops.weights.mapped import SMAPS

pytestmark = [pytest.mark.host, pytest.mark.processor]


@pytest.fixture
def model(comfy: Any, packs: Mapping[str, Path]) -> Any:
    from bonsai_ops.host.loader import load_bonsai_model

    return load_bonsai_model(packs["ternary"], {"compute_dtype": "fp32"})


@pytest.fixture
def kept(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were kept whenever a sampling ended; the layers of the tiny model count as large."""
    from bonsai_ops import kernels
    from bonsai_ops.kernels import reuse

    found: list[int] = []
    release = kernels.release_memory

    def noting(user: object) -> None:
        found.append(kernels.kept_bytes())
        release(user)

    monkeypatch.setattr(reuse, "LEAST_BYTES", 1)
    monkeypatch.setattr(kernels, "release_memory", noting)
    return found


def test_the_same_picture_on_used_memory(model: Any, kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference mode, as ComfyUI runs nodes. Two prompts at once, so that results of several sizes live together."""
    from bonsai_ops import kernels

    with torch.inference_mode():
        found = [draw(model.clone(), steps=3, cfg=cfg) for cfg in (1.0, 3.0)]
        assert min(kept) > 0 and len(kept) == 2
        assert kernels.kept_bytes() == 0
        monkeypatch.setattr(kernels, "keep_memory", lambda user: None)
        plain = [draw(model.clone(), steps=3, cfg=cfg) for cfg in (1.0, 3.0)]
    assert kept[2:] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_picture_decoded_meanwhile_does_not_end_it(model: Any, kept: list[int], tmp_path: Path) -> None:
    """As nodes do that show every step. Each is decoded after it, and what the last one used is still kept."""
    from bonsai_ops import kernels
    from bonsai_ops.host.vae import load_vae

    synthetic.write_vae(tmp_path / "vae", (128, 128, 128, 128))
    vae, samples = load_vae(tmp_path), torch.zeros(1, 128, 1, 1)

    def show(*_: Any) -> None:
        vae.decode(samples)

    handle = model.model.diffusion_model.register_forward_hook(show)
    with torch.inference_mode():
        draw(model)
    handle.remove()
    assert len(kept) == 3 and min(kept) > 0 and kernels.kept_bytes() == 0


def test_an_error_gives_the_memory_back(model: Any, kept: list[int]) -> None:
    from bonsai_ops import kernels

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a step")

    handle = model.model.diffusion_model.single_blocks[2].linear2.register_forward_hook(fail)
    try:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="middle of a step"):
            draw(model)
    finally:
        handle.remove()
    assert kept[0] > 0 and kernels.kept_bytes() == 0


def test_training_keeps_nothing(model: Any, kept: list[int]) -> None:
    """Its backward pass needs the results of every layer at once."""
    with torch.enable_grad():
        draw(model)
    assert kept == [0]


WAYS = {
    "forward": lambda layer, x: layer(x),
    "linear": lambda layer, x: torch.nn.functional.linear(x, layer.weight),
    "unpacked": lambda layer, x: layer.weight.dequantize(),
    "converted": lambda layer, x: layer.convert_weight(layer.weight),
    "resident": lambda layer, x: layer.resident_weight(),
}


@pytest.mark.parametrize("kind", ["plain", "lora", "difference", "wrapper"])
def test_a_block_may_write_into_what_a_layer_gives(
    pair: Pair, kept: list[int], lora_file: Callable[..., str], kind: str
) -> None:
    """ComfyUI's blocks add their residual in place: no input, weight, LoRA and no other result sees it."""
    from bonsai_ops import kernels

    model = pair.packed.clone()
    if kind == "lora":
        model = with_lora(model, lora_file(bfl_lora()))
    elif kind == "difference":
        shape = module_of(model, QKV).weight.shape
        model.add_patches({QKV: ("diff", (torch.linspace(-1, 1, shape.numel()).view(shape),))}, 0.3)
    elif kind == "wrapper":
        model.add_weight_wrapper(QKV, lambda weight: weight * 0.5)
    layer = module_of(loaded(model), QKV)
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        layer(x)  # the matrices of a LoRA are kept from here on
        matrices = layer.resident_patch.kept if kind == "lora" else []
        assert len(matrices) == (2 if kind == "lora" else 0)
        held = [x, layer.weight._qdata, layer.weight_scale, *matrices]
        before = [tensor.clone() for tensor in held]
        for way in WAYS.values():
            with kernels.keeping_memory():
                truth, living = way(layer, x).clone(), []
                for number in range(3):
                    living.append(way(layer, x))
                    assert torch.equal(living[-1], truth)
                    living[-1].fill_(number)
                assert [int(y.min()) for y in living] == [int(y.max()) for y in living] == [0, 1, 2]
        assert all(map(torch.equal, held, before))


def test_a_text_encoder_may_write_into_its_embedding(comfy: Any) -> None:
    """Newer versions of ComfyUI write the result of a block of Qwen3 over its input, of the first one over the rows."""
    from bonsai_ops.host.layout import wrap
    from bonsai_ops.host.linear import make_bonsai_ops

    weight = random_weight("affine", "nibble", 40, 128)
    table = make_bonsai_ops().Embedding(40, 128, dtype=torch.float32)
    table.load_state_dict({"weight": wrap(weight, torch.float32)})
    index = torch.tensor([[3, 3, 7]])
    with torch.inference_mode():
        for dtype in (None, torch.float32, torch.bfloat16):
            rows = table(index, out_dtype=dtype)
            assert torch.equal(rows, weight.dequantize(rows.dtype)[index])
            torch.add(rows, 1.0, out=rows)
            assert torch.equal(table(index, out_dtype=dtype), weight.dequantize(rows.dtype)[index])


def test_a_mapped_model_leaves_memory_after_a_picture(comfy: Any, packs: Mapping[str, Path], tmp_path: Path) -> None:
    """Its pages are read again for the next picture, which is the same."""
    from bonsai_ops import convert
    from bonsai_ops.host.loader import load_bonsai_model

    file, read = tmp_path / "native.safetensors", []
    assert convert.main([str(packs["ternary"]), str(file)]) == 0
    model = load_bonsai_model(file, {"compute_dtype": "fp32"})
    if model.load_device.type != "cpu" or not SMAPS.is_file():
        pytest.skip("only a CPU under Linux gives pages back")
    assert resident(file) < file.stat().st_size / 4
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: read.append(resident(file)))
    first, second = draw(model, steps=1), draw(model, steps=1)
    handle.remove()
    assert torch.equal(first, second) and min(read) > file.stat().st_size / 2
    assert resident(file) < file.stat().st_size / 4
