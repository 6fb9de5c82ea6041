"""Codes <-> bytes: layout, exact round trips, bounded memory and refusals of every codec."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bonsai_ops.weights import codec

REPOSITORY = Path(__file__).resolve().parents[2]
RADIX = {"bit": 2, "crumb": 4, "trit5": 3, "nibble": 16, "byte": 256}
FIELDS = {"bit": 8, "crumb": 4, "trit5": 5, "nibble": 2, "byte": 1}
ROWS = (*range(1, 131, 13), 39, 40, 41, 64, 65, 127, 129, 3072)
COLUMNS = (32, 64, 96, 128, 4096)


def random_codes(name: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, RADIX[name], (rows, columns), dtype=torch.uint8, generator=generator)


def encode_literally(name: str, codes: np.ndarray) -> np.ndarray:
    """The module's formula with Python integers: B = ceil(256 v / r^P), byte rows padded with code 0."""
    radix, fields = RADIX[name], FIELDS[name]
    rows, columns = codes.shape
    n = 8 * math.ceil(rows / (8 * fields))
    padded = np.zeros((fields * n, columns), dtype=object)
    padded[:rows] = codes.astype(object)
    value = sum(padded[p * n : (p + 1) * n] * radix ** (fields - 1 - p) for p in range(fields))
    return (-((-256 * value) // radix**fields)).astype(np.uint8)


@pytest.mark.parametrize("name", RADIX)
def test_known_codecs(name: str) -> None:
    found = codec.get_codec(name)
    assert (found.name, found.radix, found.fields) == (name, RADIX[name], FIELDS[name])


@pytest.mark.parametrize("name", RADIX)
def test_every_byte_value_decodes_to_codes_below_the_radix(name: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    codes = codec.decode(name, packed, 8 * FIELDS[name])
    assert codes.shape == (8 * FIELDS[name], 256)
    assert int(codes.max()) == RADIX[name] - 1


@pytest.mark.parametrize("name", RADIX)
def test_every_combination_of_codes_round_trips(name: str) -> None:
    """All r^P values of a byte: 243 for trit5, 256 for the others, each with its own byte."""
    radix, fields = RADIX[name], FIELDS[name]
    values = np.arange(radix**fields)
    digits = np.stack([values // radix ** (fields - 1 - p) % radix for p in range(fields)])
    codes = torch.from_numpy(digits.repeat(8, axis=0).astype(np.uint8))
    packed = codec.encode(name, codes)
    assert packed.shape == (8, len(values))
    assert len(set(packed[0].tolist())) == len(values)
    assert torch.equal(codec.decode(name, packed, 8 * fields), codes)


# name: codes of rows i, n + i, .. at one column -> the byte, worked out by hand
GOLDEN = [
    ("bit", (1, 0, 0, 0, 0, 0, 0, 0), 0x80),
    ("bit", (0, 1, 0, 0, 0, 0, 0, 1), 0x41),
    ("crumb", (3, 0, 0, 0), 0xC0),
    ("crumb", (0, 1, 2, 3), 0x1B),
    ("nibble", (10, 5), 0xA5),
    ("byte", (0xA5,), 0xA5),
    ("trit5", (0, 0, 0, 0, 0), 0),
    ("trit5", (0, 0, 0, 0, 1), 2),  # ceil(256 / 243)
    ("trit5", (1, 0, 0, 0, 0), 86),  # ceil(256 * 81 / 243)
    ("trit5", (1, 1, 1, 1, 1), 128),  # ceil(256 * 121 / 243)
    ("trit5", (2, 1, 0, 2, 1), 207),  # ceil(256 * 196 / 243)
    ("trit5", (2, 2, 2, 2, 2), 255),  # ceil(256 * 242 / 243)
]


@pytest.mark.parametrize(("name", "digits", "byte"), GOLDEN)
def test_one_byte_is_the_documented_one(name: str, digits: tuple[int, ...], byte: int) -> None:
    fields = len(digits)
    codes = torch.zeros(8 * fields, 32, dtype=torch.uint8)
    for plane, digit in enumerate(digits):
        codes[8 * plane + 5, 17] = digit
    packed = codec.encode(name, codes)
    assert packed.shape == (8, 32)
    assert int(packed[5, 17]) == byte
    assert int(packed.count_nonzero()) == (byte != 0)


@pytest.mark.parametrize(("name", "radix"), [*RADIX.items(), ("crumb", 3)])
def test_holds_knows_every_byte_of_a_codec(name: str, radix: int) -> None:
    """All 256, each alone at either end of several pieces; good are those that decode and encode give again."""
    for byte in range(256):
        packed = torch.full((8, 32), byte, dtype=torch.uint8)
        codes = codec.decode(name, packed, 8 * FIELDS[name])
        good = int(codes.max()) < radix and torch.equal(codec.encode(name, codes), packed)
        for place in (0, -1):
            many = torch.zeros(3, codec.CHECKED_BYTES, dtype=torch.uint8)
            many[place, place] = byte
            assert codec.holds(name, radix, many) == good, byte


@pytest.mark.parametrize(
    ("name", "byte_rows", "digest"),
    [
        ("bit", 16, "1c02fda667982cccb7b7e517234a9144a6099a21cd34ace95e9bf6ce5de3e9d5"),
        ("crumb", 24, "c2ff51de23b7d922c4cf89b6ec348d1029ebd97965ca08e9a9c3326df0b6ab45"),
        ("trit5", 24, "9663d7b94581fbf60f10402e7fddb0c73a78a7bd5a5b5cf6aa47db9ba30428f7"),
        ("nibble", 48, "bf97e04e76ab0e7d7d7ea1bde54dc8b61761d64c3f2e6ec0ddd5ef572e117339"),
        ("byte", 88, "866078dd2ea06d80ed6f1866bcf139e19e05cc7a4263b7fba6ef8b982266ced5"),
    ],
)
def test_bytes_of_the_native_format_never_change(name: str, byte_rows: int, digest: str) -> None:
    """sha256 of the bytes of codes[n, k] = (7 n + 5 k + n k) mod r, [83, 96]: files that exist must stay readable."""
    n, k = np.meshgrid(np.arange(83), np.arange(96), indexing="ij")
    codes = ((7 * n + 5 * k + n * k) % RADIX[name]).astype(np.uint8)
    packed = codec.encode(name, torch.from_numpy(codes))
    assert packed.dtype == torch.uint8 and packed.shape == (byte_rows, 96)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", RADIX)
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (40, 33), (41, 64), (200, 32), (321, 40)], ids=str)
def test_bytes_follow_the_formula(name: str, shape: tuple[int, int]) -> None:
    codes = random_codes(name, *shape)
    assert np.array_equal(codec.encode(name, codes).numpy(), encode_literally(name, codes.numpy()))


@pytest.mark.parametrize("name", RADIX)
@pytest.mark.parametrize("rows", ROWS)
def test_round_trip_of_any_number_of_rows(name: str, rows: int) -> None:
    codes = random_codes(name, rows, 64, rows)
    packed = codec.encode(name, codes)
    n = 8 * math.ceil(rows / (8 * FIELDS[name]))
    assert packed.shape == (n, 64) and packed.nbytes == codec.get_codec(name).nbytes(rows, 64)
    assert torch.equal(codec.decode(name, packed, rows), codes)
    padding = codec.decode(name, packed, n * FIELDS[name])[rows:]
    assert not padding.any()


@pytest.mark.parametrize("name", RADIX)
@pytest.mark.parametrize("columns", COLUMNS)
def test_round_trip_of_any_number_of_columns(name: str, columns: int) -> None:
    codes = random_codes(name, 83, columns, columns)
    assert torch.equal(codec.decode(name, codec.encode(name, codes), 83), codes)


@pytest.mark.parametrize("name", RADIX)
def test_several_steps_give_the_bytes_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(name, 1001, 96)
    packed = codec.encode(name, codes)
    monkeypatch.setattr(codec, "SCRATCH_BYTES", 1)
    longest = 0

    def read(lo: int, hi: int) -> torch.Tensor:
        nonlocal longest
        longest = max(longest, hi - lo)
        return codes[lo:hi]

    assert torch.equal(codec.encode_rows(name, 1001, 96, read), packed)
    assert longest == 8 == codec.step_rows(codec.get_codec(name), 96)
    assert torch.equal(codec.decode(name, packed, 1001), codes)


@pytest.mark.parametrize("name", RADIX)
def test_rows_are_read_once_each(name: str) -> None:
    codes, seen = random_codes(name, 83, 32), []

    def read(lo: int, hi: int) -> torch.Tensor:
        seen.extend(range(lo, hi))
        return codes[lo:hi]

    codec.encode_rows(name, 83, 32, read)
    assert sorted(seen) == list(range(83))


@pytest.mark.parametrize("name", RADIX)
def test_planes_are_the_rows_of_the_weight(name: str) -> None:
    """Plane p of byte rows lo .. hi-1 holds rows p n + lo .. p n + hi - 1, valid until the next one is asked for."""
    rows = 16 * FIELDS[name]
    codes = random_codes(name, rows, 32)
    packed = codec.encode(name, codes)
    for plane, values in enumerate(codec.planes(name, packed[3:11])):
        assert values.dtype == torch.int16
        assert torch.equal(values.to(torch.uint8), codes[plane * 16 + 3 : plane * 16 + 11])
    assert plane == FIELDS[name] - 1


@pytest.mark.parametrize("name", RADIX)
@pytest.mark.parametrize("rows", [1, 39, 83, 640])
def test_decode_selected_is_decode_indexed(name: str, rows: int) -> None:
    codes = random_codes(name, rows, 64)
    index = torch.randint(0, rows, (57,), generator=torch.Generator().manual_seed(1))
    index[:2] = torch.tensor([0, rows - 1])
    selected = codec.decode_selected(name, codec.encode(name, codes), rows, index)
    assert selected.dtype == torch.uint8
    assert torch.equal(selected, codes[index])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 96), (256, 1)], ids=str)
def test_spread_fields_is_least_significant_first(bits: int, shape: tuple[int, int]) -> None:
    packed = np.random.default_rng(bits).integers(0, 256, shape, dtype=np.uint8)
    if shape == (256, 1):
        packed[:, 0] = np.arange(256)
    per_byte, mask = 8 // bits, (1 << bits) - 1
    naive = [
        [(int(row[k // per_byte]) >> (bits * (k % per_byte))) & mask for k in range(shape[1] * per_byte)]
        for row in packed
    ]
    spread = codec.spread_fields(torch.from_numpy(packed), bits)
    assert spread.dtype == torch.uint8 and spread.tolist() == naive


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_spread_fields_of_a_transposed_view(bits: int) -> None:
    packed = torch.randint(0, 256, (12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.spread_fields(packed.t(), bits), codec.spread_fields(packed.t().contiguous(), bits))


def test_refusals_name_what_was_given() -> None:
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"unknown codec 'trit6'.*bit, crumb, trit5, nibble, byte"):
        codec.encode("trit6", codes)
    with pytest.raises(ValueError, match=r"shape \(8,\), expected \[N, K\]"):
        codec.encode("bit", torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"torch\.int16 \(8, 32\), expected torch\.uint8"):
        codec.encode("bit", codes.short())
    with pytest.raises(ValueError, match=r"rows 0\.\.7 are torch\.uint8 \(8, 31\), expected torch\.uint8 \(8, 32\)"):
        codec.encode_rows("bit", 8, 32, lambda lo, hi: codes[lo:hi, :31])
    with pytest.raises(ValueError, match="fields of 3 bits are not supported, expected 1, 2 or 4"):
        codec.spread_fields(codes, 3)


@pytest.mark.parametrize("name", [name for name in RADIX if RADIX[name] < 256])
def test_a_code_outside_the_codec_is_refused(name: str) -> None:
    codes = random_codes(name, 90, 32)
    codes[89, 31] = RADIX[name]
    with pytest.raises(ValueError, match=f"code {RADIX[name]} in rows .* does not fit codec {name}"):
        codec.encode(name, codes)


@pytest.mark.parametrize("shape", [(0, 32), (8, 0)], ids=str)
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot encode a weight of shape"):
        codec.encode("trit5", torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("name", RADIX)
def test_bytes_of_another_shape_are_refused(name: str) -> None:
    packed = codec.encode(name, random_codes(name, 83, 32))
    for wrong in (packed[:-1], packed.short(), packed[0], packed[None]):
        with pytest.raises(
            ValueError, match=rf"{name} codes of 83 rows .* expected torch.uint8 \[{packed.shape[0]}, K\]"
        ):
            codec.decode(name, wrong, 83)


MEASURE = """
import json, sys, torch
from bonsai_ops.weights import codec

def memory(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) * 1024

def growth(work):
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    result = work()
    return memory("VmHWM") - before - result.nbytes

rows, columns, name = 27648, 3072, sys.argv[1]
codes = torch.randint(0, codec.get_codec(name).radix, (rows // 27, columns), dtype=torch.uint8).repeat(27, 1)
codec.decode(name, codec.encode(name, codes[:64]), 64)
kept = []

def encode():
    kept.append(codec.encode(name, codes))
    return kept[0]

found = {"encode": growth(encode)}
found["decode"] = growth(lambda: codec.decode(name, kept[0], rows))
found["control"] = growth(lambda: codes.short().to(torch.uint8))
print(json.dumps(found))
"""
SCRATCH_LIMIT = 64e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", ["bit", "trit5"])
def test_the_largest_layer_needs_less_than_64_mb_beside_input_and_output(name: str) -> None:
    """Peak resident memory of a fresh process; the control, a whole int16 copy (170 MB), must show in the meter."""
    # large blocks come straight from the system, so that no freed memory hides what a step takes
    variables = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", MEASURE, name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["control"] > 150e6
    assert found["encode"] < SCRATCH_LIMIT and found["decode"] < SCRATCH_LIMIT, found
