"""Text encoders of MLX that lie alone: bits and group size follow from the other tensors, whatever JSON is near."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bonsai_ops.weights import qwen3
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_text_encoder, read_weights

HIDDEN, HEADS, MLP = 256, 128, 384
SIZES = {
    "vocab_size": 48,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 27,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS // 128,
    "num_key_value_heads": 1,
}
WIDTH = {"o_proj": HEADS, "down_proj": MLP}
Q, DOWN, EMBEDDING = (
    f"model.{name}" for name in ("layers.3.self_attn.q_proj", "layers.3.mlp.down_proj", "embed_tokens")
)
FOREIGN = {
    "none": None,
    "bits": {"quantization": {"bits": 2, "group_size": 128}},
    "group": {"quantization": {"group_size": 32}},
    "another": {"hidden_size": 4096, "num_hidden_layers": 40, "group_size": 256},
    "shallow": {"num_hidden_layers": 12},
}
"""{what it says: a config.json that belongs to another model}."""


@cache
def packed(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """({leaf: tensor} of random codes and tables, the values in float32), packed word by word."""
    rng = np.random.default_rng(rows * columns + bits)
    codes = rng.integers(0, 2**bits, (rows, columns))
    scale, zero = (torch.from_numpy(rng.normal(size=(rows, columns // group))).to(dtype) for _ in range(2))
    each, words = 32 // bits, np.zeros((rows, columns * bits // 32), np.uint32)
    for k in range(columns):
        words[:, k // each] |= codes[:, k].astype(np.uint32) << np.uint32(bits * (k % each))
    wide = [t.double().numpy().repeat(group, axis=1) for t in (scale, zero)]
    values = torch.from_numpy(codes * wide[0] + wide[1])
    return {
        "weight": torch.from_numpy(words.view(np.int32)).view(torch.uint32),
        "scales": scale,
        "biases": zero,
    }, values


def write(
    path: Path, bits: int = 4, group: int = 64, dtype: torch.dtype = torch.bfloat16, mixed: Mapping[str, tuple] = {}
) -> dict[str, torch.Tensor]:
    """An encoder of 27 layers; returns {name: its values}. mixed: {layer: (bits, group)} of those that differ."""
    tensors, values = {}, {}
    for name, shape in (qwen3.expected_shapes(SIZES) | {qwen3.NORM: (HIDDEN,)}).items():
        layer = name.removesuffix(".weight")
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
            continue
        leaves, values[name] = packed(*shape, *mixed.get(layer, (bits, group)), dtype)
        tensors |= {f"{layer}.{leaf}": t.clone() for leaf, t in leaves.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return values


def beside(path: Path, config: object) -> None:
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))


def assert_values(path: Path, values: Mapping[str, torch.Tensor]) -> None:
    """Float32 of the formula in float64; one product and one sum are at most two roundings away."""
    pack, sizes = open_text_encoder(path)
    assert sizes == SIZES | {"final_norm": False}
    found = read_weights(pack)
    assert {name for name, weight in found.items() if isinstance(weight, PackedWeight)} == set(values)
    for name, expected in values.items():
        torch.testing.assert_close(found[name].dequantize().double(), expected, rtol=2e-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 128), (2, 128), (2, 64), (1, 64)])
def test_alone_and_under_any_name(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    """4 bits in groups of 64, 2 in 128 and 1 in 256 have the same number of words a group."""
    path = tmp_path / "text_encoders" / "Some name.safetensors"
    assert_values(path, write(path, bits, group, dtype))


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN)
def test_beside_the_config_of_another_model(tmp_path: Path, config: object) -> None:
    """All text encoders lie in one folder of ComfyUI, and so may their JSON files."""
    values = write(tmp_path / "a.safetensors")
    beside(tmp_path / "a.safetensors", config)
    assert_values(tmp_path / "a.safetensors", values)
    pack, sizes = open_text_encoder(tmp_path / "a.safetensors", whole=True)
    assert sizes["num_hidden_layers"] == 27 and pack.counts["layers in all"] == 27


def test_its_own_config_still_tells_that_layers_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    beside(tmp_path / "a.safetensors", {"hidden_size": HIDDEN, "num_hidden_layers": 36})
    with pytest.raises(PackError, match="holds 27 of 36 layers"):
        open_text_encoder(tmp_path / "a.safetensors", whole=True)


def test_layers_of_several_bits(tmp_path: Path) -> None:
    mixed = {Q: (2, 128), DOWN: (4, 32), EMBEDDING: (1, 64)}
    assert_values(tmp_path / "a.safetensors", write(tmp_path / "a.safetensors", mixed=mixed))


def test_norms_that_contradict_one_another(tmp_path: Path) -> None:
    """They tell nothing; the encoder is refused for its shapes, not read by one of them."""
    path = tmp_path / "a.safetensors"
    write(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.5.input_layernorm.weight"] = torch.ones(2 * HIDDEN).bfloat16()
    save_file(tensors, path)
    with pytest.raises(PackError, match=r"layers\.5\.input_layernorm\.weight: has shape \[512\].*\[256\]"):
        open_text_encoder(path)


@pytest.mark.parametrize("layer", [Q, DOWN, EMBEDDING])
@pytest.mark.parametrize(
    ("words", "groups", "says"),
    [
        (2, 1, "8 bits a code.*Expected 4 bits.*mlx-community/Qwen3-4B-4bit"),
        (0.75, 1, "3 bits a code"),
        (1.5, 1, "6 bits a code"),
        (0.5, 7, "has 7 groups for"),
        (1, 0, "has 0 groups for"),
        (0, 1, "0 bits a code"),
    ],
)
def test_what_is_not_read(tmp_path: Path, layer: str, words: float, groups: int, says: str) -> None:
    """words: of 4 bits a column. groups: of a row, 1 for as many as 64 columns make."""
    path = tmp_path / "a.safetensors"
    write(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rows = tensors[f"{layer}.weight"].shape[0]
    columns = WIDTH.get(layer.rpartition(".")[2], HIDDEN)
    tensors[f"{layer}.weight"] = torch.zeros(rows, int(columns * words / 8), dtype=torch.int32).view(torch.uint32)
    for leaf in ("scales", "biases"):
        tensors[f"{layer}.{leaf}"] = torch.zeros(rows, columns // 64 if groups == 1 else groups).bfloat16()
    save_file(tensors, path)
    with pytest.raises(PackError, match=rf"a\.safetensors: {layer}\.weight: .*{says}"):
        open_text_encoder(path)


def test_codes_of_small_floats(tmp_path: Path) -> None:
    """MLX's other modes: words of the same sizes, exponents of 8 bits for scales, and no biases."""
    path = tmp_path / "a.safetensors"
    write(path, group=32)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if not name.endswith(".biases")}
    tensors = {n: t.view(torch.int16).to(torch.uint8) if n.endswith(".scales") else t for n, t in tensors.items()}
    save_file(tensors, path)
    with pytest.raises(PackError, match=r"small floats.*mlx-community/Qwen3-4B-4bit"):
        open_text_encoder(path)
