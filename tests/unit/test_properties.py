"""What holds for weights and files of any kind: hypothesis looks for one that it does not hold for.

The examples are the same in every run, those of `python -m tests.fuzz` are not.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_weights import bits, truth

from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import native, open_pack
from bonsai_ops.weights.formats.native_record import RECORD
from bonsai_ops.weights.packed_weight import DENSITIES, SCHEMES, TABLE_DTYPES, PackedWeight, at_density, narrow_exact

FORMS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
some = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | (st.dictionaries(texts, inner)),
    max_leaves=12,
)


def drawn_codes(radix: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, radix, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", codecs.CODECS)
@some
@given(rows=st.integers(1, 90), columns=st.integers(1, 70), seed=seeds, data=st.data())
def test_codes_come_back(name: str, rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    """Whole, a plane, chosen rows; the bytes are those that the codec makes, padding is code 0."""
    codec = codecs.get_codec(name)
    codes = drawn_codes(codec.radix, rows, columns, seed)
    packed = codecs.encode(name, codes)
    assert packed.shape == (codec.byte_rows(rows), columns) and packed.nbytes == codec.nbytes(rows, columns)
    assert torch.equal(codecs.decode(name, packed, rows), codes)
    assert codecs.holds(name, codec.radix, packed)
    padded = torch.cat([codecs.decode_plane(name, packed, plane) for plane in range(codec.fields)])
    assert torch.equal(padded[:rows], codes) and not padded[rows:].any()
    index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(codecs.decode_selected(name, packed, rows, index), codes[index])


@pytest.mark.parametrize("bits_each", [1, 2, 4])
@some
@given(rows=st.integers(1, 20), count=st.integers(1, 40), seed=seeds)
def test_fields_of_a_byte(bits_each: int, rows: int, count: int, seed: int) -> None:
    fields = 8 // bits_each
    codes = drawn_codes(2**bits_each, rows, count * fields, seed).long()
    shifts = torch.arange(fields) * bits_each
    packed = (codes.unflatten(1, (count, fields)) << shifts).sum(-1).to(torch.uint8)
    assert torch.equal(codecs.spread_fields(packed, bits_each), codes.to(torch.uint8))


@st.composite
def weights(draw: st.DrawFn) -> PackedWeight:
    """Any form, group size and dtype of tables; values of tables from zero to the largest, signs included."""
    scheme, codec = draw(st.sampled_from(FORMS))
    rows, group = draw(st.integers(1, 70)), draw(st.sampled_from([32, 64, 96, 128]))
    columns = group * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(seeds))
    levels = SCHEMES[scheme].levels or codecs.get_codec(codec).radix
    codes = torch.randint(0, levels, (rows, columns), dtype=torch.uint8, generator=generator)

    def table(*shape: int) -> torch.Tensor:
        size = draw(st.sampled_from([0.0, 2.0**-20, 1.0, 1000.0]))
        return (torch.randn(*shape, generator=generator) * size).to(draw(st.sampled_from(TABLE_DTYPES)))

    grid = (rows, columns // group)
    zero = table(*grid) if SCHEMES[scheme].has_zero else None
    rank = draw(st.sampled_from([0, 0, 1, 3]))
    residual = (table(rows, rank), table(rank, columns)) if rank else (None, None)
    packed = codecs.encode(codec, codes)
    return PackedWeight(packed, table(*grid), (rows, columns), scheme, codec, group, zero, *residual)


@some
@given(weight=weights(), dtype=st.sampled_from(TABLE_DTYPES), data=st.data())
def test_values_are_those_of_the_formula(weight: PackedWeight, dtype: torch.dtype, data: st.DataObject) -> None:
    """All, in pieces of any size and row by row, to the bit; without a residual those of float64, rounded once."""
    values = weight.dequantize(dtype)
    room = data.draw(st.integers(1, 1 << 16))
    pieces = torch.cat([piece.clone() for *_, piece in weight.pieces(dtype, room)])
    alone = weight.without_residual()
    if weight.rank:  # its product is cut otherwise by the number of rows
        torch.testing.assert_close(pieces, values, rtol=1e-2, atol=1e-2 * float(values.abs().max()))
    else:
        assert torch.equal(bits(pieces), bits(values))
        index = torch.tensor(data.draw(st.lists(st.integers(0, weight.shape[0] - 1), max_size=5)), dtype=torch.int64)
        assert torch.equal(bits(weight.select_rows(index, dtype)), bits(values[index]))
    if weight.scheme in ("binary", "ternary"):
        assert torch.equal(alone.dequantize(dtype).double(), truth(alone, dtype).to(dtype).double())
    else:
        expected = truth(alone, torch.float32)
        close = 2 * torch.finfo(torch.float32).eps * _largest_term(alone)
        assert ((alone.dequantize(torch.float32).double() - expected).abs() <= close).all()


def _largest_term(weight: PackedWeight) -> torch.Tensor:
    scale, zero = (
        table.double().abs().repeat_interleave(weight.group_size, 1) for table in (weight.scale, weight.zero)
    )
    highest = codecs.get_codec(weight.codec).radix
    return highest * scale + zero if weight.scheme == "affine" else (highest + zero) * scale


@some
@given(weight=weights().filter(lambda weight: weight.scheme == "ternary"))
def test_densities_hold_the_same(weight: PackedWeight) -> None:
    for first in DENSITIES:
        for second in DENSITIES:
            there = at_density(at_density(weight, first), second)
            assert there.codec == DENSITIES[second] and torch.equal(bits(there.dequantize()), bits(weight.dequantize()))


@some
@given(seed=seeds, size=st.sampled_from([0.0, 1e-30, 1.0, 1e30]), dtype=st.sampled_from([*TABLE_DTYPES, torch.float64]))
def test_a_narrow_table_is_the_same(seed: int, size: float, dtype: torch.dtype) -> None:
    table = (torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    narrow = narrow_exact(table)
    assert narrow.dtype in TABLE_DTYPES
    expected = table.float() if dtype == torch.float64 else table
    assert torch.equal(narrow.to(expected.dtype), expected)


layers = st.from_regex(r"[a-z]{1,8}(\.[a-z0-9]{1,6}){0,3}\.weight", fullmatch=True)


@some
@given(
    packed=st.dictionaries(layers, weights(), min_size=1, max_size=3),
    foreign=st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), trees),
)
def test_a_native_file_is_read_as_it_was_written(packed: dict[str, PackedWeight], foreign: dict[str, object]) -> None:
    """Codes, tables and residuals to the bit; what others put beside our record changes nothing."""
    record = native.make_record(packed, {"file": "x"})
    foreign = {key: json.dumps(value) for key, value in foreign.items() if key and key != RECORD}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        native.write(path, packed, record, extra=foreign)
        pack = open_pack(path)
        found = {name: entry.weight() for name, entry in pack.entries.items()}
        assert pack.format == "native" and found.keys() == packed.keys()
        for name, weight in packed.items():
            again = found[name]
            assert isinstance(again, PackedWeight) and again.shape == weight.shape
            assert (again.scheme, again.codec, again.group_size) == (weight.scheme, weight.codec, weight.group_size)
            assert torch.equal(again.codes, weight.codes) and again.tables().keys() == weight.tables().keys()
            assert all(torch.equal(again.tables()[key], table) for key, table in weight.tables().items())


dtypes = st.sampled_from(["U8", "U32", "F16", "BF16", "F32", "F64", "I8", "BOOL", "F8_E4M3", "X"])
sizes = st.integers(-1, 200) | st.integers(1 << 31, 1 << 70)
tensor_names = st.sampled_from(
    ["a.weight", "a.weight_scale", "a.weight_zero", "a.scales", "a.biases", "a.W_q", "a.metadata", "bonsai.record"]
)
described = st.fixed_dictionaries(
    {"dtype": dtypes, "shape": st.lists(sizes, max_size=3), "data_offsets": st.lists(sizes, max_size=3)}
)
headers = st.dictionaries(tensor_names | texts, described | trees, max_size=6).map(
    lambda tree: json.dumps(tree).encode()
)
records = st.builds(
    lambda layers: json.dumps({"__metadata__": {"bonsai": json.dumps({"version": 2, "layers": layers})}}).encode(),
    trees,
)
safetensors = st.builds(
    lambda header, data, more: (len(header) + more).to_bytes(8, "little") + header + data,
    headers | records,
    st.binary(max_size=300),
    st.sampled_from([0, 0, 0, 1]),
)
gguf = st.builds(
    lambda version, tensors, pairs, rest: (
        b"GGUF"
        + b"".join(number.to_bytes(size, "little") for number, size in ((version, 4), (tensors, 8), (pairs, 8)))
        + rest
    ),
    st.sampled_from([3, 2, 0]),
    st.integers(0, 3) | st.integers(0, 2**64 - 1),
    st.integers(0, 3) | st.integers(0, 2**64 - 1),
    st.binary(max_size=200),
)


@pytest.mark.parametrize(
    ("suffix", "shaped"), [(".safetensors", safetensors), (".gguf", gguf), (".pt", st.just(b"PK\3\4"))]
)
@some
@given(data=st.data())
def test_any_bytes_are_read_or_refused(suffix: str, shaped: st.SearchStrategy[bytes], data: st.DataObject) -> None:
    """By our error and no other."""
    raw = data.draw(shaped | st.binary(max_size=300) | st.builds(bytes.__add__, shaped, st.binary(max_size=300)))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(PackError):
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(raw)
        for part in ("transformer", "text_encoder"):
            with contextlib.suppress(PackError):
                for entry in open_pack(path, part).entries.values():
                    entry.weight()
