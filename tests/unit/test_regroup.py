"""Fields along K become the bytes of a codec, as through a byte for each code, and the file does not stay mapped."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import codec, flux2, regroup
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats.entries import CodedTensor, fuse_rows
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

CASES = {"bit": (1, 2), "crumb": (2, 4), "nibble": (4, 16), "trit5": (2, 3)}
"""codec: (bits a field, code values)"""
SHAPES = ((1, 32), (7, 64), (39, 32), (40, 96), (41, 32), (64, 32), (129, 160), (1000, 224))


def fields_of(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Fields least significant first, by numpy alone."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(each.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little"))


def regrouped(name: str, codes: np.ndarray) -> torch.Tensor:
    bits, _ = CASES[name]
    fields = fields_of(codes, bits)
    return regroup.regroup_rows(name, *codes.shape, lambda lo, hi: fields[lo:hi], bits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [regroup.PIECE_BYTES, 1])
def test_bytes_are_those_of_the_codec(
    name: str, shape: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regroup, "PIECE_BYTES", piece)
    codes = np.random.default_rng(sum(shape)).integers(0, CASES[name][1], shape, dtype=np.uint8)
    assert torch.equal(regrouped(name, codes), codec.encode(name, torch.from_numpy(codes)))


@pytest.mark.parametrize("name", CASES)
def test_a_row_that_lies_in_memory_like_a_column(name: str) -> None:
    """torch calls it contiguous, whatever its stride says."""
    codes = np.random.default_rng(0).integers(0, CASES[name][1], (1, 64), dtype=np.uint8)
    fields = fields_of(codes, CASES[name][0]).t().contiguous().t()
    found = regroup.regroup_rows(name, 1, 64, lambda lo, hi: fields[lo:hi], CASES[name][0])
    assert torch.equal(found, codec.encode(name, torch.from_numpy(codes)))


@pytest.mark.parametrize("name", CASES)
def test_every_combination_of_codes(name: str) -> None:
    """All 243 values of a trit5 byte, and all 256 of the others, at each of the places of a field in its byte."""
    planes, values = codec.get_codec(name).fields, CASES[name][1]
    each = np.array(list(itertools.product(range(values), repeat=planes)), dtype=np.uint8).T
    row = np.concatenate([np.roll(each, shift, axis=1) for shift in range(4)], axis=1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % 32)))
    codes = np.repeat(row, 8, axis=0)
    assert torch.equal(regrouped(name, codes), codec.encode(name, torch.from_numpy(codes)))


def test_refusals() -> None:
    for name, shape, bits in (("trit5", (8, 32), 1), ("byte", (8, 32), 4), ("bit", (8, 40), 1), ("bit", (0, 32), 1)):
        with pytest.raises(ValueError, match=f"do not become codec {name}"):
            regroup.regroup_rows(name, *shape, lambda lo, hi: torch.zeros(hi - lo, 4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=r"fields of rows 0\.\.7 are torch.uint8 \(8, 8\), expected"):
        regroup.regroup_rows("bit", 8, 32, lambda lo, hi: torch.zeros(hi - lo, 8, dtype=torch.uint8), 1)


def coded(codes: np.ndarray, bits: int, scale: torch.Tensor, zero: torch.Tensor, quick: bool) -> CodedTensor:
    fields = fields_of(codes, bits)
    return CodedTensor(
        Path("model.safetensors"),
        "layer.weight",
        codes.shape,
        bits,
        32,
        lambda: (scale, zero),
        lambda lo, hi: codec.spread_fields(fields[lo:hi], bits),
        fields=(lambda lo, hi: fields[lo:hi]) if quick else None,
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("zero", ["signs", "negative", "double", "one off", "any"])
def test_entries_become_the_same_weight(bits: int, zero: str) -> None:
    """With tables of every kind, alone and as rows of another weight; of those that are plain no code is read alone."""
    generator = torch.Generator().manual_seed(bits)
    shape = (41, 96)
    codes = np.random.default_rng(bits).integers(0, 3 if bits == 2 else 2**bits, shape, dtype=np.uint8)
    scale = torch.rand(41, 3, generator=generator) + 0.5
    tables = {"signs": -scale / 2 if bits == 1 else -scale, "double": -2 * scale, "any": torch.randn(41, 3)}
    if zero == "negative":
        scale[3, 1] = -scale[3, 1]
        tables[zero] = -scale / 2 if bits == 1 else -scale
    if zero == "one off":
        tables[zero] = tables["signs"].clone()
        tables[zero][40, 2] = torch.nextafter(tables[zero][40, 2], torch.tensor(1.0))
    quick, slow = (coded(codes, bits, scale, tables[zero], quick) for quick in (True, False))
    for found, wanted in ((quick, slow), (fuse_rows("all", [quick] * 3), fuse_rows("all", [slow] * 3))):
        one, other = found.weight(), wanted.weight()
        assert (one.scheme, one.codec, one.shape) == (other.scheme, other.codec, other.shape)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)
        assert (one.zero is None) == (other.zero is None)
        assert one.zero is None or torch.equal(one.zero, other.zero)


def test_a_fourth_level_is_found_where_it_is() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (41, 96), dtype=np.uint8)
    codes[40, 95] = 3
    scale = torch.ones(41, 3)
    with pytest.raises(PackError, match="row 40, column 95 has code 3, a fourth level"):
        coded(codes, 2, scale, -scale, True).weight()
    weight = coded(codes, 2, scale, -2 * scale, True).weight()
    assert (weight.scheme, weight.codec) == ("affine", "crumb")
    assert float(weight.dequantize(torch.float32)[40, 95]) == 1.0


def test_parts_of_other_bits_are_widened() -> None:
    """2-bit and 4-bit rows of one weight: no field of the former is twice as wide."""
    rng, scale = np.random.default_rng(0), torch.rand(8, 1) + 0.5
    few, many = (rng.integers(0, top, (8, 32), dtype=np.uint8) for top in (4, 16))
    parts = [coded(few, 2, scale, scale, True), coded(many, 4, scale, scale, True)]
    found = fuse_rows("both", parts).weight().dequantize(torch.float64)
    wanted = np.concatenate([few, many]) * scale.double().repeat(2, 1).numpy() + scale.double().repeat(2, 1).numpy()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux says what is mapped")
@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_codes_that_were_repacked_are_not_in_memory_twice(variant: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    geometry = flux2.Geometry(hidden=1024, context=768, in_channels=128, double_blocks=1, single_blocks=4)
    synthetic.write_mlx(file, variant, geometry)
    weights = read_weights(open_transformer(file))
    mapped, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1]) * 1024
    packed = [w for w in weights.values() if isinstance(w, PackedWeight)]
    stored = sum(w.shape[0] * w.shape[1] for w in packed) * synthetic.BITS[variant] // 8
    assert mapped < file.stat().st_size - stored + (1 << 20)
