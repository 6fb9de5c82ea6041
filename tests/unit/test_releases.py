"""Published files are told from others: the table against shapes that others published, and files of those sizes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import flux2, qwen3, releases
from bonsai_ops.weights.formats import native, open_pack
from bonsai_ops.weights.formats.safetensors_file import SafetensorsFile
from bonsai_ops.weights.formats.torch_file import TorchFile
from bonsai_ops.weights.read import open_text_encoder, open_transformer
from bonsai_ops.weights.releases import RELEASES, UNKNOWN, Census, release_of

Shapes = dict[str, tuple[str, tuple[int, ...]]]
SIZES = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2}
SEEDLING = Path(releases.__file__).resolve().parents[1] / "models" / "bonsai" / "seedling"
TERNARY, BINARY = "PrismML ternary, MLX release", "PrismML binary, MLX release"
ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def named(name: str) -> releases.Release:
    (release,) = (r for r in RELEASES if r.name == name)
    return release


def coded(name: str, shape: tuple[int, ...], bits: int, group: int) -> Shapes:
    """The three tensors of a packed layer."""
    rows, columns = shape
    tables = {f"{name}.{leaf}": ("BF16", (rows, columns // group)) for leaf in ("scales", "biases")}
    return {f"{name}.weight": ("U32", (rows, columns * bits // 32)), **tables}


def transformer(bits: int) -> Shapes:
    """The tensors of an MLX release's transformer, in the order of the safetensors package."""
    geometry, found = synthetic.KLEIN_4B, {}
    for name, parts in flux2.diffusers_sources(geometry).items():
        rows, *rest = flux2.expected_shapes(geometry)[name]
        for part in parts:
            shape, layer = (rows // len(parts), *rest), part.removesuffix(".weight")
            found |= coded(layer, shape, bits, 128) if flux2.is_block_linear(name) else {part: ("BF16", shape)}
    return dict(sorted(found.items(), key=lambda item: (-SIZES[item[1][0]], item[0])))


def encoder() -> Shapes:
    """The tensors of an MLX release's text encoder; mlx writes them in an order of its own."""
    found: Shapes = {}
    for name, shape in (qwen3.expected_shapes(ENCODER) | {qwen3.NORM: (2560,)}).items():
        found |= coded(name.removesuffix(".weight"), shape, 4, 64) if len(shape) == 2 else {name: ("BF16", shape)}
    embedding = f"{qwen3.PREFIX}embed_tokens"
    return {n: t for n, t in found.items() if embedding not in n} | coded(embedding, (151936, 2560), 4, 64)


def write_empty(path: Path, tensors: Shapes, header: int, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of these tensors with a header of so many bytes, its data a hole of the disk."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    assert len(text) <= header
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header.to_bytes(8, "little") + text.ljust(header))
        file.truncate(8 + header + end)
    return path


@pytest.mark.parametrize(("name", "bits"), [(TERNARY, 2), (BINARY, 1)])
def test_a_transformer_of_the_published_size(tmp_path: Path, name: str, bits: int) -> None:
    release = named(name)
    path = write_empty(tmp_path / "a.safetensors", transformer(bits), release.header)
    assert path.stat().st_size == release.size
    assert open_transformer(path).release == f"{name} (by size and header)"


def test_the_text_encoder_that_the_mlx_releases_share(tmp_path: Path) -> None:
    """Alone, under any name: its header says all, and no tensor is read."""
    path = write_empty(tmp_path / "Any name.SAFETENSORS", encoder(), 102_329, {"format": "mlx"})
    assert path.stat().st_size == 2_263_022_529
    pack, sizes = open_text_encoder(path)
    assert "Qwen3-4B-4bit of mlx-community, the text encoder" in pack.release
    assert sizes["hidden_size"] == 2560 and pack.counts == {"layers": 36, "layers in all": 36}
    linears = [entry for entry in pack.entries.values() if len(entry.shape) == 2]
    assert len(linears) == 27 * 7 + 1 and {(e.bits, e.group_size) for e in linears} == {(4, 64)}


def test_the_unpacked_transformer(tmp_path: Path) -> None:
    shapes = {n: ("BF16", s) for n, s, _ in synthetic._diffusers(synthetic.KLEIN_4B)}
    release = named("PrismML ternary or binary, unpacked release")
    path = write_empty(tmp_path / "a.safetensors", shapes, release.header)
    assert path.stat().st_size == release.size and open_pack(path).release == f"{release.name} (by size and header)"


def other_header(tensors: Shapes) -> tuple[Shapes, int]:
    """A header of eight bytes more, an embedder of eight bytes less."""
    return tensors | {"proj_out.weight": ("BF16", (128 * 3072 - 4,))}, 44_712 + 8


def one_tensor_less(tensors: Shapes) -> tuple[Shapes, int]:
    """Two norms as one."""
    name = "single_transformer_blocks.0.attn.norm_"
    kept = {n: t for n, t in tensors.items() if n != f"{name}k.weight"}
    return kept | {f"{name}q.weight": ("BF16", (256,))}, 44_712


def fewer_codes(tensors: Shapes) -> tuple[Shapes, int]:
    """Numbers instead of words."""
    name = next(n for n, (dtype, _) in tensors.items() if dtype == "U32")
    return tensors | {name: ("F32", tensors[name][1])}, 44_712


def other_floats(tensors: Shapes) -> tuple[Shapes, int]:
    """One of another dtype; the header is as long."""
    name = "proj_out.weight"
    return tensors | {name: ("F16", tensors[name][1])}, 44_712


@pytest.mark.parametrize("change", [other_header, one_tensor_less, fewer_codes, other_floats])
def test_a_file_of_the_right_size_and_another_header(tmp_path: Path, change: object) -> None:
    path = write_empty(tmp_path / "a.safetensors", *change(transformer(2)))
    assert path.stat().st_size == named(TERNARY).size
    assert release_of(path, SafetensorsFile(path).census()) == UNKNOWN


def test_the_right_header_and_another_size(tmp_path: Path) -> None:
    tensors = transformer(2)
    path = write_empty(tmp_path / "a.safetensors", tensors | {"proj_out.weight": ("BF16", (128, 3071))}, 44_712)
    assert release_of(path, SafetensorsFile(path).census()) == UNKNOWN


def test_every_row_can_be_told(tmp_path: Path) -> None:
    """No two rows look alike, hashes are whole, and a file of another size or census is none of them."""
    looks = {(r.size, r.header, r.tensors, r.coded) for r in RELEASES}
    assert len(looks) == len({r.name for r in RELEASES}) == len(RELEASES)
    assert all(len(r.sha256) in (0, 64) and set(r.sha256) <= set("0123456789abcdef") for r in RELEASES)
    for release in RELEASES:
        census = Census(release.header, release.tensors, release.coded, release.bf16 or 0)
        assert release.fits(release.size, census) and not release.fits(release.size + 1, census)
        for field in ("tensors", "coded"):
            assert not release.fits(release.size, replace(census, **{field: getattr(census, field) + 1}))
        assert release.bf16 is None or not release.fits(release.size, replace(census, bf16=release.bf16 - 1))
        assert release.header is None or not release.fits(release.size, replace(census, header=release.header + 8))


def test_a_pickle_is_counted(tmp_path: Path) -> None:
    """The gemlite release: 500 tensors of 100 packed layers, 69 dense ones. This one has fewer blocks."""
    synthetic.write_gemlite(tmp_path / "state_dict.pt", "ternary", synthetic.TINY)
    packed = 12 + 2 * 2
    dense = len(list(synthetic._diffusers(synthetic.TINY))) - packed
    assert TorchFile(tmp_path / "state_dict.pt").census() == Census(None, 5 * packed + dense, packed, dense)
    assert open_transformer(tmp_path / "state_dict.pt").release == UNKNOWN
    with (tmp_path / "published.pt").open("wb") as file:
        file.truncate(1_540_457_482)
    assert release_of(tmp_path / "published.pt", Census(None, 569, 100, 69)) == (
        "PrismML ternary, gemlite release (by size and header)"
    )


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "ternary seedling, shipped with this plugin"),
        ("binary.safetensors", "binary seedling, shipped with this plugin"),
        ("text_encoder-mlx-4bit/model.safetensors", "text encoder of the seedling, shipped with this plugin"),
        ("vae/diffusion_pytorch_model.safetensors", "VAE of the seedling, shipped with this plugin"),
    ],
)
def test_small_files_are_told_by_their_hash(tmp_path: Path, file: str, name: str) -> None:
    """What ships is what the table says; one other bit in the data, and it is another file."""
    path = SEEDLING / file
    assert release_of(path, SafetensorsFile(path).census()) == f"{name} (by sha256)"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    other = tmp_path / path.name
    other.write_bytes(changed)
    assert not release_of(other, SafetensorsFile(other).census(), {}).startswith(name)


def test_a_large_file_is_not_read_for_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_empty(tmp_path / "a.safetensors", transformer(2), named(TERNARY).header)
    monkeypatch.setattr(hashlib, "sha256", lambda *_: pytest.fail("hashed"))
    assert open_transformer(path).release.startswith(TERNARY)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"file": "mine.safetensors", "sha256": named(BINARY).sha256}, f"made from {BINARY}"),
        ({"file": "mine.safetensors", "sha256": "00"}, "made from mine.safetensors"),
        ({"file": "mine.safetensors"}, "made from mine.safetensors"),
        ({"patched": "Flux"}, "made by Patch to BitLinear"),
        ({"sha256": ["a"]}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_a_native_file_tells_what_it_was_made_from(tmp_path: Path, source: dict, told: str) -> None:
    weights = {"a.weight": torch.zeros(2, 2)}
    native.write(tmp_path / "a.safetensors", weights, native.make_record(weights, source))
    assert open_pack(tmp_path / "a.safetensors").release == told


def test_any_other_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert open_pack(tmp_path / "a.safetensors").release == UNKNOWN
