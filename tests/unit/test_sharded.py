"""Text encoders in several files: which files those are, and that none overrides another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from messages import reason
from safetensors.torch import save_file

from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.qwen3 import LAYERS, expected_shapes
from bonsai_ops.weights.read import open_text_encoder, read_weights

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "num_hidden_layers": LAYERS,
}
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(params=["text_encoder", "."], ids=["pack", "own folder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a text encoder of two files, full of ones."""
    folder = tmp_path / request.param
    folder.mkdir(exist_ok=True)
    tensors = {name: torch.ones(shape).bfloat16() for name, shape in expected_shapes(SIZES).items()}
    names = sorted(tensors)
    for part, half in zip(PARTS, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in half}, folder / part)
    return folder


def write_index(folder: Path, **weight_map: object) -> None:
    files = {name: PARTS[i % 2] for i, name in enumerate(sorted(expected_shapes(SIZES)))} | weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def stray(folder: Path, name: str) -> None:
    save_file({EMBEDDING: torch.zeros(64, 64).bfloat16()}, folder / name)


@pytest.mark.parametrize("index", [True, False])
def test_the_parts_are_one_model(folder: Path, tmp_path: Path, index: bool) -> None:
    if index:
        write_index(folder)
    pack, sizes = open_text_encoder(tmp_path)
    assert sizes["hidden_size"] == 64 and len(pack.entries) == len(expected_shapes(SIZES))
    assert all(bool((weight == 1).all()) for weight in read_weights(pack).values())


@pytest.mark.parametrize("name", ["model-old.safetensors", "model-00000.safetensors", "model.old.safetensors"])
def test_a_stray_file_overrides_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    """It took the place of a part's tensors without a word. With an index it does not belong to the model."""
    stray(folder, name)
    with pytest.raises(PackError, match=rf"{EMBEDDING}: stands in .*model.* too\. Remove the file that does not"):
        open_text_encoder(tmp_path)
    write_index(folder)
    pack, _ = open_text_encoder(tmp_path)
    assert bool((read_weights(pack)[EMBEDDING] == 1).all())


def test_a_single_file_needs_no_index(folder: Path, tmp_path: Path) -> None:
    """One file under the plain name is the model, whatever an index of other files says."""
    save_file(
        {name: torch.ones(s).bfloat16() for name, s in expected_shapes(SIZES).items()}, folder / "model.safetensors"
    )
    write_index(folder, gone="gone.safetensors")
    assert open_text_encoder(tmp_path)[0].path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "is not JSON"),
        ("[]", "weight_map: is no table of tensors and their files"),
        ('{"weight_map": []}', "weight_map: is no table of tensors and their files"),
        ('{"weight_map": {}}', "weight_map: is no table of tensors and their files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "a: lies in gone.safetensors, which is not there"),
        ('{"weight_map": {"a": 3}}', "a: lies in '3'. Expected a file beside the index"),
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            "a: lies in '../b.safetensors'. Expected a file beside the index",
        ),
        ('{"weight_map": {"a": ".."}}', "a: lies in .., which is not there"),
    ],
)
def test_a_damaged_index(folder: Path, tmp_path: Path, content: str, found: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(PackError) as caught:
        open_text_encoder(tmp_path)
    said = reason(caught.value, folder / INDEX)
    assert said.startswith(found) and "ownload" in said


def test_an_index_that_names_a_file_twice_over(folder: Path, tmp_path: Path) -> None:
    """A tensor of two files that the index names is refused as well."""
    stray(folder, "model-old.safetensors")
    write_index(folder, extra="model-old.safetensors")
    with pytest.raises(PackError, match=rf"{EMBEDDING}: stands in .* too"):
        open_text_encoder(tmp_path)


@pytest.mark.parametrize("leaf", ["pre_quant_scale", "weight_scale", "bias"])
def test_a_layer_has_nothing_that_is_not_read(tmp_path: Path, leaf: str) -> None:
    """What lies beside a weight changes what its layer computes; modules that Klein does not read are no trouble."""
    tensors = {name: torch.ones(shape).bfloat16() for name, shape in expected_shapes(SIZES).items()}
    spare = {"lm_head.weight": torch.ones(64, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64)}
    path = tmp_path / "model.safetensors"
    save_file(tensors | spare | {f"model.layers.{LAYERS}.mlp.gate_proj.{leaf}": torch.ones(64)}, path)
    assert len(open_text_encoder(path)[0].entries) == len(tensors)
    layer = "model.layers.1.self_attn.k_proj"
    save_file(tensors | spare | {f"{layer}.{leaf}": torch.ones(64)}, path)
    with pytest.raises(PackError, match=rf"{layer}\.{leaf}: is unknown"):
        open_text_encoder(path)
