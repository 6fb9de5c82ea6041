"""GGUF files: blocks decoded as a plain loop over the definition does it, whole files into packed weights, refusals."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from bonsai_ops.tools import synthetic
from bonsai_ops.weights import flux2
from bonsai_ops.weights.errors import PackError
from bonsai_ops.weights.formats import CodedTensor, DenseTensor, open_pack
from bonsai_ops.weights.formats.gguf import BLOCKS, PQ2_0, PTQ1_0, Q1_0, Q2_0, Q8_0, TQ1_0, TQ2_0
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

GROUPS = {Q1_0: 128, Q2_0: 64, PQ2_0: 128, TQ1_0: 256, TQ2_0: 256, PTQ1_0: 128}
RUNS = {TQ1_0: ((0, 32, 5), (160, 16, 5), (240, 4, 4)), PTQ1_0: ((0, 16, 5), (80, 8, 5), (120, 2, 4))}
"""(first weight, bytes, digits a byte) of each run of a block of base 3; its scale comes last."""


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write(path: Path, tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], alignment: int = 32) -> Path:
    """A GGUF file of {name: (type, shape, bytes)} with metadata of several types before the tensors."""
    pairs = [
        string("general.architecture") + struct.pack("<I", 8) + string("flux2"),
        string("some.array") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("some.numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        string("general.alignment") + struct.pack("<II", 4, alignment),
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        header += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", kind, len(data))
        data += raw
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + data + b"\0" * (-len(data) % alignment))
    return path


def encode(kind: int, codes: np.ndarray, scale: np.ndarray) -> bytes:
    """Codes [N, K] and fp16 scales [N, K / g] -> blocks, by the definitions of ggml, one weight at a time."""
    g, out = GROUPS[kind], b""
    for row, scales in zip(codes.reshape(codes.shape[0], -1, g), scale, strict=True):
        for block, d in zip(row, scales, strict=True):
            half = np.float16(d).tobytes()
            if kind == Q1_0:
                out += half + np.packbits(block, bitorder="little").tobytes()
            elif kind in (Q2_0, PQ2_0):
                out += half + bytes(
                    sum(int(c) << 2 * i for i, c in enumerate(block[j : j + 4])) for j in range(0, g, 4)
                )
            elif kind == TQ2_0:
                out += bytes(
                    sum(int(block[j + 32 * n + m]) << 2 * n for n in range(4)) for j in (0, 128) for m in range(32)
                )
                out += half
            else:
                for start, count, levels in RUNS[kind]:
                    for m in range(count):
                        value = 0
                        for n in range(levels):
                            value = value * 3 + int(block[start + count * n + m])
                        out += bytes([-(-value * 3 ** (5 - levels) * 256 // 243)])
                out += half
    return out


def coded(kind: int, shape: tuple[int, int], seed: int = 0) -> tuple[bytes, torch.Tensor]:
    """(blocks, values float32 [N, K]) of random weights."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2 if kind == Q1_0 else 3, shape, dtype=np.uint8)
    scale = (rng.random((shape[0], shape[1] // GROUPS[kind])) * 0.1).astype(np.float16)
    level = 2 * codes.astype(np.float32) - 1 if kind == Q1_0 else codes.astype(np.float32) - 1
    return encode(kind, codes, scale), torch.from_numpy(level * scale.astype(np.float32).repeat(GROUPS[kind], axis=1))


def decode_base_3(kind: int, raw: bytes) -> np.ndarray:
    """float64 weights of blocks of base 3, from their description: digit n of a byte b, the leading one first.

    b = ceil(256 q / 243) gives q = floor(243 b / 256) back; the fifth digit beside four is 0.
    """
    size = 2 + sum(count for _, count, _ in RUNS[kind])
    values: list[float] = []
    for at in range(0, len(raw), size):
        block = raw[at : at + size]
        scale, at_run = float(np.frombuffer(block[-2:], np.float16)[0]), 0
        for _, count, levels in RUNS[kind]:
            numbers = [byte * 243 // 256 for byte in block[at_run : at_run + count]]
            values += [(number // 3 ** (4 - n) % 3 - 1) * scale for n in range(levels) for number in numbers]
            at_run += count
    return np.array(values)


@pytest.mark.parametrize("shape", [(19, 512), (1, 1536), (4, 768)], ids=str)
@pytest.mark.parametrize("kind", RUNS, ids=lambda k: BLOCKS[k].name)
def test_base_3_by_its_description(tmp_path: Path, kind: int, shape: tuple[int, int]) -> None:
    """Random bytes that an encoder can write, and scales that are negative, zero, tiny and the largest."""
    rng = np.random.default_rng(shape[0])
    blocks = []
    for _ in range(shape[0] * shape[1] // GROUPS[kind]):
        digits = [(levels, count) for _, count, levels in RUNS[kind] for _ in range(count)]
        numbers = [int(rng.integers(3**levels)) * 3 ** (5 - levels) for levels, _ in digits]
        scale = np.float16(rng.choice([0.0, 6e-8, 0.37, -1.5, 65504.0]))
        blocks.append(bytes(-(-256 * number // 243) for number in numbers) + scale.tobytes())
    path = write(tmp_path / "m.gguf", {"a.weight": (kind, shape, b"".join(blocks))})
    packed = open_pack(path).entries["a.weight"].weight()
    assert packed.scheme == "ternary" and packed.group_size == GROUPS[kind]
    assert np.array_equal(packed.dequantize().double().numpy(), decode_base_3(kind, b"".join(blocks)).reshape(shape))


def test_every_number_of_base_3(tmp_path: Path) -> None:
    """All 243 and all 81 bytes of PTQ1_0, against digits taken one by one."""
    five = [-(-256 * q // 243) for q in range(243)]
    four = [-(-256 * 3 * q // 243) for q in range(81)]
    raw = b"".join(
        bytes(five[(24 * i + m) % 243] for m in range(24))
        + bytes(four[(2 * i + m) % 81] for m in range(2))
        + np.float16(1).tobytes()
        for i in range(41)
    )
    found = open_pack(write(tmp_path / "m.gguf", {"a.weight": (PTQ1_0, (41, 128), raw)})).entries["a.weight"].weight()
    assert np.array_equal(found.dequantize().double().numpy().ravel(), decode_base_3(PTQ1_0, raw))


def test_both_packings_of_a_release_hold_the_same(tmp_path: Path) -> None:
    """PQ2_0 and PTQ1_0 of the same weights, with a group of zeros and one of scale 0."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (5, 384), dtype=np.uint8)
    codes[1, 128:256] = 1
    scale = rng.random((5, 3)).astype(np.float16)
    scale[0, 2] = 0
    tensors = {f"{kind}.weight": (kind, (5, 384), encode(kind, codes, scale)) for kind in (PQ2_0, PTQ1_0)}
    first, second = (entry.weight() for entry in open_pack(write(tmp_path / "m.gguf", tensors)).entries.values())
    truth = (codes.astype(np.float64) - 1) * scale.astype(np.float64).repeat(128, axis=1)
    for packed in (first, second):
        assert np.array_equal(packed.dequantize().double().numpy(), truth)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("kind", RUNS, ids=lambda k: BLOCKS[k].name)
@pytest.mark.parametrize("run", range(3))
def test_a_byte_that_no_encoder_writes(tmp_path: Path, kind: int, run: int) -> None:
    """Every one of 13 (of four digits: 175) other bytes, first and last of a run, far down in the tensor."""
    (rows, group), (_, count, levels) = (60, 1), RUNS[kind][run]
    good, _ = coded(kind, (rows, 2 * GROUPS[kind]))
    size = BLOCKS[kind].nbytes
    begin = sum(c for _, c, _ in RUNS[kind][:run])
    written = {-(-256 * 3 ** (5 - levels) * q // 243) for q in range(3**levels)}
    bad = sorted(set(range(256)) - written)
    assert len(bad) == (13 if levels == 5 else 175)
    for byte in bad if levels == 5 else (bad[0], bad[-1], min(b for b in bad if b * 243 // 256 % 3)):
        for place in {begin, begin + count - 1 if byte == bad[0] else begin}:
            raw = bytearray(good)
            raw[((rows - 1) * 2 + group) * size + place] = byte
            path = write(tmp_path / "m.gguf", {"a.weight": (kind, (rows, 2 * GROUPS[kind]), bytes(raw))})
            name = BLOCKS[kind].name
            with pytest.raises(PackError, match=rf"row 59 has the byte {byte}, which no encoder of {name} writes"):
                open_pack(path).entries["a.weight"].weight()


@pytest.mark.parametrize("kind", GROUPS, ids=lambda k: BLOCKS[k].name)
@pytest.mark.parametrize("change", [-8, 8], ids=["smaller", "larger"])
def test_blocks_of_another_size(tmp_path: Path, kind: int, change: int) -> None:
    """What another program wrote under the number takes another room: refused at the header."""
    shape = (64, 2 * GROUPS[kind])
    raw = bytes(128 * (BLOCKS[kind].nbytes + change))
    tensors = {"a.weight": (kind, shape, raw), "b": (0, (4096,), bytes(16384))}
    name, expected = BLOCKS[kind].name, 128 * BLOCKS[kind].nbytes
    with pytest.raises(PackError, match=rf"is a {name} tensor .* room for {len(raw)} bytes\. Expected {expected}, "):
        open_pack(write(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize("kind", GROUPS, ids=lambda k: BLOCKS[k].name)
def test_every_type(tmp_path: Path, kind: int) -> None:
    """Values and scheme of the packed weight; rows in pieces; a dense neighbour of each type."""
    raw, values = coded(kind, (19, 512))
    dense = {0: torch.randn(3, 5), 1: torch.randn(7).half(), 30: torch.randn(2, 3).bfloat16()}
    tensors = {"a.weight": (kind, (19, 512), raw)}
    tensors |= {
        f"dense{k}": (k, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for k, t in dense.items()
    }
    entries = open_pack(write(tmp_path / "m.gguf", tensors)).entries
    entry = entries["a.weight"]
    assert isinstance(entry, CodedTensor) and entry.shape == (19, 512)
    packed = entry.weight()
    assert packed.scheme == ("binary" if kind == Q1_0 else "ternary")
    assert packed.group_size == GROUPS[kind] and torch.equal(packed.dequantize(), values)
    assert torch.equal(entry.read(3, 11), entry.read(0, 19)[3:11])
    for k, tensor in dense.items():
        assert torch.equal(entries[f"dense{k}"].load(), tensor) and entries[f"dense{k}"].dtype == tensor.dtype


def test_an_overwritten_file_changes_no_copy(tmp_path: Path) -> None:
    dense = torch.randn(4, 8)
    tensors = {"a": (0, (4, 8), dense.numpy().tobytes())}
    found = open_pack(write(tmp_path / "m.gguf", tensors), mapped=False).entries["a"].load()
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.write(bytes((tmp_path / "m.gguf").stat().st_size))
    assert torch.equal(found, dense)


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    """The gguf package's own files, and its dequantization of random bytes, where it knows the type."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    for kind in (TQ1_0, TQ2_0):
        block, weights = BLOCKS[kind], np.repeat(rng.random((6, 2)), 256, axis=1) * rng.integers(-1, 2, (6, 512))
        written = gguf.quants.quantize(weights.astype(np.float32), gguf.GGMLQuantizationType(kind))
        entry = open_pack(write(tmp_path / "m.gguf", {"a.weight": (kind, (6, 512), written.tobytes())})).entries
        truth = gguf.quants.dequantize(written, gguf.GGMLQuantizationType(kind))
        assert torch.equal(entry["a.weight"].weight().dequantize(), torch.from_numpy(truth))
        raw = rng.integers(0, 256, (4, 3 * block.nbytes), dtype=np.uint8)
        view = raw.reshape(12, block.nbytes)
        view[:, block.scale_at : block.scale_at + 2] = rng.random((12, 1)).astype(np.float16).view(np.uint8)
        truth = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
        codes = block.codes(torch.from_numpy(view.copy())).float() - 1
        scale = torch.from_numpy(view[:, block.scale_at : block.scale_at + 2].copy().view(np.float16)).float()
        assert torch.equal((codes * scale).view(4, -1), torch.from_numpy(truth))


def test_type_42_with_groups_of_128(tmp_path: Path) -> None:
    """The older fork's blocks under the same number are told by the room that the tensors take."""
    raw, values = coded(PQ2_0, (64, 512))
    found = open_pack(write(tmp_path / "m.gguf", {"a.weight": (Q2_0, (64, 512), raw)})).entries["a.weight"].weight()
    assert found.group_size == 128 and torch.equal(found.dequantize(), values)


def test_eight_bits_are_dense(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q, d = rng.integers(-128, 128, (5, 2, 32), dtype=np.int8), rng.random((5, 2)).astype(np.float16)
    raw = b"".join(d[i, j].tobytes() + q[i, j].tobytes() for i in range(5) for j in range(2))
    entry = open_pack(write(tmp_path / "m.gguf", {"a": (Q8_0, (5, 64), raw)})).entries["a"]
    assert isinstance(entry, DenseTensor) and entry.dtype == torch.float32
    assert np.array_equal(entry.load().numpy(), (q * d.astype(np.float32)[..., None]).reshape(5, 64))


@pytest.mark.parametrize("kind", [Q1_0, Q2_0, TQ2_0, PTQ1_0], ids=lambda k: BLOCKS[k].name)
def test_a_whole_transformer(tmp_path: Path, kind: int) -> None:
    """BFL names, blocks coded, the rest bf16: loads as a pack with exactly these values."""
    geometry = flux2.Geometry(hidden=256, context=256, in_channels=128, double_blocks=1, single_blocks=1)
    generator, tensors, truth = torch.Generator().manual_seed(0), {}, {}
    for seed, (name, shape) in enumerate(flux2.expected_shapes(geometry).items()):
        if flux2.is_block_linear(name):
            rows, values = coded(kind, (8, shape[1]), seed)
            raw, truth[name] = rows * (shape[0] // 8), values.repeat(shape[0] // 8, 1)
            tensors[name] = (kind, shape, raw)
        else:
            truth[name] = synthetic.dense_tensor(shape, generator)
            tensors[name] = (30, shape, truth[name].view(torch.uint8).numpy().tobytes())
    weights = read_weights(open_transformer(write(tmp_path / "m.gguf", tensors)))
    assert weights.keys() == truth.keys()
    for name, weight in weights.items():
        assert isinstance(weight, PackedWeight) == flux2.is_block_linear(name)
        values = weight.dequantize() if isinstance(weight, PackedWeight) else weight
        assert torch.equal(values, truth[name]), name


def test_refusals(tmp_path: Path) -> None:
    raw, _ = coded(Q2_0, (4, 64))
    good = write(tmp_path / "good.gguf", {"a.weight": (Q2_0, (4, 64), raw)}).read_bytes()
    path = tmp_path / "bad.gguf"
    for data, message in (
        (b"GGUF", "is no GGUF file"),
        (b"XXXX" + good[4:], "starts with b'XXXX'"),
        (good[:4] + struct.pack("<I", 9) + good[8:], "version 9"),
        (good[:60], "ends inside its header"),
        (good[:-64], "a.weight: ends at byte"),
    ):
        path.write_bytes(data)
        with pytest.raises(PackError, match=message):
            open_pack(path)
    for kind, called in ((10, "Q2_K"), (40, "NVFP4 or.*groups of 32"), (141, "unknown"), (144, "unknown")):
        write(path, {"a.weight": (kind, (4, 256), bytes(84 * 4))})
        with pytest.raises(
            PackError, match=rf"a\.weight: is stored as GGUF type {kind} \({called}.*Expected Q1_0, Q2_0"
        ):
            open_pack(path)
    for kind in (Q1_0, PQ2_0, PTQ1_0):
        write(path, {"a.weight": (kind, (4, 64), bytes(999))})
        with pytest.raises(PackError, match=f"{BLOCKS[kind].name} .* K a multiple of 128"):
            open_pack(path)
    for kind in (Q2_0, PQ2_0):
        fourth = bytearray(coded(kind, (4, 128))[0])
        fourth[7] |= 3
        write(path, {"a.weight": (kind, (4, 128), bytes(fourth))})
        with pytest.raises(PackError, match="a fourth level"):
            open_pack(path).entries["a.weight"].weight()
    for kind in (PQ2_0, PTQ1_0):
        endless = bytearray(coded(kind, (4, 128))[0])
        endless[BLOCKS[kind].scale_at : BLOCKS[kind].scale_at + 2] = np.float16("inf").tobytes()
        write(path, {"a.weight": (kind, (4, 128), bytes(endless))})
        with pytest.raises(PackError, match="the scale table"):
            open_pack(path).entries["a.weight"].weight()
