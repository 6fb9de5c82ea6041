"""Missing last blocks: a file that looks like a shallower model is refused wherever something tells how deep it is."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from messages import reason
from safetensors.torch import load_file, save_file

from bonsai_ops.tools.synthetic import KLEIN_4B, TINY, write_gemlite, write_mlx
from bonsai_ops.weights import qwen3
from bonsai_ops.weights.depth import PUBLISHED, require_depth
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.flux2 import Geometry
from bonsai_ops.weights.formats import Pack, native
from bonsai_ops.weights.formats.gguf_file import GgufFile
from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

DEPTH = Geometry(hidden=128, context=64, in_channels=32, double_blocks=2, single_blocks=2)
SHALLOWER = {"double": {"double_blocks": 1}, "single": {"single_blocks": 1}, "no single": {"single_blocks": 0}}
CONFIG = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1, "attention_head_dim": 128}


def config(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.mark.parametrize("missing", SHALLOWER)
@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("transformer-packed-mflux/diffusion_pytorch_model.safetensors", "transformer"),
        ("transformer-packed-mflux/diffusion_pytorch_model.safetensors", "transformer-packed-mflux"),
        ("transformer-gemlite-int2/state_dict.pt", "transformer"),
        ("transformer-gemlite-int2/state_dict.pt", "transformer-gemlite-int2"),
        ("model.safetensors", "."),
    ],
)
def test_a_config_beside_it(tmp_path: Path, file: str, place: str, missing: str) -> None:
    """diffusers' config.json, in the file's folder or where the release has its transformer."""
    write = write_gemlite if file.endswith(".pt") else write_mlx
    write(tmp_path / file, "ternary", dataclasses.replace(DEPTH, **SHALLOWER[missing]))
    config(tmp_path / place)
    with pytest.raises(PackError, match=r"it has \d double and \d single blocks") as refused:
        open_transformer(tmp_path / file)
    assert reason(refused.value, tmp_path / file)
    if missing != "no single":
        assert "config.json beside it says 2 and 2." in str(refused.value) and "take it away" in str(refused.value)
    write(tmp_path / file, "ternary", DEPTH)
    assert len(open_transformer(tmp_path / file).entries) > 20


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 2}, {"num_layers": "2"}, {"num_single_layers": None}, {"num_layers": True}],
    ids=json.dumps,
)
def test_a_config_that_tells_nothing(tmp_path: Path, changes: dict) -> None:
    """Of another width, or without plain numbers: the file is taken as it is."""
    write_mlx(tmp_path / "model.safetensors", "ternary", dataclasses.replace(DEPTH, single_blocks=1))
    config(tmp_path, **changes)
    open_transformer(tmp_path / "model.safetensors")


@pytest.mark.parametrize("sizes", PUBLISHED, ids=str)
def test_published_sizes(sizes: tuple[int, int]) -> None:
    """Without any config; one that tells another depth is believed."""
    hidden, context = sizes
    double, single = PUBLISHED[sizes]
    pack = Pack(Path("model.safetensors"), "mlx", {})
    whole = Geometry(hidden, context, 128, double, single)
    require_depth(pack, whole)
    for fewer in ({"double_blocks": double - 1}, {"single_blocks": single - 1}, {"single_blocks": 0}):
        with pytest.raises(PackError, match=r"model\.safetensors: .* Download the file again"):
            require_depth(pack, dataclasses.replace(whole, **fewer))
    require_depth(dataclasses.replace(pack, recorded=True), dataclasses.replace(whole, single_blocks=1))


def test_klein_is_among_them() -> None:
    assert PUBLISHED[KLEIN_4B.hidden, KLEIN_4B.context] == (KLEIN_4B.double_blocks, KLEIN_4B.single_blocks)


@pytest.mark.parametrize("record", [True, False])
def test_a_native_file(tmp_path: Path, record: bool) -> None:
    """Its record lists the layers; cut together with its record it is the shallower model that it says it is."""
    write_mlx(tmp_path / "mlx" / "m.safetensors", "ternary", TINY)
    weights = read_weights(open_transformer(tmp_path / "mlx" / "m.safetensors"))
    path = tmp_path / "native.safetensors"
    native.write(path, weights, native.make_record(weights))
    metadata = SafetensorsFile(path).metadata if record else None
    left = {n: t.clone() for n, t in load_file(path).items() if not n.startswith("single_blocks.1.")}
    save_file(left, path, metadata)
    if record:
        with pytest.raises(PackError, match=r"single_blocks\.1\.linear1\.weight: is missing\. The file's record"):
            open_transformer(path)
    else:
        config(tmp_path, num_layers=1, num_attention_heads=2)
        with pytest.raises(PackError, match=r"it has 1 double and 1 single blocks, but config\.json beside it says 1"):
            open_transformer(path)
    fewer = {n: w for n, w in weights.items() if not n.startswith("single_blocks.1.")}
    native.write(path, fewer, native.make_record(fewer), overwrite=True)
    assert open_transformer(path).recorded


def gguf(path: Path, pairs: dict[str, int]) -> Path:
    """A GGUF file with this metadata and no tensors."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    for key, number in pairs.items():
        data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, number)
    path.write_bytes(data + bytes(64))
    return path


@pytest.mark.parametrize(
    ("pairs", "fits"),
    [
        ({"flux2.block_count": 2}, True),
        ({"flux2.block_count": 4}, True),
        ({"flux2.block_count": 5}, False),
        ({"flux2.num_layers": 2, "flux2.num_single_layers": 2}, True),
        ({"flux2.num_layers": 2, "flux2.num_single_layers": 3}, False),
        ({"general.file_type": 9}, True),
    ],
)
def test_metadata_of_gguf(tmp_path: Path, pairs: dict[str, int], fits: bool) -> None:
    file = GgufFile(gguf(tmp_path / "m.gguf", pairs))
    assert file.counts == {key.split(".")[1]: number for key, number in pairs.items()}
    pack = Pack(file.path, "gguf", {}, counts=file.counts)
    if fits:
        require_depth(pack, DEPTH)
    else:
        with pytest.raises(PackError, match=r"m\.gguf: has not all blocks: .* its metadata says \d"):
            require_depth(pack, DEPTH)


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def text_encoder(folder: Path, layers: int, told: int | None = None, norm: bool = True) -> Path:
    """A dense text encoder; told: what its config.json says."""
    shapes = qwen3.expected_shapes(TEXT | {"num_hidden_layers": layers})
    shapes |= {qwen3.NORM: (64,)} if norm else {}
    save_file({name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}, folder / "model.safetensors")
    if told is not None:
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": told}))
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("layers", "told", "norm", "counts", "fault"),
    [
        (30, 30, True, (30, 30), None),
        (30, None, True, (30, 30), None),
        (30, 36, True, (30, 36), "holds 30 of 36 layers, enough"),
        (30, 36, False, (30, 36), "holds 30 of 36 layers and no final norm"),
        (27, None, False, (27, 0), "holds 27 layers and no final norm"),
    ],
)
def test_text_encoders(
    tmp_path: Path, layers: int, told: int | None, norm: bool, counts: tuple[int, int], fault: str | None
) -> None:
    """The first 27 layers are all that prompts need; what generates text gets every layer or a sentence."""
    path = text_encoder(tmp_path, layers, told, norm)
    pack, sizes = open_text_encoder(path)
    assert sizes["num_hidden_layers"] == 27 and (pack.counts["layers"], pack.counts["layers in all"]) == counts
    if fault is None:
        pack, sizes = open_text_encoder(path, whole=True)
        assert sizes["num_hidden_layers"] == layers and sizes["final_norm"] and qwen3.NORM in pack.entries
    else:
        with pytest.raises(PackError, match=rf"cannot generate text: it {fault}.*CLIPLoader"):
            open_text_encoder(path, whole=True)


def test_a_gap_in_a_text_encoder(tmp_path: Path) -> None:
    path = text_encoder(tmp_path, 30)
    left = {n: t.clone() for n, t in load_file(path).items() if ".layers.28." not in n}
    save_file(left, path)
    open_text_encoder(path)
    with pytest.raises(PackError, match="holds 28 of 30 layers"):
        open_text_encoder(path, whole=True)


def test_a_text_encoder_with_too_few_layers(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"model\.layers\.26\..* is missing\. Klein reads 27 layers"):
        open_text_encoder(text_encoder(tmp_path, 26, 36))
