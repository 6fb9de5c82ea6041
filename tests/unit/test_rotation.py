"""Weights in a rotated basis look like any others: every mark of them, in every container, refuses the file."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import reason
from safetensors.torch import load_file, save_file

from bonsai_ops.tools.synthetic import TINY_TEXT, write_gemlite, write_mlx, write_text_encoder
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.flux2 import Geometry
from bonsai_ops.weights.formats import native, open_pack
from bonsai_ops.weights.read import open_text_encoder, open_transformer, read_weights

Tensors = dict[str, Any]
SMALL = Geometry(hidden=256, context=256, in_channels=128, double_blocks=1, single_blocks=1)
SAYS = r"stored in a rotated \(Hadamard\) basis.*draw noise"


def safetensors(path: Path, tensors: Tensors, said: Mapping[str, str]) -> None:
    save_file(tensors, path, {"format": "pt", **said})


def torch_file(path: Path, tensors: Tensors, said: Mapping[str, Any]) -> None:
    torch.save({**tensors, **said}, path)


def gguf_value(value: Any) -> bytes:
    """u32 type and value: bool, whole number, text or an array of whole numbers or texts."""
    if isinstance(value, list):
        inner = [gguf_value(v) for v in value]
        return struct.pack("<IIQ", 9, 8 if isinstance(value[0], str) else 5, len(value)) + b"".join(
            v[4:] for v in inner
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    return struct.pack("<IQ", 8, len(value)) + value.encode()


def gguf(path: Path, tensors: Tensors, said: Mapping[str, Any]) -> None:
    """A GGUF file of fp32 tensors with this metadata."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(said))
    header += b"".join(text(key) + gguf_value(value) for key, value in said.items())
    data = b""
    for name, tensor in tensors.items():
        header += text(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        header += struct.pack("<IQ", 0, len(data))
        data += tensor.float().numpy().tobytes() + bytes(-(4 * tensor.numel()) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)


def mlx_layer() -> Tensors:
    return {
        "a.to_q.weight": torch.zeros(2, 8, dtype=torch.int32).view(torch.uint32),
        "a.to_q.scales": torch.ones(2, 1, dtype=torch.bfloat16),
        "a.to_q.biases": -torch.ones(2, 1, dtype=torch.bfloat16),
    }


def gemlite_layer() -> Tensors:
    return {
        "a.to_q.W_q": torch.zeros(32, 2, dtype=torch.uint8),
        "a.to_q.scales": torch.ones(1, 2),
        "a.to_q.zeros": -torch.ones(1, 2),
        "a.to_q.metadata": torch.tensor([0, 2, 128, 3, 4, 1, 1, 0, 0, 0, 4, 1], dtype=torch.int32),
        "a.to_q.orig_shape": torch.tensor([2, 128], dtype=torch.int32),
    }


def hqq_layer() -> Tensors:
    layer = {"W_q": torch.zeros(8, 128, dtype=torch.uint8), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1)}
    return {"a.to_q": layer | {"nbits": 4, "group_size": 128, "axis": 1, "shape": (16, 128), "packing": "4bit_u8"}}


def native_layer() -> Tensors:
    return {"a.to_q.weight": torch.zeros(16, 64, dtype=torch.uint8), "a.to_q.weight_scale": torch.ones(128, 1)}


def dense_layer() -> Tensors:
    return {"a.to_q.weight": torch.zeros(2, 128, dtype=torch.bfloat16)}


FORMS: dict[str, tuple[str, Callable[[], Tensors], Callable[[Path, Tensors, Mapping], None], str]] = {
    "mlx": ("w.safetensors", mlx_layer, safetensors, "transformer"),
    "mlx text": ("w.safetensors", mlx_layer, safetensors, "text_encoder"),
    "gemlite": ("state_dict.pt", gemlite_layer, torch_file, "transformer"),
    "gemlite in safetensors": ("w.safetensors", gemlite_layer, safetensors, "transformer"),
    "hqq": ("qmodel.pt", hqq_layer, torch_file, "text_encoder"),
    "native": ("w.safetensors", native_layer, safetensors, "transformer"),
    "native text": ("w.sft", native_layer, safetensors, "text_encoder"),
    "dense": ("w.safetensors", dense_layer, safetensors, "transformer"),
    "dense text": ("w.safetensors", dense_layer, safetensors, "text_encoder"),
    "gguf": ("w.gguf", dense_layer, gguf, "transformer"),
    "gguf text": ("w.gguf", dense_layer, gguf, "text_encoder"),
}
SIGNS = torch.ones(128, dtype=torch.float16)
WHOLE = ("mlx", "gemlite", "gguf")
"""A form of each container, in which every spelling is tried."""
every_form = pytest.mark.parametrize("form", FORMS)


def few_in_every_form(marks: Iterable[str]) -> list[tuple[str, str]]:
    """(form, mark) of every mark in the forms of WHOLE, of the first three in the others."""
    return [(form, mark) for form in FORMS for mark in list(marks)[: None if form in WHOLE else 3]]


def write(folder: Path, form: str, extra: Tensors | None = None, said: Mapping[str, Any] | None = None) -> Path:
    name, layer, writer, _ = FORMS[form]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = layer()
    if form == "hqq":
        for key, tensor in (extra or {}).items():
            module, _, leaf = key.rpartition(".")
            tensors.setdefault(module, {})[leaf] = tensor
    else:
        tensors |= extra or {}
    writer(folder / name, tensors, said or {})
    return folder / name


def refused(path: Path, form: str, mark: str) -> None:
    with pytest.raises(PackError, match=SAYS) as caught:
        open_pack(path, FORMS[form][3])
    message = reason(caught.value, path)
    assert message.startswith(mark) and "\n" not in message and len(message) < 600


@every_form
def test_the_unmarked_files_are_read(tmp_path: Path, form: str) -> None:
    """So that the refusals below come from the marks; a GGUF text encoder is refused for another reason."""
    path = write(tmp_path, form)
    if form == "gguf text":
        with pytest.raises(PackError, match="is a transformer"):
            open_pack(path, "text_encoder")
    else:
        assert len(open_pack(path, FORMS[form][3]).entries) == 1


NAMES = [
    "a.to_q.signs",
    "a.to_q.rotation",
    "prism_hadamard.128.values",
    "a.to_q.weight_signs",
    "a.to_q.signs_128",
    "a.to_q.sign",
    "a.to_q.signVector",
    "a.to_q.hadamard",
    "a.to_q.Hadamard_signs",
    "a.to_q.rotation_matrix",
    "a.to_q.SU",
    "a.to_q.rotate",
    "a.to_q.hadK",
    "rotation.R1",
    "signs.128",
    "prism.signs.128",
]


@pytest.mark.parametrize(("form", "name"), few_in_every_form(NAMES))
def test_a_tensor_of_a_rotation(tmp_path: Path, form: str, name: str) -> None:
    refused(write(tmp_path, form, {name: SIGNS}), form, name)


SAID: dict[str, Any] = {
    "prism.hadamard.block_size": 1024,
    "prism_hadamard_block": 1024,
    "prism_hadamard": '{"block": 1024}',
    "PrismHadamardBlock": 1024,
    "hadamard": True,
    "weights_rotated": True,
    "rotation": "blockwise",
    "quantization.signs": "input",
    "prism.sign_mode": "explicit",
    "sign_widths": "[3072]",
    "rotate": 1,
    "rotateWeights": True,
    "wht_block": 1024,
    "had_dim": 1024,
    "prism_hadamard_": "",
}


@pytest.mark.parametrize(("form", "key"), few_in_every_form(SAID))
def test_metadata_of_a_rotation(tmp_path: Path, form: str, key: str) -> None:
    """In safetensors texts, in GGUF typed values, in a pickle entries that are no tensors."""
    value = SAID[key]
    refused(write(tmp_path, form, said={key: str(value) if FORMS[form][2] is safetensors else value}), form, key)


@every_form
@pytest.mark.parametrize("key", ["model_type"])
def test_a_value_that_names_a_rotation(tmp_path: Path, form: str, key: str) -> None:
    refused(write(tmp_path, form, said={key: "prism_hadamard_flux2"}), form, f"{key} prism_hadamard_flux2")


@pytest.mark.parametrize("form", ["mlx", "dense", "native"])
def test_json_inside_metadata(tmp_path: Path, form: str) -> None:
    said = {"config": json.dumps({"quantization": {"bits": 2, "modules": [{"path": "a.to_q", "signs": "in"}]}})}
    refused(write(tmp_path, form, said=said), form, "config.quantization.modules.signs")


@pytest.mark.parametrize("values", [[1, -1], ["blk.0.attn_q.weight"]], ids=["numbers", "texts"])
def test_an_array_in_gguf(tmp_path: Path, values: list) -> None:
    refused(write(tmp_path, "gguf", said={"some.prism.hadamard.list": values}), "gguf", "some.prism.hadamard.list")


BESIDE = {
    "prism_hadamard_block": 1024,
    "prism.hadamard.block_size": 1024,
    "quantization": {"bits": 2, "group_size": 128, "hadamard": True},
    "quantization_config": {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
    "model_type": "prism_hadamard_flux2",
    "architectures": ["PrismHadamardFlux2"],
    "modules": [{"path": "a", "block": 1024, "signs": "a.signs"}],
    "rotation": {"enabled": True, "block": 1024},
    "quantizationRotation": "quarot",
    "leaves": ["weight", "scales", "biases", "signs"],
    "dense": ["*.norm.weight", "*.signs"],
    "transforms": ["rotation"],
    "basis": "wht-1024",
}


@every_form
def test_json_beside_the_file(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form)
    for name in ("quantization_config.json", "manifest.json", f"{path.stem}.json", "config.json"):
        config = path.with_name(name)
        for key, value in BESIDE.items():
            config.write_text(json.dumps({"bits": 2, "group_size": 128, key: value}))
            refused(path, form, key)
        if name != "config.json":
            config.unlink()
    with pytest.raises(PackError, match=rf" in {config.name} beside it: .* If {config.name} belongs to another"):
        open_pack(path, FORMS[form][3])


@pytest.mark.parametrize("name", ["mlx_config.json", "packing_manifest.json"])
def test_any_configuration_in_the_folder_of_a_release(tmp_path: Path, name: str) -> None:
    """There nothing is another model's; the words of a tokenizer are no configuration."""
    path = write(tmp_path / "text_encoder-mlx-4bit", "mlx text")
    (path.parent / "tokenizer.json").write_text('{"model": {"vocab": {"signs": 1, "hadamard": 2}}}')
    assert open_pack(path, "text_encoder").entries
    path.with_name(name).write_text('{"quantization": {"signs": "input"}}')
    refused(path, "mlx text", f"quantization.signs in {name}")


@pytest.mark.parametrize(
    ("form", "folder"),
    [
        ("mlx", "transformer-packed-mflux"),
        ("gemlite", "transformer-gemlite-int2"),
        ("hqq", "text_encoder-hqq-4bit"),
        ("mlx text", "text_encoder-mlx-4bit"),
        ("dense", "transformer"),
    ],
)
def test_the_manifest_of_the_release(tmp_path: Path, form: str, folder: str) -> None:
    """It stands above the folder of the part; above any other folder it is another model's."""
    (tmp_path / "manifest.json").write_text(json.dumps({"files": [], "weights": {"basis": "hadamard-1024"}}))
    refused(write(tmp_path / folder, form), form, "weights.basis hadamard-1024 in ")
    assert open_pack(write(tmp_path / "others", form), FORMS[form][3]).entries


def test_an_index_and_a_damaged_json(tmp_path: Path) -> None:
    path = write(tmp_path, "mlx text")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"hadamard_block_size": 1024}, "weight_map": {}}))
    refused(path, "mlx text", "metadata.hadamard_block_size in model.safetensors.index.json")
    index.unlink()
    (tmp_path / "manifest.json").write_bytes(b'{"prism_hadamard": 1024, "files": [')
    refused(path, "mlx text", "hadamard in manifest.json")
    (tmp_path / "manifest.json").write_bytes(b'\xff{"files": [')
    assert open_pack(path, "text_encoder").entries


PLAIN: dict[str, Any] = {
    "hadamard": False,
    "rotation": None,
    "prism_hadamard_block": 0,
    "signs": [],
    "quantization": {"bits": 2, "group_size": 128, "rotation": "none", "hadamard": {"enabled": False, "block": 1024}},
    "enable_time_sign_embed": True,
    "rope_theta": 2000,
    "rotary_pct": 0.5,
    "rotate_half": True,
    "rotate_every_two": True,
    "partial_rotary_factor": 1.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "design": "road signs",
    "description": "Not in the hadamard basis: a plain model",
    "signature": "abc",
    "musubi_block_swap_device": "cpu",
    "basis": "unrotated",
    "files": ["assets/road_signs.png", "assets/rotation.png", "signs.txt"],
    "sizes": {"assets/rotation.png": 1, "assets/road_signs.png": 2},
}


@every_form
def test_what_is_no_mark(tmp_path: Path, form: str) -> None:
    """A key that says no, words that only begin or end alike, sentences, the user's own graph and texts."""
    said = {
        "prompt": json.dumps({"1": {"inputs": {"rotation": 90, "hadamard": True}}}),
        "workflow": json.dumps({"nodes": [{"type": "HadamardProduct"}]}),
        "ss_tag_frequency": json.dumps({"signs": {"road signs": 3}}),
        "modelspec.title": "signs",
        "rope.rotary": "1",
        "hadamard": "false",
    }
    if FORMS[form][2] is torch_file:
        said = {}
    path = write(tmp_path, form, said=said)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    if form == "gguf text":
        with pytest.raises(PackError, match="is a transformer"):
            open_pack(path, "text_encoder")
    else:
        assert open_pack(path, FORMS[form][3]).entries


def test_a_model_of_our_own_may_have_such_names(tmp_path: Path) -> None:
    """A patched model of another architecture: a parameter called rotation, metadata that a workflow added."""
    weights = {"camera.rotation": torch.ones(3), "a.b.weight": torch.ones(2, 2)}
    record = native.make_record(weights, {"file": "hadamard.safetensors"}, "Other", {"class": "Other"})
    native.write(tmp_path / "m.safetensors", weights, record, extra={"rotation": 3, "prompt": {"hadamard": 1}})
    assert open_pack(tmp_path / "m.safetensors").entries.keys() == weights.keys()
    tensors = native.to_tensors(weights) | {"m.bonsai.record": record.to_tensor()}  # as ComfyUI saves it
    save_file(tensors, tmp_path / "n.safetensors", {"rotation": "3"})
    assert open_pack(tmp_path / "n.safetensors").entries.keys() == weights.keys()


def test_nothing_is_saved_that_would_be_refused(tmp_path: Path) -> None:
    weights = {"HadamardMix.weight": torch.ones(2, 2)}
    with pytest.raises(PackError, match=r"was not written, for it could not be read again .*HadamardMix"):
        native.write(tmp_path / "m.safetensors", weights, native.make_record(weights))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mark", ["tensor", "metadata", "record"])
def test_a_native_file_of_a_rotated_model(tmp_path: Path, mark: str) -> None:
    """Whoever adds the marks to a file with our record is believed."""
    weights = {"a.b.weight": torch.ones(2, 2)}
    if mark == "tensor":
        weights["a.b.signs"] = SIGNS
    extra = {"prism.hadamard.block_size": "1024"} if mark == "metadata" else {}
    record = json.loads(native.make_record(weights).to_json())
    if mark == "record":
        record["layers"]["a.b"] = {"hadamard_block": 1024}
    save_file(weights, tmp_path / "m.safetensors", {"bonsai": json.dumps(record), **extra})
    with pytest.raises(PackError, match=SAYS):
        open_pack(tmp_path / "m.safetensors")


@pytest.mark.parametrize("place", ["metadata", "config.json", "manifest.json", "tensor"])
def test_whole_packs_by_their_folder(tmp_path: Path, place: str) -> None:
    """What the nodes call: a transformer and a text encoder found in the folder of a release."""
    transformer = tmp_path / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors"
    write_mlx(transformer, "ternary", SMALL)
    write_text_encoder(tmp_path / "text_encoder-mlx-4bit", TINY_TEXT)
    text = tmp_path / "text_encoder-mlx-4bit" / "model.safetensors"
    open_transformer(tmp_path), open_text_encoder(tmp_path)
    for file in (transformer, text):
        if place == "manifest.json":
            (tmp_path / place).write_text('{"prism_hadamard": {"block": 1024}}')
        elif place == "config.json":
            (file.parent / place).write_text('{"model_type": "prism_hadamard_qwen3", "num_hidden_layers": 28}')
        else:
            tensors = load_file(file)
            layer = next(name for name in tensors if name.endswith(".scales")).removesuffix(".scales")
            extra = {f"{layer}.signs": SIGNS} if place == "tensor" else {}
            save_file(tensors | extra, file, None if extra else {"prism_hadamard_block": "1024"})
    for opened in (open_transformer, open_text_encoder):
        with pytest.raises(PackError, match=SAYS):
            opened(tmp_path)


@pytest.mark.parametrize("form", ["mlx", "gguf", "config.json"])
def test_a_large_rotated_file_is_refused_at_once(tmp_path: Path, form: str) -> None:
    """8 GB, of which nothing but the header is read, with the tables of a language model: below 2 s."""
    size = 8_000_000_000
    if form == "gguf":
        path = tmp_path / "m.gguf"
        words = [f"token{i}" for i in range(150_000)]
        gguf(path, {}, {"tokenizer.ggml.tokens": words, "prism.hadamard.version": 1})
    else:
        path = tmp_path / "m.safetensors"
        said = {"prism_hadamard": "1"} if form == "mlx" else {}
        header = {"a.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}, "__metadata__": said}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        size += 8 + len(text)
        if form == "config.json":
            (tmp_path / form).write_text('{"hadamard": {"block": 1024}}')
    os.truncate(path, size)
    started = time.perf_counter()
    with pytest.raises(PackError, match=SAYS):
        open_pack(path)
    assert time.perf_counter() - started < 2


def test_a_whole_gemlite_pack(tmp_path: Path) -> None:
    path = tmp_path / "state_dict.pt"
    write_gemlite(path, "ternary", SMALL)
    read_weights(open_transformer(path))
    tensors = torch.load(path, weights_only=True)
    layer = next(name for name in tensors if name.endswith(".W_q")).removesuffix(".W_q")
    torch.save(tensors | {f"{layer}.signs": SIGNS}, path)
    with pytest.raises(PackError, match=rf"{layer}\.signs: .*{SAYS}"):
        open_transformer(path)


def bytes_read() -> int:
    """What this process has read from files other than by mapping them."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="this system does not count what is read")
@pytest.mark.parametrize("mapped", [True, False])
def test_a_pickle_is_refused_before_its_tensors_are_read(tmp_path: Path, mapped: bool) -> None:
    """Also where nothing may stay mapped, and so all of it is read in the end."""
    size = 1 << 24
    path = write(tmp_path, "gemlite", {"b.weight": torch.zeros(size // 2, dtype=torch.bfloat16), "a.to_q.signs": SIGNS})
    before = bytes_read()
    with pytest.raises(PackError, match=SAYS):
        open_pack(path, mapped=mapped)
    assert bytes_read() - before < size // 2
