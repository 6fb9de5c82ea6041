"""What gemlite's own packer writes, in its torch file and in safetensors as diffusers saves it, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import reason
from safetensors.torch import save_file

from bonsai_ops.tools.synthetic import TINY, write_gemlite
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import CodedTensor, Pack, open_pack
from bonsai_ops.weights.formats.gemlite_layer import FIELDS
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights
from bonsai_ops.weights.release import find_transformer, holds_transformer, packs_among

packed_here = pytest.mark.skipif(sys.platform != "linux", reason="gemlite is installed on Linux only")
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
FILE = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_k"
Leaves = dict[str, torch.Tensor]
SETTINGS: dict[str, Any] = {
    "quant_method": "gemlite",
    "compute_dtype": "float16",
    "format": "gemlite-int2-ternary-g128",
    "bits": 2,
    "group_size": 128,
    "packing_bitwidth": 8,
    "solver": "ternary",
    "input_dtype": "fp16",
    "output_dtype": "fp16",
    "scales_dtype": "fp32",
    "zeros_dtype": "fp32",
}


def save(path: Path, tensors: Leaves) -> Path:
    """A torch file or, by its ending, safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def one_layer(folder: Path, leaves: Leaves, name: str = "state_dict.pt") -> CodedTensor:
    """The entry of a file with one layer."""
    pack = open_pack(save(folder / name, {f"a.b.{leaf}": tensor for leaf, tensor in leaves.items()}))
    return pack.entries["a.b.weight"]


def draw(bits: int, shape: tuple[int, int], groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scales [N, groups]); 2-bit codes are those of a ternary weight, one group is all zero."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, {1: 2, 2: 3, 4: 16}[bits], shape, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape[0], groups, generator=generator) + 0.1).to(dtype)
    scales[0, 0] = 0
    return codes, scales.bfloat16().to(dtype) if bits == 4 else scales  # 15 times a float32 is not exact


def assert_values(weight: PackedWeight, codes: torch.Tensor, scales: torch.Tensor, zero: torch.Tensor | float) -> None:
    """(code - zero) * scale of the codes that were given to the packer; tolerance 0 in float32."""
    width = codes.shape[1] // scales.shape[1]
    spread = [
        table.double().repeat_interleave(width, dim=1) if isinstance(table, torch.Tensor) else table
        for table in (scales, zero)
    ]
    assert torch.equal(weight.dequantize(torch.float32), ((codes.double() - spread[1]) * spread[0]).float())


@packed_here
@pytest.mark.parametrize("name", ["state_dict.pt", FILE])
@pytest.mark.parametrize("bitwidth", [8, 16, 32])
@pytest.mark.parametrize(("bits", "zero", "scheme"), [(1, 0.5, "binary"), (2, 1.0, "ternary"), (4, 8.0, "affine")])
def test_the_state_dict_of_gemlite(
    tmp_path: Path, bits: int, zero: float, scheme: str, bitwidth: int, name: str
) -> None:
    """0.6 adds `meta_scale`, which was refused, and words of other widths. Some codes look square: K / e is N."""
    from peers.gemlite_pack import pack_codes

    for dtype in FLOATS:
        codes, scales = draw(bits, (64, 256), 2, dtype)
        leaves = pack_codes(codes, scales, torch.full((128, 1), zero, dtype=dtype), bits, bitwidth=bitwidth)
        assert leaves["meta_scale"] == 0 and leaves["metadata"].tolist()[10] == 4
        entry = one_layer(tmp_path, leaves, name)
        assert (entry.bits, entry.group_size, entry.shape) == (bits, 128, (64, 256))
        weight = entry.weight()
        assert weight.scheme == scheme
        assert_values(weight, codes, scales, zero)


@packed_here
@pytest.mark.parametrize("bits", [1, 2])
def test_words_of_64_bits(tmp_path: Path, bits: int) -> None:
    """Two words of 32 bits each, the first below; gemlite's unpacker finds the codes in them."""
    from peers.gemlite_pack import pack_codes

    codes, scales = draw(bits, (24, 256), 2, torch.float32)
    zeros = torch.full((48, 1), 1.0)
    leaves = pack_codes(codes, scales, zeros, bits, bitwidth=32)
    leaves["W_q"] = leaves["W_q"].t().contiguous().view(torch.int64).t().contiguous()
    leaves["metadata"][4] = 64 // bits
    from gemlite.bitpack import unpack_over_cols_torch

    assert torch.equal(unpack_over_cols_torch(leaves["W_q"].t().contiguous(), bits, 256).to(torch.uint8), codes)
    for name in ("state_dict.pt", FILE):
        assert_values(one_layer(tmp_path, leaves, name).weight(), codes, scales, 1.0)


@packed_here
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_words_of_64_bits_that_gemlite_packed_on_a_cpu_are_refused(tmp_path: Path, bits: int) -> None:
    """It shifts int32: the codes of the upper halves are gone, and 1-bit layers would be read as noise."""
    from peers.gemlite_pack import pack_codes

    codes, scales = draw(bits, (24, 256), 2, torch.float32)
    codes[:, :64] = 0  # nothing to be seen in the first row of words
    leaves = pack_codes(codes, scales, torch.ones(48, 1), bits, bitwidth=64)
    with pytest.raises(PackError, match=r"a\.b\.W_q: has 64-bit words with nothing in their upper halves.*bitwidth 32"):
        one_layer(tmp_path, leaves)


@packed_here
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("zeros", "options", "scheme"),
    [
        ("tensor of 1", {"fma_mode": False}, "ternary"),
        ("any tensor", {"fma_mode": False}, ""),
        ("number", {}, "ternary"),
        ("none", {}, "affine"),
        ("tensor of 1", {"contiguous": False}, "ternary"),
    ],
)
def test_every_use_of_zeros(tmp_path: Path, zeros: str, options: dict, scheme: str, dtype: torch.dtype) -> None:
    """W_group_mode 3 subtracts them before the scale, 2 has none."""
    from peers.gemlite_pack import pack_codes

    codes, scales = draw(2, (40, 384), 3, dtype)
    table = torch.full_like(scales, 1.0)
    if zeros == "any tensor":
        table = torch.rand(scales.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    given = {"number": 1, "none": None}.get(zeros, table.reshape(-1, 1))
    weight = one_layer(tmp_path, pack_codes(codes, scales, given, 2, **options)).weight()
    assert weight.scheme == (scheme or ("zero_point" if dtype == torch.float32 else "affine"))
    expected = (codes.float() - (table.float().repeat_interleave(128, 1) if given is not None else 0)) * (
        scales.float().repeat_interleave(128, 1)
    )
    assert torch.equal(weight.dequantize(torch.float32), expected)


@packed_here
@pytest.mark.parametrize(("group", "columns", "read_as"), [(128, 128, 128), (None, 384, 128), (None, 160, 32)])
@pytest.mark.parametrize("zeros", ["tensor", "number", "none"])
def test_one_scale_a_row(tmp_path: Path, group: int | None, columns: int, read_as: int, zeros: str) -> None:
    """channel_scale_mode 1: gemlite packs so where a group is as wide as the layer."""
    from peers.gemlite_pack import pack_codes

    codes, scales = draw(2, (24, columns), 1, torch.float16)
    given = {"tensor": torch.ones(24, 1).half(), "number": 1, "none": None}[zeros]
    leaves = pack_codes(codes, scales, given, 2, group=group)
    assert leaves["metadata"].tolist()[9:11] == [1, 0 if zeros == "none" else 1]
    weight = one_layer(tmp_path, leaves).weight()
    assert (weight.group_size, weight.scheme) == (read_as, "affine" if zeros == "none" else "ternary")
    assert_values(weight, codes, scales, 0.0 if zeros == "none" else 1.0)


@packed_here
@pytest.mark.parametrize(("bits", "zero"), [(1, 0.5), (2, 1.0)])
def test_a_relation_broken_by_one_step(tmp_path: Path, bits: int, zero: float) -> None:
    """fp16 tables; both are kept then."""
    from peers.gemlite_pack import pack_codes

    codes, scales = draw(bits, (24, 256), 2, torch.float16)
    leaves = pack_codes(codes, scales, torch.full((48, 1), zero).half(), bits)
    leaves["zeros"][1, 3] = torch.nextafter(leaves["zeros"][1, 3], torch.tensor(9.0).half())
    weight = one_layer(tmp_path, leaves).weight()
    s, z = (leaves[leaf].double().t().repeat_interleave(128, 1) for leaf in ("scales", "zeros"))
    assert weight.scheme == "affine"
    assert torch.equal(weight.dequantize(torch.float32), (codes.double() * s + z).float())


@packed_here
def test_attention_layers_of_different_bits(tmp_path: Path) -> None:
    """q with 1 bit, k with 2, v with 4, their zero points subtracted: one weight with the values of all three."""
    from peers.gemlite_pack import pack_codes

    from bonsai_ops.weights.formats.entries import fuse_rows

    parts, expected = [], []
    for bits in (1, 2, 4):
        codes, scales = draw(bits, (16, 256), 2, torch.float16)
        zeros = torch.full((16, 2), 0.3).half()
        parts.append(one_layer(tmp_path / str(bits), pack_codes(codes, scales, zeros, bits, fma_mode=False)))
        s, z = (table.float().repeat_interleave(128, 1) for table in (scales, zeros))
        expected.append((codes.float() - z) * s)
    assert torch.equal(fuse_rows("qkv", parts).weight().dequantize(torch.float32), torch.cat(expected))
    added = one_layer(tmp_path / "added", pack_codes(codes, scales, zeros.reshape(-1, 1), 4))
    with pytest.raises(PackError, match=r"has a zero that is added, other than a\.b\.weight"):
        fuse_rows("qkv", [parts[0], added])


def layer(bits: int = 2, shape: tuple[int, int] = (32, 256)) -> Leaves:
    """A layer without gemlite: ternary or binary codes in bytes, fp16 tables."""
    codes, scales = draw(bits, shape, shape[1] // 128, torch.float16)
    fields = codes.view(shape[0], -1, 8 // bits).int() << torch.arange(0, 8, bits)
    return {
        "W_q": fields.sum(2).to(torch.uint8).t().contiguous(),
        "scales": scales.t().contiguous(),
        "zeros": (-scales * (0.5 if bits == 1 else 1)).t().contiguous(),
        "metadata": torch.tensor([0, bits, 128, 2**bits - 1, 8 // bits, 1, 1, 0, 1, 0, 4, 1], dtype=torch.int32),
        "orig_shape": torch.tensor(shape, dtype=torch.int32),
        "meta_scale": torch.tensor(0.0),
    }


@pytest.mark.parametrize("name", ["state_dict.pt", FILE])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("scaled_activations", 1), ("W_nbits", 8), ("W_nbits", 16), ("W_nbits", 4), ("group_size", 16)),
        *(("unpack_mask", 1), ("elements_per_sample", 1), ("elements_per_sample", 16), ("input_dtype", 4)),
        *(("input_dtype", 18), ("meta_dtype", 19), ("W_group_mode", 0), ("W_group_mode", 1), ("W_group_mode", 5)),
        *(("channel_scale_mode", mode) for mode in (1, 2, 3, 4, 5)),
    ],
)
def test_metadata_that_is_not_understood(tmp_path: Path, field: str, value: int, name: str) -> None:
    """It changes what the codes mean, or contradicts them."""
    leaves = layer()
    leaves["metadata"][FIELDS.index(field)] = value
    with pytest.raises(PackError, match=rf"{name}: a\.b\.[a-zA-Z_]+: (says|has) .*\. Use "):
        one_layer(tmp_path, leaves, name)


@pytest.mark.parametrize(("field", "value"), [("output_dtype", 2), ("acc_dtype", 1), ("data_contiguous", 0)])
def test_metadata_that_changes_no_value(tmp_path: Path, field: str, value: int) -> None:
    leaves = layer()
    leaves["metadata"][FIELDS.index(field)] = value
    assert one_layer(tmp_path, leaves).weight().scheme == "ternary"


@pytest.mark.parametrize("count", [0, 11, 13])
def test_metadata_of_another_length(tmp_path: Path, count: int) -> None:
    leaves = layer()
    leaves["metadata"] = torch.cat([leaves["metadata"], leaves["metadata"]])[:count]
    with pytest.raises(PackError, match=rf"a\.b\.metadata: has {count} values\. Expected 12"):
        one_layer(tmp_path, leaves)


@pytest.mark.parametrize("name", ["state_dict.pt", FILE])
@pytest.mark.parametrize("value", [0.05, 2.0, -1.0, float("nan"), float("inf"), [0.0, 0.0], 0])
def test_a_meta_scale_that_could_mean_something_is_refused(tmp_path: Path, value: Any, name: str) -> None:
    leaves = {**layer(), "meta_scale": torch.tensor(value)}
    with pytest.raises(PackError, match=rf"{name}: a\.b\.meta_scale: is .*Expected"):
        one_layer(tmp_path, leaves, name)


@pytest.mark.parametrize("value", [0.0, 1.0, [0.0], None])
def test_a_meta_scale_that_changes_nothing(tmp_path: Path, value: Any) -> None:
    """0 is what gemlite writes; multiplied with it every weight would be 0."""
    leaves, expected = layer(), one_layer(tmp_path, layer()).weight().dequantize()
    del leaves["meta_scale"]
    if value is not None:
        leaves["meta_scale"] = torch.tensor(value)
    assert expected.any() and torch.equal(one_layer(tmp_path, leaves).weight().dequantize(), expected)


@pytest.mark.parametrize("name", ["state_dict.pt", FILE])
def test_shapes_that_look_right(tmp_path: Path, name: str) -> None:
    """Codes [64, 64] of (64, 256) are no square weight; swapped sizes and tables the other way round are refused."""
    leaves = layer(shape=(64, 256))
    assert leaves["W_q"].shape == (64, 64)
    assert one_layer(tmp_path, leaves, name).shape == (64, 256)
    for changed, place in (
        ({"orig_shape": leaves["orig_shape"].flip(0)}, r"orig_shape: says 256 x 64"),
        ({"scales": leaves["scales"].t().contiguous()}, r"scales: has shape \[64, 2\]"),
        ({"zeros": leaves["zeros"].t().contiguous()}, r"zeros: has shape \[64, 2\]"),
        ({"zeros": torch.tensor(1.0)}, r"zeros: has shape \[\]"),
        ({"zeros": torch.empty(1, 0)}, r"zeros: has shape \[1, 0\]"),
        ({"zeros": leaves["zeros"].int()}, r"zeros: is torch\.int32"),
        ({"W_q": leaves["W_q"].view(torch.int8)}, r"W_q: is torch\.int8"),
        ({"W_q": leaves["W_q"].view(torch.int32)}, r"metadata: says elements_per_sample 4"),
        ({"orig_shape": torch.tensor([64, 192], dtype=torch.int32)}, r"orig_shape: says 64 x 192"),
    ):
        with pytest.raises(PackError, match=rf"{name}: a\.b\.{place}"):
            one_layer(tmp_path, {**leaves, **changed}, name)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Leaves:
    """All tensors of a tiny ternary transformer."""
    path = tmp_path_factory.mktemp("gemlite") / "state_dict.pt"
    write_gemlite(path, "ternary", TINY)
    return torch.load(path, weights_only=True)


def packed_names(state: Leaves) -> list[str]:
    return [name.removesuffix(".W_q") for name in state if name.endswith(".W_q")]


@pytest.fixture
def release(tmp_path: Path, state: Leaves) -> Callable[..., Path]:
    """A function that writes a release of diffusers with these settings and changed tensors, and returns its folder."""

    def write(tensors: Leaves | None = None, **settings: Any) -> Path:
        save(tmp_path / "transformer" / FILE, {**state, **(tensors or {})})
        config = {"_class_name": "Flux2Transformer2DModel", "num_layers": 1, "num_single_layers": 2}
        names = {"quantized_fqns": packed_names(state), "modules_to_not_convert": ["x_embedder", "proj_out"]}
        config["quantization_config"] = {**SETTINGS, **names, **settings}
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def values(pack: Pack) -> Leaves:
    return {
        name: weight.dequantize() if isinstance(weight, PackedWeight) else weight
        for name, weight in read_weights(pack).items()
    }


def test_a_release_of_diffusers(release: Callable[..., Path], state: Leaves, tmp_path: Path) -> None:
    """Its transformer is found, and is the one of the torch file; without config.json as well."""
    folder = release()
    path = folder / "transformer" / FILE
    assert find_transformer(folder) == find_transformer(folder / "transformer") == path
    assert packs_among([f"pack/transformer/{FILE}"]) == ["pack"]
    expected = values(open_transformer(save(tmp_path / "x" / "state_dict.pt", state)))
    for config in (True, False):
        pack = open_transformer(folder)
        assert pack.format == "gemlite in safetensors"
        found = values(pack)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        if config:
            (folder / "transformer" / "config.json").unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_not_convert": None, "quantized_fqns": None},
        {"modules_to_not_convert": "proj_out", "format": None, "solver": None},
        {"modules_to_not_convert": [None, "norm_out"], "quant_method": None, "bits": None},
        {"scales_dtype": "float32", "zeros_dtype": "torch.float32", "input_dtype": "float16", "unknown": 3},
        {"format": "my own words", "compute_dtype": "bfloat16"},
    ],
)
def test_settings_that_agree(release: Callable[..., Path], settings: dict) -> None:
    open_transformer(release(**settings))


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("quant_method", "bitsandbytes", "says 'bitsandbytes', but the file is packed by gemlite"),
        ("bits", 1, "says 1, but "),
        ("bits", "2", "says '2', but "),
        ("group_size", 64, "says 64, but "),
        ("packing_bitwidth", 32, "says 32, but "),
        ("scales_dtype", "fp16", "says fp16, but "),
        ("zeros_dtype", "bfloat16", "says bfloat16, but "),
        ("input_dtype", "bf16", "says bf16, but "),
        ("output_dtype", "fp32", "says fp32, but "),
        ("output_dtype", "fp8", "says 'fp8', which is none of fp16, bf16 and fp32"),
        ("format", "gemlite-int1-g128", "says 'gemlite-int1-g128', but "),
        ("format", "gemlite-int2-ternary-g64", "says 'gemlite-int2-ternary-g64', but"),
        ("quantized_fqns", [LAYER], "does not name"),
        ("quantized_fqns", {"a": 1}, "is no list of names"),
        ("modules_to_not_convert", [LAYER], f"names {LAYER}, which is packed"),
        ("modules_to_not_convert", ["transformer_blocks.0"], "names "),
        ("modules_to_not_convert", 3, "is no list of names"),
    ],
)
def test_settings_that_contradict_the_tensors(release: Callable[..., Path], name: str, value: Any, found: str) -> None:
    folder = release(**{name: value})
    with pytest.raises(PackError) as caught:
        open_transformer(folder)
    message = reason(caught.value, folder / "transformer" / "config.json")
    assert message.startswith(f"quantization_config.{name}: {found}")
    assert message.endswith("if config.json is of another model, take it away.")


def test_a_layer_that_the_settings_name_is_not_packed(release: Callable[..., Path], state: Leaves) -> None:
    names = [*packed_names(state), "x_embedder", "proj_out"]
    open_transformer(release(quantized_fqns=names))  # both are in modules_to_not_convert
    folder = release(quantized_fqns=names, modules_to_not_convert=["x_embedder"])
    with pytest.raises(PackError, match="quantized_fqns: names proj_out, which is not packed"):
        open_transformer(folder)


def test_a_bias_has_no_place_in_the_transformer(release: Callable[..., Path], state: Leaves, tmp_path: Path) -> None:
    """gemlite writes one where the layer has it; FLUX.2 has none, so it is refused and not dropped."""
    bias = {f"{LAYER}.bias": torch.ones(256).half()}
    for path in (release(bias), save(tmp_path / "x" / "state_dict.pt", {**state, **bias})):
        with pytest.raises(PackError, match=rf"{LAYER}\.bias: does not belong to a FLUX\.2 transformer"):
            open_transformer(path)


def test_a_text_encoder_of_this_kind_is_named(tmp_path: Path, state: Leaves) -> None:
    path = save(tmp_path / "model.safetensors", state)
    with pytest.raises(PackError, match=r"is a transformer \(format gemlite in safetensors\)"):
        open_pack(path, "text_encoder")


def shard(state: Leaves, folder: Path, index: bool) -> list[Path]:
    """The tensors in three files in turn, so that the leaves of a layer lie in all of them."""
    names = sorted(state)
    parts = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        save(folder / part, {name: state[name] for name in names[i::3]})
    if index:
        table = {"metadata": {}, "weight_map": {name: parts[i % 3] for i, name in enumerate(names)}}
        (folder / f"{FILE}.index.json").write_text(json.dumps(table))
    return [folder / part for part in parts]


@pytest.mark.parametrize("index", [True, False])
def test_a_sharded_transformer(tmp_path: Path, state: Leaves, index: bool) -> None:
    """It is found in its release, and every part of it stands for the whole."""
    expected = values(open_transformer(save(tmp_path / "x" / "state_dict.pt", state)))
    parts = shard(state, tmp_path / "pack" / "transformer", index)
    assert holds_transformer(tmp_path / "pack") and find_transformer(tmp_path / "pack") == parts[0]
    assert packs_among([f"pack/transformer/{part.name}" for part in parts]) == ["pack"]
    for path in (tmp_path / "pack", tmp_path / "pack" / "transformer", parts[2]):
        pack = open_transformer(path)
        found = values(pack)
        assert pack.path == parts[0]
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_shards_that_do_not_make_a_whole(tmp_path: Path, state: Leaves) -> None:
    parts = shard(state, tmp_path, index=False)
    save(parts[2], {"x_embedder.weight": state["x_embedder.weight"]})
    with pytest.raises(PackError, match=r"x_embedder\.weight: stands in .*of-00003\.safetensors too"):
        open_transformer(parts[0])
    parts[1].unlink()
    with pytest.raises(
        PackError, match=r"00001-of-00003.* is one of 3 parts, and .*00002-of-00003\.safetensors is not"
    ):
        open_transformer(tmp_path)
    shard(state, tmp_path, index=True)
    parts[1].unlink()
    with pytest.raises(PackError, match=r"index\.json: .*00002-of-00003\.safetensors, which is not there"):
        open_transformer(tmp_path)
