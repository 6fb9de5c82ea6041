"""gemlite, MLX and unpacked files, written here byte by byte with numpy, come back with exactly their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bonsai_ops.weights import formats, release
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import dense, open_pack
from bonsai_ops.weights.formats.entries import CodedTensor, DenseTensor, Pack, PackedTensor, fuse_rows
from bonsai_ops.weights.formats.file import PackFile
from bonsai_ops.weights.packed_weight import PackedWeight

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# (128, 512) at 2 bits has gemlite codes [128, 128] that look square; (64, 256) has the words [64, 16] of a narrow one
SHAPES = [(128, 512), (96, 256), (1, 512), (131, 768), (512, 256)]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint32: "U32", torch.uint8: "U8"}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """u64 header length, JSON header, data one after another."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def gemlite_layer(codes: np.ndarray, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The five tensors of one layer: code[n, k] lies in bits b (k % e) of W_q[k // e, n]; tables are [K / g, N]."""
    rows, columns = codes.shape
    per_byte = 8 // bits
    words = np.zeros((columns // per_byte, rows), dtype=np.uint8)
    for k in range(columns):
        words[k // per_byte] |= codes[:, k].astype(np.uint8) << (bits * (k % per_byte))
    group = columns // scale.shape[1]
    return {
        "W_q": torch.from_numpy(words),
        "scales": scale.t().contiguous(),
        "zeros": zero.t().contiguous(),
        "metadata": torch.tensor([0, bits, group, 2**bits - 1, per_byte, 1, 1, 0, 0, 0, 4, 1], dtype=torch.int32),
        "orig_shape": torch.tensor([rows, columns], dtype=torch.int32),
    }


def mlx_layer(codes: np.ndarray, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The three tensors of one layer: code[n, k] lies in bits b (k % (32 / b)) of word k // (32 / b)."""
    rows, columns = codes.shape
    per_word = 32 // bits
    words = np.zeros((rows, columns // per_word), dtype=np.uint32)
    for k in range(columns):
        words[:, k // per_word] |= codes[:, k].astype(np.uint32) << np.uint32(bits * (k % per_word))
    return {"weight": torch.from_numpy(words.view(np.int32)).view(torch.uint32), "scales": scale, "biases": zero}


def read_gemlite(folder: Path, *layer: object) -> CodedTensor:
    """The entry of a one-layer gemlite file."""
    torch.save({f"a.b.{leaf}": t for leaf, t in gemlite_layer(*layer).items()}, folder / "state_dict.pt")
    (entry,) = open_pack(folder / "state_dict.pt").entries.values()
    return entry


def read_mlx(folder: Path, *layer: object) -> CodedTensor:
    """The entry of a one-layer MLX file with its group size in quantization_config.json."""
    codes, scale = layer[:2]
    write_safetensors(folder / "w.safetensors", {f"a.b.{leaf}": t for leaf, t in mlx_layer(*layer).items()})
    config = {"bits": layer[3], "group_size": codes.shape[1] // scale.shape[1]}
    (folder / "quantization_config.json").write_text(json.dumps(config))
    (entry,) = open_pack(folder / "w.safetensors").entries.values()
    return entry


READERS = {"gemlite": read_gemlite, "mlx": read_mlx}


def evaluate(codes: np.ndarray, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """w = code * scale + zero in float32."""
    group = codes.shape[1] // scale.shape[1]
    s, z = (t.float().numpy().repeat(group, axis=1) for t in (scale, zero))
    return torch.from_numpy(codes.astype(np.float32) * s + z)


def assert_exact(weight: PackedWeight, expected: torch.Tensor, dtypes: list[torch.dtype] = FLOATS) -> None:
    """The float32 values, rounded once; tolerance 0."""
    for dtype in dtypes:
        assert torch.equal(weight.dequantize(dtype), expected.to(dtype)), dtype


def draw(
    shape: tuple[int, int], group: int, kind: str, table_dtype: torch.dtype, seed: int = 0
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, int]:
    """(codes [N, K], scale, zero [N, K / g], bits) of a weight of that kind; "-" in it makes half the scales negative.

    binary: zero = -scale / 2. ternary: codes 0, 1, 2 and zero = -scale. upper: codes 1, 2, 3 and zero = -2 scale.
    mixed: ternary and upper by group. Every kind has a group with scale 0.
    """
    rng = np.random.default_rng(seed)
    scale = torch.from_numpy(rng.uniform(0.01, 2, (shape[0], shape[1] // group)).astype(np.float32)).to(table_dtype)
    if "-" in kind:
        scale *= torch.from_numpy(rng.choice([-1.0, 1.0], scale.shape)).to(table_dtype)
    scale[0, 0] = 0
    kind = kind.strip("-")
    if kind == "binary":
        return rng.integers(0, 2, shape), scale, -scale / 2, 1
    if kind == "ternary":
        return rng.integers(0, 3, shape), scale, -scale, 2
    scale = scale.bfloat16().to(table_dtype)  # three times a float32 is not exact
    middle = np.full(scale.shape, 2) if kind == "upper" else rng.integers(1, 3, scale.shape)
    middle[0, 0] = 1
    codes = rng.integers(-1, 2, shape) + middle.repeat(group, axis=1)
    return codes, scale, -scale * torch.from_numpy(middle).to(table_dtype), 2


SCHEME = {"binary": "binary", "ternary": "ternary", "upper": "ternary", "mixed": "ternary"}
KINDS = [*SCHEME, *(f"-{kind}" for kind in SCHEME)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_symmetric_weights_lose_their_zero_table_and_nothing_else(
    tmp_path: Path, reader: str, shape: tuple[int, int], kind: str
) -> None:
    codes, scale, zero, bits = draw(shape, 128, kind, torch.float32)
    entry = READERS[reader](tmp_path, codes, scale, zero, bits)
    assert (entry.key, entry.shape, entry.bits, entry.group_size) == ("a.b.weight", shape, bits, 128)
    weight = entry.weight()
    assert (weight.scheme, weight.zero) == (SCHEME[kind.strip("-")], None)
    assert bool((weight.scale >= 0).all())
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("table_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_tables_of_any_float_dtype(tmp_path: Path, reader: str, kind: str, table_dtype: torch.dtype) -> None:
    """16-bit tables stay 16 bit."""
    codes, scale, zero, bits = draw((96, 256), 128, kind, table_dtype)
    weight = READERS[reader](tmp_path, codes, scale, zero, bits).weight()
    assert weight.scheme == SCHEME[kind.strip("-")]
    assert weight.scale.dtype.itemsize <= table_dtype.itemsize
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["binary", "ternary", "-mixed"])
@pytest.mark.parametrize("reader", READERS)
def test_group_sizes(tmp_path: Path, reader: str, kind: str, group: int) -> None:
    codes, scale, zero, bits = draw((96, 512), group, kind, torch.float32)
    weight = READERS[reader](tmp_path, codes, scale, zero, bits).weight()
    assert (weight.group_size, weight.scheme) == (group, SCHEME[kind.strip("-")])
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("bits", [1, 2])
def test_gemlite_and_mlx_hold_the_same_bytes(bits: int) -> None:
    """W_q transposed and read as little-endian words is MLX's weight: the two writers above agree."""
    codes, scale, zero, _ = draw((96, 512), 128, "binary" if bits == 1 else "mixed", torch.float32)
    w_q = gemlite_layer(codes, scale, zero, bits)["W_q"].t().contiguous()
    assert torch.equal(w_q.view(torch.int32), mlx_layer(codes, scale, zero, bits)["weight"].view(torch.int32))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("reader", READERS)
def test_one_broken_group_keeps_both_tables(tmp_path: Path, reader: str, bits: int) -> None:
    """Every code of the field is allowed then, and the values are those of the formula."""
    codes, scale, zero, _ = draw((96, 512), 128, "binary" if bits == 1 else "ternary", torch.float32)
    codes = np.random.default_rng(1).integers(0, 2**bits, codes.shape)
    zero[95, 3] = torch.nextafter(zero[95, 3], torch.tensor(9.0))
    weight = READERS[reader](tmp_path, codes, scale, zero, bits).weight()
    assert (weight.scheme, weight.codec) == ("affine", {1: "bit", 2: "crumb"}[bits])
    assert torch.equal(weight.zero.float(), zero)
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("table_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_unrelated_tables_are_kept(tmp_path: Path, reader: str, table_dtype: torch.dtype, bits: int) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 2**bits, (131, 256))
    scale, zero = (torch.from_numpy(rng.normal(size=(131, 2))).to(table_dtype) for _ in range(2))
    weight = READERS[reader](tmp_path, codes, scale, zero, bits).weight()
    assert weight.scheme == "affine"
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("table_dtype", FLOATS, ids=str)
def test_mlx_4_bit(tmp_path: Path, table_dtype: torch.dtype, group: int) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (131, 256))
    scale, zero = (torch.from_numpy(rng.normal(size=(131, 256 // group))).to(table_dtype) for _ in range(2))
    weight = read_mlx(tmp_path, codes, scale, zero, 4).weight()
    assert (weight.scheme, weight.codec, weight.group_size) == ("affine", "nibble", group)
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mlx_without_its_json(tmp_path: Path, bits: int) -> None:
    """Groups of 128 for 1 and 2 bit, 64 for 4 bit; 2 and 4 bit look alike, so names tell text encoders."""
    group = 64 if bits == 4 else 128
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 2**bits, (96, 512))
    scale, zero = (torch.from_numpy(rng.normal(size=(96, 512 // group))).bfloat16() for _ in range(2))
    path = tmp_path / "w.safetensors"
    layer = "model.layers.0.self_attn.q_proj" if bits == 4 else "transformer_blocks.0.attn.to_q"
    write_safetensors(path, {f"{layer}.{leaf}": t for leaf, t in mlx_layer(codes, scale, zero, bits).items()})
    (entry,) = open_pack(path).entries.values()
    assert (entry.bits, entry.group_size) == (bits, group)
    assert_exact(entry.weight(), evaluate(codes, scale, zero))


@pytest.mark.parametrize("content", ["[1, 2]", '{"group_size": "128"}', '{"quantization": 4}', "{}"])
def test_mlx_json_that_names_no_group_size_is_passed_over(tmp_path: Path, content: str) -> None:
    codes, scale, zero, bits = draw((96, 512), 128, "ternary", torch.bfloat16)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {f"a.{leaf}": t for leaf, t in mlx_layer(codes, scale, zero, bits).items()})
    (tmp_path / "config.json").write_text(content)
    (entry,) = open_pack(path).entries.values()
    assert (entry.bits, entry.group_size) == (2, 128)


@pytest.mark.parametrize("kind", ["ternary", "-ternary"])
@pytest.mark.parametrize("reader", READERS)
def test_a_fourth_level_in_a_ternary_weight_is_refused(tmp_path: Path, reader: str, kind: str) -> None:
    """zero = -scale in every group, as the published packs have it, makes code 3 a sign of damage."""
    codes, scale, zero, bits = draw((131, 512), 128, kind, torch.float32)
    codes[77, 300] = 3
    entry = READERS[reader](tmp_path, codes, scale, zero, bits)
    file = "state_dict.pt" if reader == "gemlite" else "w.safetensors"
    message = rf"{file}: a\.b\.weight: row 77, column 300 has code 3, a fourth level.*[Dd]ownload"
    with pytest.raises(PackError, match=message):
        entry.weight()


@pytest.mark.parametrize(("kind", "extra"), [("upper", 0), ("-upper", 0), ("mixed", 0), ("mixed", 3)])
@pytest.mark.parametrize("reader", READERS)
def test_four_levels_of_another_quantizer_are_kept(tmp_path: Path, reader: str, kind: str, extra: int) -> None:
    """mx.quantize's own groups may have zero = -2 scale and use all four codes."""
    codes, scale, zero, bits = draw((131, 512), 128, kind, torch.float32)
    codes[77] = extra
    weight = READERS[reader](tmp_path, codes, scale, zero, bits).weight()
    assert (weight.scheme, weight.codec) == ("affine", "crumb")
    assert_exact(weight, evaluate(codes, scale, zero))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("table", [1, 2])
@pytest.mark.parametrize("reader", READERS)
def test_tables_must_be_finite(tmp_path: Path, reader: str, table: int, value: float) -> None:
    layer = list(draw((96, 256), 128, "ternary", torch.float32))
    layer[table][5, 1] = value
    name = ("scale", "zero")[table - 1]
    with pytest.raises(PackError, match=f"a.b.weight: the {name} table holds a value that is not finite"):
        READERS[reader](tmp_path, *layer).weight()


def coded(codes: np.ndarray, scale: torch.Tensor, zero: torch.Tensor, bits: int, key: str = "part") -> CodedTensor:
    """An entry over arrays in memory."""
    stored = torch.from_numpy(codes.astype(np.uint8))
    group = codes.shape[1] // scale.shape[1]
    return CodedTensor(
        Path("file"), key, codes.shape, bits, group, lambda: (scale, zero), lambda lo, hi: stored[lo:hi].clone()
    )


@pytest.mark.parametrize(
    ("kinds", "scheme"),
    [
        (("ternary", "ternary", "ternary"), "ternary"),
        (("binary", "binary", "binary"), "binary"),
        (("binary", "ternary", "-mixed"), "ternary"),
        (("-ternary", "-binary", "upper"), "ternary"),
    ],
    ids=str,
)
def test_fused_rows_are_the_rows_of_the_parts(kinds: tuple[str, ...], scheme: str) -> None:
    """Parts of different heights, bits and conventions; tolerance 0."""
    layers = [draw((rows, 256), 128, kind, torch.float32, rows) for rows, kind in zip((5, 131, 64), kinds, strict=True)]
    fused = fuse_rows("qkv", [coded(*layer) for layer in layers])
    assert (fused.key, fused.shape) == ("qkv", (200, 256))
    weight = fused.weight()
    assert weight.scheme == scheme
    assert_exact(weight, torch.cat([evaluate(*layer[:3]) for layer in layers]))


@pytest.mark.parametrize("bits", [(1, 2), (1, 4), (2, 4), (4, 1)], ids=str)
def test_fused_affine_rows_of_mixed_bits(bits: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    layers = []
    for b in bits:
        scale, zero = (torch.from_numpy(rng.normal(size=(48, 4))).bfloat16() for _ in range(2))
        layers.append((rng.integers(0, 2**b, (48, 256)), scale, zero, b))
    weight = fuse_rows("x", [coded(*layer) for layer in layers]).weight()
    assert weight.scheme == "affine"
    assert_exact(weight, torch.cat([evaluate(*layer[:3]) for layer in layers]))


def test_fused_dense_rows() -> None:
    values = [torch.full((n, 8), float(n)) for n in (3, 2)]
    parts = [DenseTensor(Path("f"), f"p{i}", v.shape, v.dtype, lambda v=v: v) for i, v in enumerate(values)]
    fused = fuse_rows("x", parts)
    assert fused.shape == (5, 8) and torch.equal(fused.load(), torch.cat(values))


def test_parts_that_differ_are_not_fused() -> None:
    ternary = coded(*draw((8, 256), 128, "ternary", torch.float32), "q")
    with pytest.raises(PackError, match="file: k: has group size 64, but q has 128"):
        fuse_rows("qkv", [ternary, coded(*draw((8, 256), 64, "ternary", torch.float32), "k")])
    with pytest.raises(
        PackError, match=r"file: k: is stored as 2-bit codes \[8, 512\], but q as 2-bit codes \[8, 256\]"
    ):
        fuse_rows("qkv", [ternary, coded(*draw((8, 512), 128, "ternary", torch.float32), "k")])
    plain = DenseTensor(Path("file"), "k", (8, 256), torch.bfloat16, lambda: torch.zeros(8, 256))
    with pytest.raises(PackError, match=r"file: k: is stored as a dense tensor \[8, 256\], but q as 2-bit codes"):
        fuse_rows("qkv", [ternary, plain])


def levels(
    shape: tuple[int, int], group: int, dtype: torch.dtype, pick: Callable[[np.random.Generator, tuple], np.ndarray]
) -> torch.Tensor:
    """A dense weight whose groups hold what `pick(rng, groups)` [.., 1] and random codes make of them."""
    rng = np.random.default_rng(group)
    groups = pick(rng, (shape[0], shape[1] // group, group))
    return torch.from_numpy(groups.reshape(shape)).to(dtype)


def magnitude(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """[N, K / g, 1] of multiples of 1/16 between 1/16 and 8, exact in every dtype; one group is zero."""
    sizes = rng.integers(1, 129, (*shape[:2], 1)) / 16
    sizes[0, 0] = 0
    return sizes


LEVELS = {
    "binary": lambda rng, s: magnitude(rng, s) * rng.choice([-1, 1], s),
    "ternary": lambda rng, s: magnitude(rng, s) * rng.choice([-1, 0, 1], s),
    "two levels": lambda rng, s: 3 + magnitude(rng, s) * rng.choice([-0.5, 1], s),
    "three levels": lambda rng, s: 5 + magnitude(rng, s) * rng.choice([-0.5, 0, 0.5], s),
}
EXPECTED = {
    "binary": ("binary", "bit"),
    "ternary": ("ternary", "trit5"),
    "two levels": ("affine", "bit"),
    "three levels": ("affine", "crumb"),
}


def unpacked(folder: Path, weight: torch.Tensor) -> DenseTensor:
    write_safetensors(folder / "w.safetensors", {"a.weight": weight})
    (entry,) = open_pack(folder / "w.safetensors").entries.values()
    return entry


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("kind", LEVELS)
def test_levels_of_a_dense_weight_are_found(tmp_path: Path, kind: str, group: int, dtype: torch.dtype) -> None:
    """With the largest group size for which they hold, and exactly."""
    dtype_values = levels((131, 256), group, dtype, LEVELS[kind])
    weight = dense.find_levels(unpacked(tmp_path, dtype_values)).weight()
    assert (weight.scheme, weight.codec) == EXPECTED[kind]
    assert weight.group_size == group
    assert torch.equal(weight.dequantize(dtype), dtype_values)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_symmetric_levels_of_any_value_are_exact(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Scales with a full mantissa, as a trained master has them."""
    rng = np.random.default_rng(0)
    size = torch.from_numpy(rng.lognormal(-4, 1, (96, 2, 1))).to(dtype)
    signs = torch.from_numpy(rng.choice([-1, 1] if kind == "binary" else [-1, 0, 1], (96, 2, 128))).to(dtype)
    values = (size * signs).view(96, 256)
    weight = dense.find_levels(unpacked(tmp_path, values)).weight()
    assert weight.scheme == kind and weight.scale.dtype == dtype
    assert torch.equal(weight.dequantize(dtype), values)


def test_levels_that_break_behind_the_probe_are_seen(tmp_path: Path) -> None:
    values = levels((400, 256), 128, torch.bfloat16, LEVELS["ternary"])
    values[399, 255] = 77
    with pytest.raises(
        PackError, match=r"w.safetensors: a.weight: has groups of more than three levels.*Patch to BitLinear"
    ):
        dense.find_levels(unpacked(tmp_path, values))


@pytest.mark.parametrize(
    "pick",
    [
        lambda rng, s: rng.normal(size=s),
        lambda rng, s: rng.choice([-1.0, 0, 1, 2], s),
        lambda rng, s: rng.choice([-1.0, 0, 3], s),  # three levels that are not equally spaced
    ],
    ids=["normal", "four levels", "uneven levels"],
)
def test_more_levels_are_refused(tmp_path: Path, pick: Callable) -> None:
    entry = unpacked(tmp_path, levels((96, 256), 128, torch.bfloat16, pick))
    with pytest.raises(PackError, match="more than three levels, so this is no 1-bit or ternary model"):
        dense.find_levels(entry)


def test_a_zero_weight_is_binary(tmp_path: Path) -> None:
    weight = dense.find_levels(unpacked(tmp_path, torch.zeros(16, 128, dtype=torch.bfloat16))).weight()
    assert weight.scheme == "binary" and not weight.dequantize().any()


@pytest.mark.parametrize("damage", ["metadata", "orig_shape"])
def test_gemlite_tables_of_numbers_may_have_any_rank_but_not_be_short(tmp_path: Path, damage: str) -> None:
    codes, scale, zero, bits = draw((96, 256), 128, "ternary", torch.float32)
    layer = gemlite_layer(codes, scale, zero, bits)
    path = tmp_path / "state_dict.pt"
    torch.save({f"a.{leaf}": t[None] if leaf == damage else t for leaf, t in layer.items()}, path)
    (entry,) = open_pack(path).entries.values()
    assert_exact(entry.weight(), evaluate(codes, scale, zero))
    torch.save({f"a.{leaf}": t[:1] if leaf == damage else t for leaf, t in layer.items()}, path)
    with pytest.raises(PackError, match=rf"state_dict.pt: a.{damage}: has 1 values. Expected {len(layer[damage])}"):
        open_pack(path)


def test_native_parts_of_an_attention_are_refused(tmp_path: Path) -> None:
    """A native file with diffusers names ended in an AttributeError."""
    codes = torch.zeros(8, 128, dtype=torch.uint8)
    weight = PackedWeight(codes, torch.ones(32, 1).bfloat16(), (32, 128), "binary", "bit", 128)
    parts = [PackedTensor(tmp_path / "a.safetensors", name, (32, 128), lambda: weight) for name in "qkv"]
    with pytest.raises(PackError, match=r"a\.safetensors: q: is a packed tensor \[32, 128\] with a name of diffusers"):
        fuse_rows("qkv", parts)


def test_a_new_format_is_a_module_and_a_word_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ToyFile(PackFile):
        SUFFIXES = (".toy",)

    def read(file: PackFile) -> Pack:
        return Pack(file.path, "toy", {"a": DenseTensor(file.path, "a", (1,), torch.float32, lambda: torch.ones(1))})

    toy = SimpleNamespace(
        NAME="toy",
        FILE=ToyFile,
        PLACES={"transformer": ("transformer-toy/weights.toy",), "text_encoder": ()},
        claims=lambda file: file.path.read_bytes() == b"toy\0",
        read=read,
    )
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, toy))
    path = tmp_path / "transformer-toy" / "weights.toy"
    path.parent.mkdir()
    path.write_bytes(b"toy\0")
    assert formats.suffixes_of("transformer")[-1] == formats.suffixes_of("text_encoder")[-1] == ".toy"
    assert release.find_transformer(tmp_path) == path
    assert release.packs_among(["folder/transformer-toy/weights.toy"]) == ["folder"]
    for part in formats.PARTS:
        pack = open_pack(path, part)
        assert pack.format == "toy" and torch.equal(pack.entries["a"].weight(), torch.ones(1))
    path.write_bytes(b"boy\0")
    with pytest.raises(PackError, match=r"is of no known format. Expected native, mlx"):
        open_pack(path)
