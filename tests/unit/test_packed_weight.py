"""The canonical packed weight: values of every scheme, pieces, exact narrowing, refusals and sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bonsai_ops import kernels
from bonsai_ops.tools.synthetic import KLEIN_4B
from bonsai_ops.weights import codec, flux2
from bonsai_ops.weights.packed_weight import (
    DENSITIES,
    SCHEMES,
    PackedWeight,
    at_density,
    narrow_exact,
    pack_signs,
    recode,
)

RADIX = {"bit": 2, "crumb": 4, "trit5": 3, "nibble": 16, "byte": 256}
"""Of a codec; a ternary weight has codes below 3 in any."""
PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
SHAPES = [(1, 64), (7, 128), (41, 256), (83, 96), (130, 512)]
GROUPS = {64: 32, 96: 96, 128: 64, 256: 128, 512: 256}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def random_weight(
    scheme: str, name: str, shape: tuple[int, int], group: int, table_dtype: torch.dtype = torch.float32
) -> tuple[PackedWeight, np.ndarray]:
    """(a weight, its codes [N, K]); the tables are of both signs and hold a zero group."""
    generator = torch.Generator().manual_seed(shape[0])
    radix = 3 if scheme == "ternary" else RADIX[name]
    codes = torch.randint(0, radix, shape, dtype=torch.uint8, generator=generator)
    tables = [torch.randn(shape[0], shape[1] // group, generator=generator).to(table_dtype) for _ in range(2)]
    tables[0][0, 0] = 0
    zero = tables[1] if scheme in ("affine", "zero_point") else None
    return PackedWeight(codec.encode(name, codes), tables[0], shape, scheme, name, group, zero), codes.numpy()


def evaluate(weight: PackedWeight, codes: np.ndarray) -> np.ndarray:
    """The module's table, in float32 with numpy, rounding after each operation."""
    c = codes.astype(np.float32)
    s = weight.scale.float().numpy().repeat(weight.group_size, axis=1)
    if weight.scheme == "binary":
        return s * (1 - 2 * c)
    if weight.scheme == "ternary":
        return s * (1 - c)
    z = weight.zero.float().numpy().repeat(weight.group_size, axis=1)
    return c * s + z if weight.scheme == "affine" else (c - z) * s


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("table_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_values_are_the_float32_formula_rounded_once(
    scheme: str, name: str, table_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Tolerance 0."""
    weight, codes = random_weight(scheme, name, (83, 256), 64, table_dtype)
    values = weight.dequantize(dtype)
    assert values.dtype == dtype and values.shape == (83, 256)
    assert torch.equal(values, torch.from_numpy(evaluate(weight, codes)).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_values_for_any_shape_and_group(scheme: str, name: str, shape: tuple[int, int]) -> None:
    """Tolerance 0 for binary and ternary against float64, two float32 roundings (2e-7 of the terms) for the others."""
    weight, codes = random_weight(scheme, name, shape, GROUPS[shape[1]])
    s = weight.scale.double().numpy().repeat(weight.group_size, axis=1)
    values = weight.dequantize(torch.float32).double().numpy()
    if weight.zero is None:
        step = 2 if scheme == "binary" else 1
        assert np.array_equal(values, s * (1 - step * codes.astype(np.float64)))
    else:
        z = weight.zero.double().numpy().repeat(weight.group_size, axis=1)
        exact = codes * s + z if scheme == "affine" else (codes - z) * s
        size = codes * abs(s) + abs(z) + (abs(z) * abs(s) if scheme == "zero_point" else 0)
        assert (abs(values - exact) <= 2e-7 * size).all()


@pytest.mark.parametrize("scratch", [1, 24 << 20])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 39, 40, 41, 63, 65, 129, 321])
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_pieces_cover_every_row_once(scheme: str, name: str, rows: int, scratch: int) -> None:
    weight, codes = random_weight(scheme, name, (rows, 64), 32)
    expected, seen = torch.from_numpy(evaluate(weight, codes)), []
    for first, last, values in weight.pieces(torch.float32, scratch):
        assert first < last <= rows and values.shape == (last - first, 64)
        assert torch.equal(values, expected[first:last])
        seen.extend(range(first, last))
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("scratch", [2 << 20, 8 << 20])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_pieces_stay_below_their_scratch(scheme: str, name: str, dtype: torch.dtype, scratch: int) -> None:
    """A piece with its int16 codes and its float32 values at once."""
    weight, _ = random_weight(scheme, name, (4000, 512), 128)
    longest = max(last - first for first, last, _ in weight.pieces(dtype, scratch))
    assert longest * 512 * (4 + 4 + dtype.itemsize) <= scratch
    assert longest * 512 * 24 >= scratch / 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_selected_rows_are_the_rows(scheme: str, name: str, dtype: torch.dtype) -> None:
    weight, _ = random_weight(scheme, name, (83, 128), 64)
    index = torch.tensor([82, 0, 17, 17, 40, 41])
    assert torch.equal(weight.select_rows(index, dtype), weight.dequantize(dtype)[index])


def test_moving_keeps_everything() -> None:
    weight, _ = random_weight("affine", "crumb", (9, 64), 32)
    moved = weight.to("meta")
    assert {moved.codes.device.type, moved.scale.device.type, moved.zero.device.type} == {"meta"}
    assert (moved.shape, moved.scheme, moved.codec, moved.group_size) == ((9, 64), "affine", "crumb", 32)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.0, -0.5, 3.0], torch.bfloat16),
        ([0.0, -0.0], torch.bfloat16),
        ([3.0e38, -1.0e-38 * 0], torch.float32),
        ([2.0**127, 2.0**-126], torch.bfloat16),
        ([2.0**-133], torch.bfloat16),  # smallest bf16 subnormal
        ([1 + 2.0**-10, 2.0**-24], torch.float16),  # ten mantissa bits; smallest fp16 subnormal
        ([1 + 2.0**-10, 65504.0], torch.float16),
        ([1 + 2.0**-10, 65536.0], torch.float32),  # beyond fp16
        ([1 + 2.0**-10, 2.0**-25], torch.float32),  # below fp16
        ([1 + 2.0**-23], torch.float32),
        ([0.1], torch.float32),
        ([], torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_narrowest_exact_dtype(values: list[float], dtype: torch.dtype, given: torch.dtype) -> None:
    table = torch.tensor(values, dtype=torch.float32).to(given)
    narrow = narrow_exact(table)
    assert narrow.dtype == dtype
    assert torch.equal(narrow.double(), table.double())
    assert torch.equal(narrow.signbit(), table.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_table_keeps_its_dtype_or_becomes_bf16(dtype: torch.dtype) -> None:
    assert narrow_exact(torch.tensor([0.5, -3.0], dtype=dtype)).dtype == torch.bfloat16
    table = torch.tensor([0.1], dtype=dtype)
    assert narrow_exact(table).dtype == dtype and torch.equal(narrow_exact(table), table)


def test_a_transposed_table_becomes_contiguous() -> None:
    assert narrow_exact(torch.ones(4, 3).t()).is_contiguous()


@pytest.mark.parametrize("scheme", ["binary", "ternary"])
def test_pack_signs(scheme: str) -> None:
    codes = torch.randint(0, 2 if scheme == "binary" else 3, (45, 128), dtype=torch.uint8)
    scale = torch.rand(45, 2).bfloat16().float()
    weight = pack_signs(codes, scale, 64, scheme)
    assert (weight.codec, weight.scale.dtype, weight.zero) == (SCHEMES[scheme].codecs[0], torch.bfloat16, None)
    assert np.array_equal(weight.dequantize().numpy(), evaluate(weight, codes.numpy()))


def parts(**changed: object) -> dict:
    return {
        "codes": torch.zeros(8, 64, dtype=torch.uint8),
        "scale": torch.ones(9, 2),
        "shape": (9, 64),
        "scheme": "ternary",
        "codec": "trit5",
        "group_size": 32,
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codec": "bit"}, "scheme 'ternary' with codec 'bit' is not a packed weight"),
        ({"scheme": "ternery"}, "scheme 'ternery' with codec 'trit5'"),
        ({"group_size": 16}, "group size 16 does not fit 64 columns: expected a multiple of 32"),
        ({"group_size": 128}, "group size 128 does not fit 64 columns"),
        ({"group_size": 0}, "group size 0 does not fit 64 columns"),
        ({"group_size": -32}, "group size -32 does not fit 64 columns"),
        ({"codes": torch.zeros(16, 64, dtype=torch.uint8)}, r"codes are torch.uint8 \(16, 64\), expected .* \(8, 64\)"),
        ({"codes": torch.zeros(8, 64, dtype=torch.int8)}, r"codes are torch.int8 \(8, 64\), expected torch.uint8"),
        ({"scale": torch.ones(9, 1)}, r"scale is torch.float32 \(9, 1\), expected .* \(9, 2\)"),
        ({"scale": torch.ones(9, 2, dtype=torch.float64)}, "scale is torch.float64 .* expected bf16, fp16 or fp32"),
        ({"scale": torch.ones(9, 2, dtype=torch.int32)}, "scale is torch.int32"),
        ({"zero": torch.ones(9, 2)}, "scheme ternary has no zero table"),
        ({"scheme": "affine", "codec": "bit"}, "scheme affine needs a zero table"),
        ({"scheme": "affine", "codec": "bit", "zero": torch.ones(2, 9)}, r"zero is .* \(2, 9\), expected .* \(9, 2\)"),
        ({"scheme": "affine", "codec": "bit", "zero": torch.ones(9, 2).double()}, "zero is torch.float64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict, message: str) -> None:
    PackedWeight(**parts())
    with pytest.raises(ValueError, match=message):
        PackedWeight(**parts(**changed))


@pytest.mark.parametrize(
    ("scheme", "name", "nbytes", "bits"),
    [
        # byte rows x 3072 columns of codes, and 3072 x 24 bf16 scales (147,456 B), twice with a zero table
        ("binary", "bit", 384 * 3072 + 147_456, 1.125),
        ("ternary", "trit5", 616 * 3072 + 147_456, 1.7292),
        ("affine", "bit", 384 * 3072 + 2 * 147_456, 1.25),
        ("affine", "crumb", 768 * 3072 + 2 * 147_456, 2.25),
        ("affine", "nibble", 1536 * 3072 + 2 * 147_456, 4.25),
        ("affine", "byte", 3072 * 3072 + 2 * 147_456, 8.25),
        ("zero_point", "nibble", 1536 * 3072 + 2 * 147_456, 4.25),
    ],
)
def test_size_of_an_attention_layer(scheme: str, name: str, nbytes: int, bits: float) -> None:
    """bits a weight: within 5e-5."""
    codes = torch.empty(codec.get_codec(name).byte_rows(3072), 3072, dtype=torch.uint8, device="meta")
    table = torch.empty(3072, 24, dtype=torch.bfloat16, device="meta")
    zero = table if scheme in ("affine", "zero_point") else None
    weight = PackedWeight(codes, table, (3072, 3072), scheme, name, 128, zero)
    assert weight.nbytes == nbytes
    assert 8 * weight.nbytes / 3072**2 == pytest.approx(bits, abs=5e-5)


def test_size_of_the_whole_ternary_model() -> None:
    """Codes 737,280,000 B and bf16 scales 57,507,840 B: 794.8 MB; 1.185 GB with 195,042,816 dense bf16 weights."""
    shapes = flux2.expected_shapes(KLEIN_4B)
    packed = [shape for name, shape in shapes.items() if flux2.is_block_linear(name)]
    codes = sum(codec.get_codec("trit5").nbytes(*shape) for shape in packed)
    scales = sum(2 * rows * columns // 128 for rows, columns in packed)
    assert (codes, scales, codes + scales) == (737_280_000, 57_507_840, 794_787_840)
    dense = sum(2 * int(np.prod(shape)) for name, shape in shapes.items() if not flux2.is_block_linear(name))
    assert dense == 390_085_632
    assert round((codes + scales + dense) / 1e9, 3) == 1.185


@pytest.mark.parametrize("rows", [1, 39, 130, 1000])
def test_layouts_hold_the_same_codes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back, in many small steps: the same bytes."""
    monkeypatch.setattr(codec, "SCRATCH_BYTES", 6 * 5 * 256 * 8)
    weight, _ = random_weight("ternary", "trit5", (rows, 256), 64)
    fast = at_density(weight, "fast")
    assert (fast.codec, fast.scheme, fast.shape) == (DENSITIES["fast"], "ternary", weight.shape)
    assert torch.equal(fast.codes, codec.encode("crumb", codec.decode("trit5", weight.codes, rows)))
    assert torch.equal(fast.dequantize(), weight.dequantize())
    assert torch.equal(at_density(fast, "compact").codes, weight.codes)
    assert at_density(weight, "compact") is weight


def test_what_cannot_be_recoded_is_refused() -> None:
    binary, _ = random_weight("binary", "bit", (41, 256), 64)
    assert at_density(binary, "fast") is binary
    with pytest.raises(ValueError, match="scheme 'binary' with codec 'crumb'"):
        recode(binary, "crumb")
    fourth = PackedWeight(
        torch.full((8, 64), 255, dtype=torch.uint8), torch.ones(8, 1), (8, 64), "ternary", "crumb", 64
    )
    with pytest.raises(ValueError, match=r"code 3 in rows 0\.\.7 does not fit codec trit5"):
        recode(fourth, "trit5")


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_low_rank_residual(scheme: str) -> None:
    """up down is added by every way to the values: dequantize, pieces, rows and the product with its gradient."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (40, 64), generator=generator, dtype=torch.uint8)
    plain = pack_signs(codes, torch.rand(40, 2, generator=generator), 32, scheme)
    up, down = torch.randn(40, 3, generator=generator), torch.randn(3, 64, generator=generator)
    weight = dataclasses.replace(plain, up=up.bfloat16(), down=down.bfloat16())
    truth = plain.dequantize() + up.bfloat16().float() @ down.bfloat16().float()
    torch.testing.assert_close(weight.dequantize(), truth)
    torch.testing.assert_close(weight.dequantize(torch.bfloat16), truth.bfloat16())
    torch.testing.assert_close(weight.select_rows(torch.tensor([3, 39])), truth[[3, 39]])
    assert weight.nbytes == plain.nbytes + 2 * 3 * (40 + 64) and (weight.rank, plain.rank) == (3, 0)
    assert weight.to("cpu").up is not None
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    y = kernels.linear(x, weight, torch.ones(40))
    torch.testing.assert_close(y, x @ truth.T + 1, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, truth.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    for wrong in ({"up": None}, {"up": up[:3]}, {"down": down[:, :9]}, {"down": down[:2]}):
        with pytest.raises(ValueError, match="residual is "):
            dataclasses.replace(weight, **wrong)
