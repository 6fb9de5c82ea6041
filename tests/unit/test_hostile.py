"""Files that somebody made to hang, to fill the memory or to write into logs: each is refused in one sentence, at once.

Sizes are claimed, not there: files of a few KB, or sparse ones. Tensors are never read.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import reason
from safetensors.torch import load_file, save_file

from bonsai_ops import convert
from bonsai_ops.tools.synthetic import TINY, write_gemlite, write_mlx
from bonsai_ops.weights import qwen3
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import file, native, native_record, open_pack, safetensors_file
from bonsai_ops.weights.json_file import MAX_BYTES
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

MLX_FILE = "diffusion_pytorch_model.safetensors"
LIMIT_SECONDS = 2
"""Of this process's own time, so that a busy machine changes nothing."""
GB = 1 << 30


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    write_mlx(folder / "mlx" / MLX_FILE, "ternary", TINY)
    write_gemlite(folder / "gemlite" / "state_dict.pt", "ternary", TINY)
    return folder


@pytest.fixture
def mlx(packs: Path, tmp_path: Path) -> Path:
    """A copy of a whole tiny pack of its own."""
    for source in (packs / "mlx").iterdir():
        os.link(source, tmp_path / source.name)
    return tmp_path / MLX_FILE


def refused(path: Path, *found: str, part: str = "transformer", named: Path | None = None) -> str:
    """The message of the PackError for a file: one line that names it and has these pieces, within LIMIT_SECONDS."""
    started = time.process_time()
    with pytest.raises(PackError) as caught:
        opened = open_transformer(path) if part == "transformer" else open_text_encoder(path)[0]
        read_weights(opened)
    assert time.process_time() - started < LIMIT_SECONDS
    message = reason(caught.value, named or path)
    assert message.endswith(".") and message.isprintable() and len(message) < 1400
    for piece in found:
        assert piece in message
    return message


def safetensors(path: Path, header: Any, data: int = 0) -> Path:
    """A file with this header and `data` bytes that take no room on disk."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + data)
    return path


def empty(names: Iterator[str] | list[str]) -> dict[str, Any]:
    return {name: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for name in names}


def test_a_header_without_end(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((90 << 20).to_bytes(8, "little"))
    os.truncate(path, GB)
    refused(path, "has a header of 94371840 bytes", "Expected at most 8388608")


def test_too_many_tensors(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "w.safetensors", empty([f"double_blocks.{i}.a" for i in range(20_001)]))
    refused(path, "has 20001 tensors", "at most 20000")


@pytest.mark.parametrize("prefix", ["double_blocks", "single_blocks", "transformer_blocks"])
def test_names_that_look_like_blocks(tmp_path: Path, prefix: str) -> None:
    """Each of them made 12 names of tensors that were looked for."""
    diffusers = prefix == "transformer_blocks"
    names = ("double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight")
    if diffusers:
        names = ("double_stream_modulation_img.linear.weight", "x_embedder.weight", "context_embedder.weight")
    header = empty([f"{prefix}.{i}.a" for i in range(600)])
    header |= {name: {"dtype": "BF16", "shape": [128, 1], "data_offsets": [0, 256]} for name in names}
    for i, name in enumerate(names):
        header[name]["data_offsets"] = [256 * i, 256 * (i + 1)]
    refused(safetensors(tmp_path / "w.safetensors", header, 768), f"{prefix}: has 600 blocks", "at most 512")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [10**4000], "data_offsets": [0, 10**4000]},
        {"dtype": "BF16", "shape": [1e300], "data_offsets": [0, 0]},
        {"dtype": "BF16", "shape": [-1], "data_offsets": [0, -2]},
        {"dtype": "BF16", "shape": "12", "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [[0], 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": "04"},
        {"dtype": "BF16", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]},
    ],
    ids=str,
)
def test_sizes_that_are_none(tmp_path: Path, entry: dict) -> None:
    refused(safetensors(tmp_path / "w.safetensors", {"a": entry}, 4), "header")


@pytest.mark.parametrize("metadata", [[1], {"a": 1}, {"a": {"b": "c"}}, "text"], ids=str)
def test_metadata_that_is_no_table_of_texts(tmp_path: Path, metadata: object) -> None:
    refused(safetensors(tmp_path / "w.safetensors", {"__metadata__": metadata} | empty(["a"])), "header")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(path: Path, tensors: int, pairs: int, rest: bytes, size: int = 0) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest)
    os.truncate(path, max(size, path.stat().st_size))
    return path


def array(kind: int, count: int) -> bytes:
    return string("a.b") + struct.pack("<IIQ", 9, kind, count)


@pytest.mark.parametrize(
    ("tensors", "pairs", "rest", "found"),
    [
        (1 << 40, 0, b"", "tensors"),
        (0, 1 << 40, b"", "entries of metadata"),
        (0, 1, array(8, 1 << 40), "values in its header"),
        (0, 1, array(8, 1 << 30), "values in its header"),
        (0, 1, array(9, 1 << 40) + struct.pack("<IQ", 4, 0) * 9, "values in its header"),
        (0, 1, array(4, 1 << 62), "header"),
        (0, 1, array(4, 1 << 27), "header of more than"),
        (0, 1, string("a") + struct.pack("<IQ", 8, 1 << 29), "header of more than"),
        (0, 1, string("general.alignment") + struct.pack("<IQ", 10, 1 << 60), "has alignment"),
        (2, 0, (string("a") + struct.pack("<IQIQ", 1, 0, 0, 0)) * 2, "twice"),
    ],
)
def test_counts_of_gguf(tmp_path: Path, tensors: int, pairs: int, rest: bytes, found: str) -> None:
    refused(gguf(tmp_path / "w.gguf", tensors, pairs, rest, GB), found)


def test_a_vocabulary_in_gguf(tmp_path: Path) -> None:
    """The arrays of Qwen3's tokenizer: they are passed over, and what follows them is read."""
    texts = b"".join(string(f"token{i}") for i in range(151_936))
    short = b"".join(string("ab") for _ in range(151_387))
    pairs = array(8, 151_936) + texts + array(8, 151_387) + short + array(5, 151_936) + bytes(4 * 151_936)
    tensor = string("a.weight") + struct.pack("<I2QIQ", 2, 2, 2, 0, 0)
    path = gguf(tmp_path / "w.gguf", 1, 3, pairs + tensor)
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + 32)
    started = time.process_time()
    assert torch.equal(open_pack(path).entries["a.weight"].weight(), torch.zeros(2, 2))
    assert time.process_time() - started < LIMIT_SECONDS


BESIDE = ["config.json", "quantization_config.json", "manifest.json", "x.index.json", f"{MLX_FILE}.json"]


@pytest.mark.parametrize("name", BESIDE)
def test_a_json_without_end(mlx: Path, name: str) -> None:
    config = mlx.parent / name
    config.unlink(missing_ok=True)
    config.write_text("{")
    os.truncate(config, GB)
    refused(mlx, "has 1073741824 bytes", "at most 1048576", "take it away", named=config)


DEEP = ["[" * 200 + "]" * 200, '{"a":' * 900 + "1" + "}" * 900, "[" * 100_000]
INFINITE = ['{"bits": NaN}', '{"bits": Infinity}', '{"bits": -Infinity}', '{"group_size": 1e999}']


@pytest.mark.parametrize("text", DEEP + INFINITE, ids=lambda text: text[:12])
def test_a_deep_or_infinite_json(mlx: Path, text: str) -> None:
    config = mlx.parent / "quantization_config.json"
    config.unlink()
    config.write_text(text)
    refused(mlx, "is not JSON", "Download it again", named=config)


@pytest.mark.parametrize("text", [*DEEP, '{"version": Infinity}', '{"version": 1e999}', '{"version": NaN}', "[1]", "7"])
def test_a_deep_or_infinite_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "n.safetensors"
    save_file({"a.weight": torch.zeros(16, 64, dtype=torch.uint8)}, path, {"bonsai": f'{text} "layers"'[: len(text)]})
    save_file({"a.weight_scale": torch.zeros(16, 2), "a.weight": torch.zeros(2, 64, dtype=torch.uint8)}, path)
    tensors = load_file(path) | {"bonsai.record": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    save_file(tensors, path)
    refused(path, "bonsai.record: has a damaged record", "Download the file again")


def test_a_record_without_end(tmp_path: Path) -> None:
    size = 1 << 26
    header = {"bonsai.record": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    refused(safetensors(tmp_path / "n.safetensors", header, size), "bonsai.record: is torch.uint8 [67108864]")


@pytest.mark.parametrize("form", ["json", "record", "metadata", "pairs", "leaves"])
def test_words_without_end(mlx: Path, form: str) -> None:
    """Each is looked through for the marks of a rotation."""
    words = json.dumps(["sign"] * 100_000)
    path = mlx
    if form == "json":
        path = mlx.parent / "config.json"
        path.write_text(words)
    elif form == "leaves":
        path = mlx.parent / "state_dict.pt"
        torch.save({f"sign{i}": i for i in range(100_000)}, path)
    elif form == "pairs":
        path = gguf(mlx.parent / "w.gguf", 0, 100_000, b"".join(string(f"a{i}") + bytes(5) for i in range(100_000)))
    else:
        count = 100_000 if form == "record" else 6
        said = {f"a{i}": "b" if form == "record" else words for i in range(count)}
        mlx.unlink()
        safetensors(mlx, {"__metadata__": said} | empty(["a"]))
    refused(path if form in ("leaves", "pairs") else mlx, named=path)


def test_names_of_modules_without_end(tmp_path: Path, packs: Path) -> None:
    """Each was looked for in each layer."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(torch.load(packs / "gemlite" / "state_dict.pt", weights_only=True), folder / MLX_FILE)
    settings = {"quant_method": "gemlite", "modules_to_not_convert": [f"m{i}" for i in range(20_000)]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    refused(folder / MLX_FILE, "modules_to_not_convert: has 20000 names", named=folder / "config.json")


# Pickles.


def archive(path: Path, pickled: bytes, storages: Mapping[str, bytes] = {}, name: str = "a", method: int = 0) -> Path:
    """A zip archive as torch writes it around a pickle."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"{name}/data.pkl", pickled, method)
        out.writestr(f"{name}/byteorder", "little")
        for key, data in storages.items():
            out.writestr(f"{name}/data/{key}", data)
        out.writestr(f"{name}/version", "3\n")
    return path


def plain(value: object, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def doubling(levels: int) -> bytes:
    """A table whose two entries are one table whose two entries .."""
    table: dict = {}
    for _ in range(levels):
        table = {"a": table, "b": table}
    return plain(table)


def nested_key(levels: int) -> bytes:
    key: tuple = ()
    for _ in range(levels):
        key = (key, key)
    return b"\x80\x02}" + plain(key)[2:-1] + b"K\x01s."


def tensor(numel: int, size: str, stride: str = "\x01", key: str = "0", name: str = "_rebuild_tensor_v2") -> bytes:
    """{"a.weight": a float tensor}; size and stride: one byte a dimension."""
    dims = [b"(" + b"".join(b"K" + c.encode("latin1") for c in text) + b"t" for text in (size, stride)]
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key.encode() + b"X\x03\0\0\0cpuJ"
    storage += struct.pack("<i", numel) + b"tQ"
    call = f"ctorch._utils\n{name}\n".encode() + b"(" + storage + b"K\0" + dims[0] + dims[1]
    return b"\x80\x02}X\x08\0\0\0a.weight" + call + b"\x89ccollections\nOrderedDict\n)RtRs."


PICKLES: dict[str, bytes] = {
    "bytearray": pickle.dumps({"a": bytearray(100)}, 5),
    "bytearray of 2 GB": b"\x80\x05}X\x01\0\0\0acbuiltins\nbytearray\nJ\0\0\0\x7f\x85Rs.",
    "codec": b"\x80\x02}X\x01\0\0\0ac_codecs\nencode\nX\x01\0\0\0bX\x04\0\0\0punyc\x86Rs.",
    "marks": b"\x80\x02" + b"(" * 3_000_000 + b".",
    "memory": b"\x80\x02}" + b"r\xff\xff\xff\x7f" * 600_000 + b"0" * 600_000 + b".",
    "key": nested_key(40),
    "frozen set": b"\x80\x04}(K\x01\x91K\x01s.",
    "doubling tables": doubling(30),
    "a table in itself": b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
    "a list in itself": b"\x80\x02}X\x01\0\0\0a]q\1h\1as.",
    "doubling tuples": b"\x80\x02}X\x01\0\0\0a)" + b"q\0h\0\x86" * 40 + b"s.",
    "deep tables": b"\x80\x02" + b"}X\x01\0\0\0a" * 40 + b"N" + b"s" * 40 + b".",
    "deep tuples": b"\x80\x02}X\x01\0\0\0aN" + b"\x85" * 900_000 + b"s.",
    "called with much": b"\x80\x02}X\x01\0\0\0actorch\nSize\n(X\x01\0\0\0bttRs.",
    "an update of a tensor": b"\x80\x02}X\x01\0\0\0actorch\nSize\n)}bs.",
    "a long number": b"\x80\x02}X\x01\0\0\0a\x8a\xff" + b"\x7f" * 255 + b"s.",
    "a long text": plain({"a": "b" * 100_000}),
    "no end": plain({"a": 1})[:-1],
    "nothing": b"\x80\x02.",
    "storage that is larger": tensor(1 << 30, "\x02"),
    "storage of another key": tensor(8, "\x02", key="9"),
    "sparse": tensor(8, "\x02", name="_rebuild_sparse_tensor"),
    "no storage": tensor(8, "\x02", name="_rebuild_meta_tensor_no_storage"),
    "strides of nothing": tensor(8, "\x7f\x7f\x7f", "\0\0\0"),
    "rows in one another": tensor(8, "\x04\x04", "\x01\x01"),
    "gaps": tensor(8, "\x04", "\x02"),
}


@pytest.mark.parametrize("name", ["state_dict.pt", "qmodel.pt"])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path: Path, kind: str, name: str) -> None:
    """Nothing of these reaches torch's unpickler, which allows most of them, but for strides."""
    path = archive(tmp_path / name, PICKLES[kind], {"0": bytes(32)})
    refused(path, part="text_encoder" if name == "qmodel.pt" else "transformer")


def test_the_pickles_above_are_of_that_form(tmp_path: Path) -> None:
    """So that they are refused for what is wrong with them."""
    path = archive(tmp_path / "state_dict.pt", tensor(8, "\x02\x04", "\x04\x01"), {"0": bytes(32)})
    assert torch.equal(open_pack(path).entries["a.weight"].weight(), torch.zeros(2, 4))
    path = archive(tmp_path / "state_dict.pt", tensor(8, "\x04\x02", "\x01\x04"), {"0": bytes(32)})
    assert open_pack(path).entries["a.weight"].shape == (4, 2)  # transposed, as gemlite keeps codes


def test_a_pickle_that_is_large(tmp_path: Path) -> None:
    raw = b"\x80\x02}" + b"N0" * (9 << 20) + b"."
    refused(archive(tmp_path / "state_dict.pt", raw), "a/data.pkl: has 18874372 bytes", "at most 16777216")


@pytest.mark.parametrize("twice", ["a/data.pkl", "a/DATA.pkl", "a/version", "b/data.pkl", "b/c", "a/constants.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_torch_does_not_write(tmp_path: Path, twice: str) -> None:
    path = archive(tmp_path / "state_dict.pt", tensor(8, "\x08"), {"0": bytes(32)})
    with zipfile.ZipFile(path, "a") as out:
        out.writestr(twice, plain({}))
    refused(path, twice)


@pytest.mark.parametrize("what", ["size", "offset", "index", "members", "empty", "comment", "prefix"])
def test_an_archive_that_claims_too_much(tmp_path: Path, what: str) -> None:
    path = archive(tmp_path / "state_dict.pt", tensor(8, "\x08"), {"0": bytes(32)})
    raw = bytearray(path.read_bytes())
    end, first = raw.rindex(b"PK\5\6"), raw.index(b"PK\1\2")
    if what == "size":
        raw[first + 20 : first + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    elif what == "offset":
        raw[first + 42 : first + 46] = struct.pack("<I", 1 << 31)
    elif what == "index":
        raw = bytearray(b"PK\3\4") + bytes(GB // 32) + raw[end:]
        raw[-10:-2] = struct.pack("<II", GB // 32, 4)
    elif what == "members":
        raw = raw[:first] + raw[first:end] * 6000 + raw[end:]
        raw[-10:-6] = struct.pack("<I", 6000 * (end - first))
    elif what == "empty":
        raw = raw[:first] + raw[end:]
        raw[-14:-2] = struct.pack("<HHII", 0, 0, 0, first)
    elif what == "comment":
        raw[-2:] = struct.pack("<H", 3) + b"abc"
    else:
        raw = bytearray(b"#!/bin/sh\n") + raw
    path.write_bytes(raw)
    refused(path, "download it again.")


def hqq_layer(**changed: object) -> dict[str, Any]:
    """A module as HQQ serializes it, its metadata as tensors or as plain values, its codes a Parameter."""
    codes = torch.nn.Parameter(torch.zeros(16, 64, dtype=torch.uint8), requires_grad=False)
    layer: dict[str, Any] = {"W_q": codes, "scale": torch.ones(32, 1), "zero": torch.zeros(32, 1)}
    layer |= {"nbits": 4, "group_size": 64, "axis": 1, "shape": torch.Size((32, 64)), "packing": "4bit_u8"}
    layer |= {"compute_dtype": torch.float16, "unpack_view_dtype": torch.uint8, "view_as_float": False}
    layer |= {"quant_scale": False, "quant_zero": False, "optimize": True, "round_zero": None, "offload_meta": False}
    return layer | changed


def spelled(value: object) -> object:
    """A plain value as HQQ's encoder writes it."""
    if isinstance(value, torch.Size):
        return torch.tensor(value)
    if isinstance(value, torch.dtype):
        value = str(value)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return torch.tensor([ord(c) for c in value], dtype=torch.uint8) if isinstance(value, str) else value


@pytest.mark.parametrize("encoded", [False, True])
def test_what_hqq_writes_is_read(tmp_path: Path, encoded: bool) -> None:
    layer = {key: spelled(value) if encoded else value for key, value in hqq_layer().items()}
    torch.save({"model.a": layer, "model.norm": {"weight": torch.ones(4)}}, tmp_path / "qmodel.pt")
    pack = open_pack(tmp_path / "qmodel.pt", "text_encoder")
    weight = pack.entries["model.a.weight"].weight()
    assert isinstance(weight, PackedWeight) and weight.shape == (32, 64) and weight.group_size == 64
    assert torch.equal(weight.dequantize(torch.float32), torch.zeros(32, 64))


def test_what_a_module_saves_is_read(tmp_path: Path) -> None:
    """An OrderedDict with the versions of its modules as an attribute, and one tensor under two names."""
    module = torch.nn.Sequential(collections.OrderedDict(a=torch.nn.Linear(4, 4), b=torch.nn.Linear(4, 4)))
    module.b.weight = module.a.weight
    torch.save(module.state_dict(), tmp_path / "state_dict.pt")
    assert torch.equal(open_pack(tmp_path / "state_dict.pt").entries["b.weight"].weight(), module.a.weight)


@pytest.mark.parametrize(
    "changed",
    [
        {"group_size": 16},
        {"group_size": "64"},
        {"group_size": 64.0},
        {"group_size": None},
        {"group_size": (64, 64)},
        {"group_size": 0},
        {"group_size": -64},
        {"group_size": torch.zeros(1000, dtype=torch.int32)},
        {"nbits": torch.zeros(2, 2)},
        {"nbits": "4"},
        {"axis": None},
        {"packing": 4},
        {"packing": torch.zeros(1 << 16, dtype=torch.uint8)},
        {"shape": 32},
        {"shape": (32,)},
        {"shape": (32, 64, 1)},
        {"shape": ("32", "64")},
        {"shape": (-32, -64)},
        {"shape": None},
        {"W_q": torch.zeros(16, 64)},
        {"W_q": "text"},
        {"W_q": torch.zeros(64, 16, dtype=torch.uint8).t()},
        {"scale": torch.ones(32, 1, dtype=torch.float64)},
        {"scale": torch.ones(32, 1, dtype=torch.int32)},
        {"scale": 1.0},
        {"zero": None},
        {"zero": torch.ones(31, 1)},
        {"view_as_float": torch.ones(2)},
        {"quant_scale": {}},
        {"quant_scale": [[1]]},
    ],
    ids=str,
)
def test_every_leaf_of_hqq(tmp_path: Path, changed: dict) -> None:
    torch.save({"model.a": hqq_layer(**changed)}, tmp_path / "qmodel.pt")
    refused(tmp_path / "qmodel.pt", "model.a", part="text_encoder")


def test_metadata_of_hqq_that_is_a_view(tmp_path: Path) -> None:
    """2^28 values of four bytes, which were made a list."""
    torch.save({"model.a": hqq_layer(shape=torch.zeros(1, dtype=torch.int32).expand(1 << 28))}, tmp_path / "qmodel.pt")
    refused(tmp_path / "qmodel.pt", "model.a.shape: is a view of shape [268435456]", part="text_encoder")


def test_tensors_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    tensors = {f"a{i}.weight": torch.zeros(1, 1, dtype=torch.bfloat16).expand(16384, 16384) for i in range(40)}
    torch.save(tensors, tmp_path / "state_dict.pt")
    refused(tmp_path / "state_dict.pt", "is a view of shape [16384, 16384] and strides [0, 0]")


@pytest.mark.parametrize("leaf", ["metadata", "orig_shape"])
def test_long_metadata_of_gemlite(packs: Path, tmp_path: Path, leaf: str) -> None:
    tensors = torch.load(packs / "gemlite" / "state_dict.pt", weights_only=True)
    key = f"transformer_blocks.0.attn.to_k.{leaf}"
    tensors[key] = torch.zeros(1 << 18, dtype=torch.int32)
    torch.save(tensors, tmp_path / "state_dict.pt")
    refused(tmp_path / "state_dict.pt", f"{key}: has 262144 values")


# What goes on to ComfyUI.


def patched_model(path: Path, model: object) -> Path:
    """A native file of another architecture with one packed layer."""
    weights = {"blocks.0.a.weight": packed_weight(), "norm.weight": torch.ones(64)}
    save_file(native.to_tensors(weights), path, {"bonsai": native.make_record(weights, {}, "SDXL").to_json()})
    tensors = load_file(path)
    record = json.loads(native.make_record(weights, {}, "SDXL").to_json()) | {"model": model}
    save_file(tensors, path, {"bonsai": json.dumps(record)})
    return path


def packed_weight() -> PackedWeight:
    return PackedWeight(torch.zeros(16, 64, dtype=torch.uint8), torch.ones(64, 2), (64, 64), "ternary", "crumb", 32)


CONFIGURATIONS: dict[str, Any] = {
    "depth": {"unet_config": {"depth": 10**9}},
    "depth of a list": {"unet_config": {"transformer_depth": [500, 500]}},
    "depth of a tuple": {"unet_config": {"transformer_depth": {"tuple": [1, 10**9]}}},
    "layers": {"unet_config": {"num_layers": 4000}},
    "depth as a float": {"unet_config": {"depth": 1e9}},
    "positions": {"unet_config": {"llama_layers": [10**9]}},
    "negative": {"unet_config": {"depth_single_blocks": -(10**9)}},
    "channels": {"unet_config": {"channel_mult": [1] * 100_000}},
    "lists": {"unet_config": {"a": [[1]] * 100_000}},
    "width": {"unet_config": {"hidden_size": 10**7}},
    "timesteps": {"sampling_settings": {"timesteps": 3 * 10**8}},
    "timesteps as a float": {"sampling_settings": {"timesteps": 3e8}},
    "text": {"unet_config": {"a": "b" * 100_000}},
    "class": {"class": ["SDXL"]},
    "type": {"model_type": {"a": 1}},
    "no table": {"unet_config": [1]},
    "settings": {"sampling_settings": 3},
    "a text": "SDXL",
    "a number": 7,
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_configuration_that_asks_for_too_much(tmp_path: Path, kind: str) -> None:
    model = CONFIGURATIONS[kind]
    if isinstance(model, dict):
        model = {"class": "SDXL", "model_type": "EPS", "unet_config": {}, "sampling_settings": {}} | model
    refused(patched_model(tmp_path / "n.safetensors", model), "bonsai: has a damaged record", "ownload")


def test_so_many_blocks_a_level() -> None:
    """Each number is one that the file has tensors for; ComfyUI makes 3,600 blocks of them."""
    with pytest.raises(ValueError, match="more than the file has tensors for"):
        native_record.require_modest(
            [((1,), None)] * 9000, {"unet_config": {"channel_mult": [1] * 60, "num_res_blocks": 60}}
        )


def test_a_configuration_as_it_is(tmp_path: Path) -> None:
    unet = {
        "context_dim": 2048,
        "max_position": 32768,
        "channel_mult": [1, 2],
        "theta": 1_000_000,
        "depth": 2,
        "eps": 1e-6,
        "a": None,
    }
    settings = {"timesteps": 1000, "shift": 3.0, "sigma_max": 500}
    model = {"class": "SDXL", "model_type": "EPS", "unet_config": unet, "sampling_settings": settings}
    tensors = {f"x.{i}": torch.zeros(2) for i in range(32)}
    path = patched_model(tmp_path / "n.safetensors", model)
    record = json.loads(open_metadata(path)["bonsai"])
    save_file(load_file(path) | tensors, path, {"bonsai": json.dumps(record)})
    assert open_transformer(path).configuration == model


def open_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def whole_vae(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> Path:
    from bonsai_ops.tools.synthetic import write_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    write_pipeline(folder)
    return folder


def refused_vae(folder: Path, *found: str) -> None:
    from bonsai_ops.host.vae import load_vae

    started = time.process_time()
    with pytest.raises(PackError) as caught:
        load_vae(folder)
    assert time.process_time() - started < LIMIT_SECONDS
    assert all(piece in str(caught.value) for piece in found) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": 3},
        {"block_out_channels": [32] * 10_000},
        {"block_out_channels": [32, 32, 64, 64 * 10**6]},
        {"latent_channels": 10**9},
        {"latent_channels": 10**4000},
    ],
    ids=lambda config: str(config)[:40],
)
def test_a_vae_config_that_asks_for_too_much(whole_vae: Path, tmp_path: Path, config: dict) -> None:
    (tmp_path / "vae").mkdir()
    os.link(whole_vae / "vae" / MLX_FILE, tmp_path / "vae" / MLX_FILE)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    refused_vae(tmp_path, "has tensors that do not fit the sizes in vae/config.json", "again")


@pytest.mark.parametrize(
    "shapes",
    [
        {"encoder.down_blocks.3.resnets.0.conv1.weight": [1 << 20, 1, 1, 1]},
        {"encoder.down_blocks.3.resnets.0.conv1.weight": [1 << 20]},
        {"encoder.down_blocks.900.resnets.0.conv1.weight": [1 << 20, 3, 3, 3]},
        {"decoder.conv_in.weight": [1, 1 << 20, 3, 3]},
    ],
    ids=str,
)
def test_a_vae_whose_single_tensors_claim_much(whole_vae: Path, tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    (tmp_path / "vae").mkdir()
    tensors = load_file(whole_vae / "vae" / MLX_FILE)
    save_file(tensors | {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "vae" / MLX_FILE)
    refused_vae(tmp_path, "vae", "again")


# What is no file.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
@pytest.mark.parametrize("name", ["w.safetensors", "state_dict.pt", "w.gguf", "qmodel.pt"])
def test_a_pipe(tmp_path: Path, name: str) -> None:
    """Opening one waits for ever."""
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is no file but a pipe")
    with pytest.raises(PackError, match="is no file but a pipe"):
        open_text_encoder(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path / name, "is no file but a device")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
@pytest.mark.parametrize("name", BESIDE)
def test_a_pipe_beside_a_file(mlx: Path, name: str) -> None:
    (mlx.parent / name).unlink(missing_ok=True)
    os.mkfifo(mlx.parent / name)
    started = time.process_time()
    open_transformer(mlx)
    assert time.process_time() - started < LIMIT_SECONDS


@pytest.mark.parametrize("name", ["w.safetensors", "state_dict.pt", "w.gguf"])
def test_a_folder_called_like_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    refused(tmp_path / name, "holds no transformer")
    with pytest.raises(PackError, match="is a folder"):
        open_pack(tmp_path / name)
    with pytest.raises(PackError, match="does not exist"):
        open_pack(tmp_path / "gone" / name)
    refused(tmp_path / ("a" * 300 + name), "cannot be read (File name too long)")


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Inside, files are opened as a user who is not root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system has no such rights")
@pytest.mark.parametrize("name", ["w.safetensors", "state_dict.pt", "w.gguf", "quantization_config.json"])
def test_a_file_that_may_not_be_read(mlx: Path, name: str) -> None:
    """It was to be downloaded again."""
    path = mlx.parent / name
    path.unlink(missing_ok=True)
    path.write_text("{}")
    mlx.chmod(0o644)
    path.chmod(0)
    opened = {folder: folder.stat().st_mode for folder in path.parents if folder.owner() == mlx.parent.owner()}
    opened = {folder: mode for folder, mode in opened.items() if "pytest" in str(folder)}
    for folder, mode in opened.items():
        folder.chmod(mode | 0o755)
    try:
        with another_user(), pytest.raises(PackError) as caught:
            open_transformer(mlx if name.endswith(".json") else path)
    finally:
        for folder, mode in opened.items():
            folder.chmod(mode)
    message = reason(caught.value, path)
    assert message.startswith("cannot be read (Permission denied). Allow") and "ownload" not in message


# Messages.

NASTY = ["a\nERROR: all is lost", "\x1b[2Ja", "a\u202eb", "a" * 100_000, "\r\x08" * 400, "\u2028", "\x1b" * 100_000]


@pytest.mark.parametrize("name", NASTY, ids=lambda name: ascii(name[:8]))
def test_names_in_messages(mlx: Path, packs: Path, name: str) -> None:
    """Names of tensors, dtypes, texts of records and of JSON: one printable line that still says what is wrong."""
    path = mlx.parent / "x" / "w.safetensors"
    path.parent.mkdir()
    tensors = load_file(mlx)
    save_file(tensors | {f"{name}.weight": torch.ones(2)}, path)
    refused(path, "does not belong to a FLUX.2 transformer", "as it was published")
    save_file({name: torch.ones(2)}, path)
    refused(path, "is not a FLUX.2 transformer", "double_stream_modulation_img.lin.weight")
    safetensors(path, {"a": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}})
    refused(path, "has dtype", "Expected one of F64")
    refused(patched_model(path, {"class": "SDXL", "unet_config": {name: 10**12}}), "has a damaged record")
    save_file({"a.weight": torch.ones(2)}, path, {"prism.hadamard": name})
    refused(path, "rotated")
    torch.save({name[:4000]: 1}, path.with_suffix(".pt"))
    refused(path.with_suffix(".pt"), "is a int", "Expected")
    gguf(path.with_suffix(".gguf"), 1, 0, string(name) + struct.pack("<I", 9), 100)
    refused(path.with_suffix(".gguf"), "has 9 dimensions")


def test_a_path_is_escaped_and_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("a\nb\x1b" + "c" * 200)
    error, name = PackError(folder, "is bad", "Mend it.", "k"), r"a\nb\x1b" + "c" * 200
    assert str(error).isprintable() and str(error) == f"{name}: k: is bad. Mend it. ({tmp_path / name})"
    assert error.path == folder and error.key == "k"


# Errors of other classes.


def test_groups_of_16(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    save_file({"a.weight": torch.zeros(16, 64, dtype=torch.uint8), "a.weight_scale": torch.ones(64, 4)}, path)
    refused(path, "a.weight_scale: has groups of 16 columns", "multiple of 32")
    tables = {"a.scales": torch.ones(8, 4), "a.biases": torch.ones(8, 4)}
    save_file({"a.weight": torch.zeros(8, 4).to(torch.uint32)} | tables, path)
    (tmp_path / "config.json").write_text('{"group_size": 16}')
    refused(path, "a.weight: has groups of 16 columns", "multiple of 32")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (8,)),
        ("model.embed_tokens.weight", (8, 128, 1)),
        ("model.embed_tokens.weight", ()),
        ("model.layers.0.self_attn.q_proj.weight", ()),
        ("model.layers.0.self_attn.k_proj.weight", (128,)),
        ("model.layers.0.self_attn.q_norm.weight", ()),
        ("model.layers.0.mlp.gate_proj.weight", ()),
        ("model.layers.0.mlp.gate_proj.weight", (1, 1, 1)),
    ],
)
def test_a_text_encoder_of_other_ranks(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 128, "num_hidden_layers": 27, "intermediate_size": 8}
    shapes = qwen3.expected_shapes(sizes | {"num_attention_heads": 1, "num_key_value_heads": 1}) | {name: shape}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", f"{name}: has shape {list(shape)}", "dimensions", part="text_encoder")


def hostile_files(folder: Path) -> Iterator[Path]:
    """One of each kind."""
    yield safetensors(folder / "many.safetensors", empty([f"a{i}" for i in range(20_001)]))
    yield safetensors(folder / "deep.safetensors", b"[" * 100_000)
    yield archive(folder / "key.pt", PICKLES["key"])
    yield archive(folder / "sparse.pt", PICKLES["sparse"], {"0": bytes(32)})
    yield gguf(folder / "many.gguf", 1 << 40, 0, b"")
    yield patched_model(folder / "depth.safetensors", CONFIGURATIONS["depth"])
    yield folder / "gone.safetensors"
    (folder / "folder.safetensors").mkdir()
    yield folder / "folder.safetensors"
    save_file({"\x1b[2J\n": torch.ones(2)}, folder / "name.safetensors")
    yield folder / "name.safetensors"


def test_convert_says_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in hostile_files(tmp_path):
        assert convert.main([str(path), str(tmp_path / "out.safetensors")]) == 1
        said = capsys.readouterr()
        assert said.err.strip().isprintable() and reason(said.err.strip(), path), said.err
        assert not said.out and not (tmp_path / "out.safetensors").exists()


def test_convert_without_memory(mlx: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No damage: nothing is to be downloaded again."""

    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(convert, "_convert", full)
    assert convert.main([str(mlx), str(mlx.parent / "out.safetensors")]) == 1
    assert "memory ran out" in capsys.readouterr().err


def test_a_file_that_went_away_after_it_was_opened(mlx: Path) -> None:
    pack = open_transformer(mlx)
    mlx.unlink()
    assert pack.release == "unknown file" and read_weights(pack)


def test_what_is_published_is_within_the_limits() -> None:
    """The longest header, the most tensors and the longest JSON of all releases, with room to spare."""
    assert safetensors_file.MAX_HEADER > 10 * 102_329 and file.MAX_TENSORS > 10 * 904 and MAX_BYTES > 2 * 470_215
