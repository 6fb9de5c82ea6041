"""The Triton backend without a GPU: kernels in Triton's interpreter, their PTX in a small emulation, and its refusals.

The interpreter must be chosen before Triton is imported and would confuse other tests of this process, so
`test_in_the_interpreter` runs INTERPRETED_FILES in a child with TRITON_INTERPRET=1; only there do the tests marked with
`interpreter` run. The interpreter cannot run inline PTX: there the kernels take their plain branch, and the
emulation checks every PTX string over all bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, interpreter, once
from ptx import Ptx, as_floats

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, Call, contest, dispatch, eager, triton
from bonsai_ops.kernels.rows import readable
from bonsai_ops.kernels.triton import backend, configs, probe
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.packed_weight import PackedWeight

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEME = {"trit5": "ternary", "crumb": "ternary", "bit": "binary"}
INTERPRETED_FILES = ("test_triton.py", "test_plane.py", "test_unpack_kernel.py", "test_backends.py")
CODES = tuple(SCHEME)
PLANES = ("crumb", "bit")  # the codecs of a8 and a8_fp8
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 2**-7}  # the interpreter truncates to bf16 instead of rounding
TARGETS = (86, 90, 100, "gfx1100")
SHAPES = [
    # M, N, K: one row, fewer rows than a byte, padding in the last plane, ragged tiles, several tiles
    (1, 1, 128),
    (3, 7, 256),
    (5, 83, 384),
    (67, 648, 128),
    (130, 1030, 128),
]
TURNS = (("trit5", 86), ("bit", 90), ("crumb", "gfx1100"), ("bit", 86), ("crumb", 100), ("trit5", 90), ("crumb", 86))
"""Codecs and configuration families for the large, slow shapes, two at a time."""

CASES = [(shape, codec, target) for shape in SHAPES[:3] for codec in CODES for target in TARGETS]
CASES += [(SHAPES[3 + i % 2], *turn) for i, turn in enumerate(TURNS)]

A8_PAIRS = tuple(itertools.product(PLANES, (86, 90, "gfx1100")))
A8_CASES = [(shape, codec, "a8", target) for shape in SHAPES[:3] for codec, target in A8_PAIRS]
A8_CASES += [(SHAPES[3 + i % 2], codec, "a8", target) for i, (codec, target) in enumerate(A8_PAIRS)]
A8_CASES += [(shape, PLANES[i % 2], "a8_fp8", (89, 90)[i % 2]) for i, shape in enumerate(SHAPES)]

needs_triton = pytest.mark.skipif(backend.half is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def nothing_verified() -> Iterator[None]:
    backend.forget_verified()
    kernels.forget_failures()
    yield
    backend.forget_verified()
    kernels.forget_failures()


def make_weight(
    rows: int, columns: int, codec: str, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PackedWeight:
    """Every byte value that the codec writes, in a shuffled order (repeated as often as the shape needs)."""
    generator = torch.Generator().manual_seed(seed)
    n = codecs.get_codec(codec).byte_rows(rows)
    values = byte_values(codec)
    index = torch.arange(n * columns)[torch.randperm(n * columns, generator=generator)] % len(values)
    codes = values[index].to(torch.uint8).view(n, columns)
    scale = torch.rand(rows, columns // 128, generator=generator) * 2 + 0.01
    return PackedWeight(codes, scale.to(scale_dtype), (rows, columns), SCHEME[codec], codec, 128)


def byte_values(codec: str) -> torch.Tensor:
    """The bytes that hold codes of binary or ternary weights, int64."""
    values = torch.arange(256)
    if codec == "trit5":
        values = (torch.arange(243) * 256 / 243).ceil().to(torch.int64)
    if codec == "crumb":
        values = values[(values & values >> 1 & 0x55) == 0]
    return values


def exact(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Float64 product with the weight rounded to x's dtype, as the backends define it."""
    return x.double() @ weight.dequantize(x.dtype).double().t()


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as mode a8 sees it: 127 levels of the largest magnitude of each group of 128, float64."""
    grouped = x.float().view(x.shape[0], -1, 128)
    scale = grouped.abs().amax(dim=2, keepdim=True).clamp_min(2.0**-100) / 127
    return ((grouped * (1 / scale)).round().double() * scale.double()).view(x.shape)


def rounded_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as mode a8_fp8 sees it: the largest magnitude of each group of 128 is 448, e4m3's own; float64."""
    grouped = x.float().view(x.shape[0], -1, 128)
    scale = grouped.abs().amax(dim=2, keepdim=True).clamp_min(2.0**-100) / 448
    return ((grouped * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()).view(x.shape)


ROUNDED = {"a8": (rounded, 0.03), "a8_fp8": (rounded_to_e4m3, 0.035)}
"""{mode: (what it makes of x, its largest error)}."""


def launch_poisoned(
    x: torch.Tensor, weight: PackedWeight, target: int | str, mode: str = "exact", bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the kernel into the middle of a NaN-filled buffer and checks that nothing around it was written."""
    rows = weight.shape[0]
    buffer = torch.full((x.shape[0] + 2, rows + 32), float("nan"), dtype=x.dtype)
    out = buffer[1:-1, 16:-16]
    backend.launch(x, weight, bias, out, backend.config(target, weight.codec, mode), mode)
    result = out.clone()
    out.fill_(float("nan"))
    assert buffer.isnan().all(), "the kernel wrote outside its output"
    assert not result.isnan().any(), "the kernel left outputs unwritten"
    return result


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    files = [str(Path(__file__).with_name(name)) for name in INTERPRETED_FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout[-2000:]


@interpreter
@pytest.mark.parametrize(("shape", "codec", "target"), CASES)
def test_exact_matches_float64(shape: tuple, codec: str, target: int | str) -> None:
    """In one of the two dtypes each; in both where the shape is small."""
    rows_x, rows, columns = shape
    weight = make_weight(rows, columns, codec)
    dtypes = (torch.float16, torch.bfloat16)
    for dtype in dtypes if rows < 100 else dtypes[len(str(target)) % 2 :][:1]:
        x = torch.randn(rows_x, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert error(launch_poisoned(x, weight, target), exact(x, weight)) < TOLERANCE[dtype]


@interpreter
@pytest.mark.parametrize("codec", CODES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_fp16_accumulate_matches_float64(shape: tuple, codec: str) -> None:
    rows_x, rows, columns = shape
    weight = make_weight(rows, columns, codec)
    x = torch.randn(rows_x, columns, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    assert error(launch_poisoned(x, weight, 86, "fp16_accumulate"), exact(x, weight)) < 2e-3


@interpreter
@pytest.mark.parametrize("codec", CODES)
def test_fp16_accumulate_does_not_overflow(codec: str) -> None:
    """Token 0: all products have one sign and sum to 128 * 6e4 before the scale. 1: small. 2: large normal numbers."""
    codes = torch.zeros(40, 128, dtype=torch.uint8)
    weight = PackedWeight(
        codecs.encode(codec, codes), torch.full((40, 1), 2.0**-9), (40, 128), SCHEME[codec], codec, 128
    )
    x = torch.full((3, 128), 60000.0, dtype=torch.float16)
    x[1] = 0.5
    x[2] = (torch.randn(128, generator=torch.Generator().manual_seed(2)) * 15000).clamp(-65000, 65000)
    y = launch_poisoned(x, weight, 86, "fp16_accumulate")
    for token in range(3):
        assert error(y[token], exact(x, weight)[token]) < 2e-3, f"token {token}"


@interpreter
@pytest.mark.parametrize(("shape", "codec", "mode", "target"), A8_CASES)
def test_a8_matches_float64(shape: tuple, codec: str, mode: str, target: int | str) -> None:
    """The sums are exact: against the product with the rounded x, only fp32 and the output's dtype differ."""
    rows_x, rows, columns = shape
    weight = make_weight(rows, columns, codec)
    dtype = torch.bfloat16 if target in (86, 89) else torch.float16
    x = torch.randn(rows_x, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, :3] *= 50  # outliers keep their group's scale from that of its neighbours
    y = launch_poisoned(x, weight, target, mode)
    as_seen, limit = ROUNDED[mode]
    assert error(y, as_seen(x) @ weight.dequantize().double().t()) < TOLERANCE[dtype]
    assert error(y, exact(x, weight)) < limit


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 100])
def test_quantized_activations(rows: int, dtype: torch.dtype) -> None:
    """Bit-equal to torch; a group of zeros, one below the smallest scale and the rows after M come out as zeros."""
    chosen = backend.config(86, "crumb", "a8")
    x = torch.randn(rows + 3, 400, generator=torch.Generator().manual_seed(1)).to(dtype)[:rows, 5:389]
    x[0, :128] = 0
    x[0, 128] = 3
    q, tokens = backend.quantize(x, chosen)
    q = q.view(-1, 3, chosen.block_m, 128).transpose(1, 2).reshape(-1, 384)
    scale = 64 * tokens.view(-1, 3, chosen.block_m).transpose(1, 2).reshape(-1, 3)
    grouped = x.float().view(rows, 3, 128)
    assert torch.equal(scale[:rows], grouped.abs().amax(2).clamp_min(2.0**-100) / 127)
    assert torch.equal(q[:rows].float().view(rows, 3, 128), (grouped * (1 / scale[:rows, :, None])).round())
    assert not q[rows:].any() and not q[0, :128].any() and q[0, 128] == 127


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 100])
def test_activations_in_e4m3(rows: int, dtype: torch.dtype) -> None:
    """Bit-equal to torch, from the largest number to those below e4m3's normal ones; zeros and the rows after M too."""
    chosen = backend.config(89, "crumb", "a8_fp8")
    x = torch.randn(rows + 3, 400, generator=torch.Generator().manual_seed(1)).to(dtype)[:rows, 5:389]
    x[0, :128] = 0
    x[0, 128:256] = 448 * 2.0 ** -torch.arange(128).div(6)
    q, tokens = backend.quantize(x, chosen, "a8_fp8")
    q = q.float().view(-1, 3, chosen.block_m, 128).transpose(1, 2).reshape(-1, 384)
    scale = 2 * tokens.view(-1, 3, chosen.block_m).transpose(1, 2).reshape(-1, 3)
    grouped = x.float().view(rows, 3, 128)
    assert torch.equal(scale[:rows], grouped.abs().amax(2).clamp_min(2.0**-100) / 448)
    assert torch.equal(
        q[:rows].view(rows, 3, 128), (grouped * (1 / scale[:rows, :, None])).to(torch.float8_e4m3fn).float()
    )
    assert not q[rows:].any() and not q[0, :128].any() and q[0, 128] == 448
    assert ((q[0, 128:256] > 0) & (q[0, 128:256] < 2.0**-6)).any()


def e4m3_error(x: torch.Tensor) -> float:
    return error(rounded_to_e4m3(x), x.double())


@once
def test_the_error_of_e4m3_is_bounded() -> None:
    """What the README says of a8_fp8: more than that of int8, until outliers cost int8 as much."""
    normal = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
    channels = normal.clone()
    channels[:, torch.randperm(3072, generator=torch.Generator().manual_seed(1))[:16]] *= 30
    gated = torch.nn.functional.silu(normal) * normal.roll(1, 1)
    for x, expected, of_int8 in ((normal, 2.6e-2, 6.5e-3), (gated, 2.3e-2, 1.3e-2), (channels, 1.4e-2, 2.2e-2)):
        assert e4m3_error(x) == pytest.approx(expected, rel=0.1)
        assert error(rounded(x), x.double()) == pytest.approx(of_int8, rel=0.1)


@once
def test_signs_are_exact_in_e4m3() -> None:
    """The bytes that int8 reads as +-64 and 0."""
    bytes_ = torch.tensor([64, 0, -64], dtype=torch.int8)
    assert bytes_.view(torch.float8_e4m3fn).tolist() == [2.0, 0.0, -2.0]


@interpreter
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("mode", "codec"), [("exact", "trit5"), ("a8", "crumb"), ("a8_fp8", "bit")])
def test_scale_dtypes(mode: str, codec: str, scale_dtype: torch.dtype) -> None:
    weight = make_weight(41, 256, codec, scale_dtype)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(4, 256).to(dtype)
        seen = ROUNDED[mode][0](x) @ weight.dequantize().double().t() if mode in ROUNDED else exact(x, weight)
        assert error(launch_poisoned(x, weight, 86, mode), seen) < 2 * TOLERANCE[dtype]  # twice truncated


@interpreter
@pytest.mark.parametrize("target", [86, 90])
def test_bias_is_added_before_rounding(target: int) -> None:
    """1 + eps / 2 and a bias of eps / 2 are 1 + eps; a product rounded before would be 1."""
    half = torch.finfo(torch.float16).eps / 2
    codes = codecs.encode("crumb", torch.zeros(41, 256, dtype=torch.uint8))
    weight = PackedWeight(codes, torch.ones(41, 2), (41, 256), "ternary", "crumb", 128)
    x = torch.zeros(2, 256, dtype=torch.float16)
    x[:, 0], x[:, 128] = 1, half
    y = launch_poisoned(x, weight, target, "a8", torch.full((41,), half))
    assert torch.equal(y, torch.full((2, 41), 1 + 2 * half, dtype=torch.float16))


@interpreter
@pytest.mark.parametrize("mode", kernels.MODES)
def test_a_broken_token_leaves_the_others_alone(mode: str) -> None:
    weight = make_weight(41, 128, "crumb")
    x = torch.randn(4, 128, dtype=torch.float16)
    clean = backend.multiply(x, weight, None, mode)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = backend.multiply(x, weight, None, mode)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all() and not torch.isfinite(y[2]).all()


@interpreter
@pytest.mark.parametrize(
    ("mode", "target"),
    [("exact", 86), ("exact", 90), ("fp16_accumulate", 86), ("a8", 86), ("a8", 90), ("a8_fp8", 90)],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_fp16_cannot_hold_is_infinite(mode: str, target: int) -> None:
    """As a dense product is: ComfyUI's blocks clamp it where they clamp that. The sums themselves go on beyond it."""
    codes = torch.zeros(24, 256, dtype=torch.uint8)
    codes[8:16] = 2
    codes[16:, 128:] = 2  # up and down again
    weight = PackedWeight(codecs.encode("crumb", codes), torch.ones(24, 2), (24, 256), "ternary", "crumb", 128)
    x = torch.full((2, 256), 30000.0, dtype=torch.float16)
    x[1] = 127
    signs = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(8)
    expected = (x.double().sum(1, keepdim=True) * signs).to(torch.float16)
    assert torch.equal(launch_poisoned(x, weight, target, mode), expected)


@interpreter
@pytest.mark.parametrize(("mode", "tokens", "rows"), [("exact", 2_500, 300), ("a8", 1_000, 9)])
def test_many_tokens(mode: str, tokens: int, rows: int) -> None:
    """Bands of tiles, the last one not full: twenty tiles of tokens by two of byte rows, and eleven by one."""
    weight = make_weight(rows, 128, "crumb")
    x = torch.randn(tokens, 128, dtype=torch.float16)
    expected = exact(x, weight) if mode == "exact" else rounded(x) @ weight.dequantize().double().t()
    assert error(launch_poisoned(x, weight, 90, mode), expected) < TOLERANCE[torch.float16]


def gemlite_product(x: torch.Tensor, leaves: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """x [M, K] fp16 times a weight that gemlite packed, by gemlite's own GEMM kernel in the interpreter; fp16 [M, N].

    The interpreter counts loops with Python integers, which have no `.to`; that one expression is replaced.
    """
    import triton.language as tl
    from gemlite.triton_kernels.gemm_kernels import gemm_INT_kernel as kernel

    while hasattr(kernel, "fn") and not hasattr(kernel, "rewriter"):
        kernel = kernel.fn
    source = kernel.rewriter._prepare_source

    def prepared(lines: list[str]) -> str:
        text = source(lines)
        assert text.count("(k * stride_mul).to(tl.int32)") == 1
        return text.replace("(k * stride_mul).to(tl.int32)", "k * BLOCK_SIZE_K // group_size")

    monkeypatch.setattr(kernel.rewriter, "_prepare_source", prepared)
    codes, scales, zeros = (leaves[leaf] for leaf in ("W_q", "scales", "zeros"))
    bits, group, group_mode = (int(leaves["metadata"][i]) for i in (1, 2, 10))
    rows, columns = leaves["orig_shape"].tolist()
    block_m, block_n, block_k = 16, 64, 64
    out = torch.full((x.shape[0], rows), float("nan"), dtype=x.dtype)
    given = {
        **{"a_ptr": x, "b_ptr": codes, "c_ptr": out, "scales_ptr": scales, "zeros_ptr": zeros},
        **{"M": x.shape[0], "N": rows, "K": columns, "W_nbits": bits, "group_size": group, "unpack_mask": 2**bits - 1},
        **{"elements_per_sample": 8 // bits, "stride_am": x.stride(0), "stride_ak": 1, "stride_bk": codes.stride(0)},
        **{"stride_bn": codes.stride(1), "stride_cm": rows, "stride_cn": 1, "stride_meta_g": scales.stride(0)},
        **{"stride_meta_n": scales.stride(1), "input_dtype": tl.float16, "output_dtype": tl.float16},
        **{"acc_dtype": tl.float32, "meta_dtype": {torch.float16: tl.float16}.get(scales.dtype, tl.float32)},
        **{"channel_scale_mode": 0, "W_group_mode": group_mode, "zero_is_scalar": False, "data_contiguous": True},
        **{"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k, "GROUP_SIZE_M": 8},
        **{"NUM_STAGES": 1, "A_load_order": 0, "EVEN_M": x.shape[0] % block_m == 0, "EVEN_K": columns % block_k == 0},
        **{"EVEN_N": rows % block_n == 0, "use_tma": False},
    }
    required = [n for n, p in inspect.signature(kernel.fn).parameters.items() if p.default is inspect.Parameter.empty]
    kernel[(-(-x.shape[0] // block_m) * -(-rows // block_n),)](**{**dict.fromkeys(required), **given})
    return out


@interpreter
@pytest.mark.skipif(sys.platform != "linux", reason="gemlite is installed on Linux only")
@pytest.mark.parametrize("tables", [torch.float16, torch.float32])
@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_agrees_with_gemlite(
    variant: str, tables: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack that gemlite's packer wrote, multiplied by its kernel and, as our reader takes it, by each of ours."""
    from bonsai_ops.tools.bench.gemlite_import import import_gemlite

    import_gemlite()
    from peers.gemlite_pack import pack_linear

    generator = torch.Generator().manual_seed(0)
    rows, columns = 64, 256  # gemlite's kernel reads tables beyond the last row when N is ragged
    signs = torch.randint(-1, 2, (rows, 2, 128), generator=generator)
    signs[signs == 0] = 0 if variant == "ternary" else 1
    signs[:, :, 0] = 1
    scale = torch.randint(1, 256, (rows, 2, 1), generator=generator) / 256
    leaves = pack_linear((signs * scale).view(rows, columns), variant, tables)
    torch.save({f"layer.{leaf}": tensor for leaf, tensor in leaves.items()}, tmp_path / "state_dict.pt")
    weight = open_pack(tmp_path / "state_dict.pt").entries["layer.weight"].weight()
    x = torch.randn(5, columns, generator=generator).to(torch.float16)
    expected = x.double() @ (signs * scale).view(rows, columns).double().t()
    theirs = gemlite_product(x, leaves, monkeypatch)
    assert error(theirs, expected) < TOLERANCE[torch.float16]
    for target, mode in ((86, "exact"), (90, "exact"), (86, "fp16_accumulate")):
        ours = launch_poisoned(x, weight, target, mode)
        assert error(ours, theirs.double()) < (2e-3 if mode == "fp16_accumulate" else TOLERANCE[torch.float16])
    planes = weight
    if variant == "ternary":
        codes = codecs.decode("trit5", weight.codes, rows)
        planes = PackedWeight(codecs.encode("crumb", codes), weight.scale, weight.shape, "ternary", "crumb", 128)
    assert error(launch_poisoned(x, planes, 86, "a8"), theirs.double()) < 0.02


def every_pair(codec: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = byte_values(codec)
    low, high = torch.meshgrid(values, values, indexing="ij")
    return low.reshape(-1), high.reshape(-1)


def first_lanes(codec: str, source: str, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The register of 16-bit lanes (low, high), made from four bytes by each of the strings that can make it."""
    k = backend.half
    other = low * 0 + 0xA7
    upper, lower = low | high << 8 | other << 16 | other << 24, other | other << 8 | low << 16 | high << 24
    if source == "word":
        texts = k.ASM_WORD_TERNARY if codec == "trit5" else k.ASM_WORD_BINARY
        made = [Ptx(text, {1: bytes4}).registers["$0"] for text, bytes4 in zip(texts, (upper, lower), strict=True)]
    else:
        text = k.ASM_BYTES_TERNARY if codec == "trit5" else k.ASM_BYTES_BINARY
        made = [Ptx(text, {2: bytes4}).registers[f"${i}"] for i, bytes4 in enumerate((upper, lower))]
    assert torch.equal(made[0], made[1])
    return made[0]


@once
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", CODES)
@pytest.mark.parametrize("source", ["word", "bytes"])
def test_ptx_decodes_every_pair_of_bytes(source: str, codec: str, dtype: torch.dtype) -> None:
    """In the order of weight_first_kernel and input_first_kernel: the weight (twice it for ternary) is exact."""
    k = backend.half
    pair = every_pair(codec)
    y = first_lanes(codec, source, *pair)
    scale = torch.tensor([0.0371, 1e-5, 1.0, 77.0]).to(dtype)[torch.arange(len(y)) % 4]
    bits = scale.view(torch.int16).to(torch.int64) & 0xFFFF
    codes = [list(codecs.planes(codec, byte.to(torch.uint8))) for byte in pair]
    for plane in range(codecs.get_codec(codec).fields):
        if codec == "bit":
            w = Ptx(k.ASM_SIGN, {1: y, 2: bits | bits << 16}).registers["$0"]
            y = Ptx(k.ASM_NEXT_BINARY, {1: y}).registers["$0"]
        else:
            u = Ptx(k.ASM_DIGIT[plane % 4 if codec == "trit5" else 0], {1: y}).registers["$0"]
            text = k.ASM_SCALE_FP16 if dtype == torch.float16 else k.ASM_SCALE_BF16
            w = Ptx(text, {1: u, 2: bits | bits << 16}).registers["$0"]
            if codec == "trit5":
                y = Ptx(k.ASM_NEXT_TERNARY[plane % 2], {1: y, 2: u}).registers["$0"]
            else:
                y = Ptx(k.ASM_NEXT_CRUMB, {1: y}).registers["$0"]
        for lane, value in enumerate(as_floats(w, dtype)):
            code = codes[lane][plane].double()
            expected = (1 - 2 * code) * scale.double() if codec == "bit" else (1 - code) * 2 * scale.double()
            assert torch.equal(value.double(), expected), f"plane {plane}, lane {lane}"


@once
@needs_triton
@pytest.mark.parametrize("codec", PLANES)
def test_ptx_decodes_bytes_to_int8(codec: str) -> None:
    """Every pair of bytes at both places of a register, by every program of a byte tile: 64 times the weight."""
    coder = codecs.get_codec(codec)
    low, high = every_pair(codec)
    register = low | high << 8 | high << 16 | low << 24
    text = backend.configs.ASM_INT8[coder.radix, coder.fields]
    codes = [list(codecs.planes(codec, byte.to(torch.uint8))) for byte in (low, high, high, low)]
    for program in (*range(coder.fields), 5 * coder.fields + 1):
        found = Ptx(text, {1: register}, torch.tensor(program)).registers["$0"]
        for place in range(4):
            value = (found >> 8 * place & 255).to(torch.uint8).view(torch.int8).to(torch.int16)
            code = codes[place][program % coder.fields]
            assert torch.equal(value, 64 * (1 - code) if codec == "crumb" else 64 * (1 - 2 * code)), (program, place)


@once
@needs_triton
@pytest.mark.parametrize("skipped", [0, 4])
def test_ptx_skips_planes(skipped: int) -> None:
    """Programs that take half of the planes start at plane 4."""
    k = backend.half
    pair = every_pair("bit")
    y = Ptx(k.ASM_SKIP, {1: first_lanes("bit", "bytes", *pair), 2: torch.tensor(skipped * 0x10001)}).registers["$0"]
    ones = torch.tensor(0x3C003C00)
    for plane in range(skipped, skipped + 4):
        w = Ptx(k.ASM_SIGN, {1: y, 2: ones}).registers["$0"]
        for byte, value in zip(pair, as_floats(w, torch.float16), strict=True):
            assert torch.equal(value.double(), 1 - 2 * (byte >> 7 - plane & 1).double())
        y = Ptx(k.ASM_NEXT_BINARY, {1: y}).registers["$0"]


ACCEPTED = Call(torch.device("cuda"), torch.bfloat16, 9216, 3072, "ternary", "trit5", 128, (8, 6))


def test_tensors_lie_as_kernels_read_them() -> None:
    """Transposed ones, which a plain clone leaves transposed, and those at an odd address; good ones are not copied."""
    codes = torch.arange(24 * 256).to(torch.uint8).view(24, 256)
    odd = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(24, 256).copy_(codes)
    for given in (codes.t().contiguous().t(), odd):
        found = readable(given)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0 and torch.equal(found, codes)
    assert readable(codes) is codes


@needs_triton
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"capability": (12, 0)},
        {"dtype": torch.float16, "mode": "fp16_accumulate"},
        {"scheme": "binary", "codec": "bit", "rows": 1, "columns": 128},
        {"codec": "crumb"},
        {"codec": "crumb", "mode": "a8", "capability": (9, 0)},
        {"codec": "crumb", "mode": "a8_fp8", "capability": (8, 9)},
        {"scheme": "binary", "codec": "bit", "mode": "a8_fp8", "capability": (9, 0)},
        {"scheme": "binary", "codec": "bit", "mode": "a8", "dtype": torch.float16},
    ],
)
def test_accepts(change: dict) -> None:
    assert triton.declines(dataclasses.replace(ACCEPTED, **change)) is None


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("mps")}, "the weight is on mps"),
        ({"capability": (7, 5)}, "capability 7.5"),
        ({"capability": None}, "unknown"),
        ({"dtype": torch.float32}, "not float32"),
        ({"scheme": "affine", "codec": "nibble"}, "affine weights stored as nibble"),
        ({"scheme": "affine", "codec": "byte"}, "affine weights stored as byte"),
        ({"group_size": 64}, "not 64"),
        ({"mode": "a8"}, "choose the layout fast in the loader"),
        ({"mode": "a8_fp8", "capability": (9, 0)}, "choose the layout fast in the loader"),
        ({"mode": "a8_fp8", "codec": "crumb", "capability": (8, 6)}, "no e4m3 tensor cores"),
        ({"mode": "a8_fp8", "codec": "crumb", "capability": (8, 0)}, "capability 8.9 and newer"),
        ({"codec": "bit"}, "ternary weights stored as bit"),
        ({"mode": "fp16_accumulate"}, "not bfloat16"),
        ({"mode": "fp16_accumulate", "dtype": torch.float16, "capability": (9, 0)}, "not faster"),
        ({"rows": 2**27}, "too large"),
    ],
)
def test_declines_with_a_reason(change: dict, reason: str) -> None:
    assert reason in triton.declines(dataclasses.replace(ACCEPTED, **change))


@needs_triton
@once
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu"), "capability": None}, "it has no mode a8_fp8"),
        ({"capability": (7, 5)}, "capability 7.5"),
        ({"capability": (8, 0)}, "no e4m3 tensor cores"),
        ({"capability": (8, 6)}, "no e4m3 tensor cores"),
        ({"capability": (8, 9), "codec": "trit5"}, "choose the layout fast in the loader"),
        ({"capability": (8, 9)}, None),
        ({"capability": (9, 0)}, None),
        ({"capability": (12, 0)}, None),
    ],
)
def test_who_multiplies_in_e4m3(change: dict, reason: str | None) -> None:
    """Where none does, the product is exact and the reason is told; what unpacks is asked beside it as beside a8."""
    wanted = dataclasses.replace(ACCEPTED, **{"codec": "crumb", **change}, mode="a8_fp8")
    choice = kernels.resolve(wanted)
    if reason is None:
        assert (choice.backend.NAME, choice.mode) == ("triton", "a8_fp8") and "a8_fp8" not in choice.declined
        assert choice.rival == kernels.resolve(dataclasses.replace(wanted, mode="a8")).rival
        assert "a8_fp8" in contest.Key("card", "8.9", "bfloat16", "ternary", "crumb", wanted.mode, 1, 1, 512).text
    else:
        exact = kernels.resolve(dataclasses.replace(wanted, mode="exact"))
        assert (choice.backend, choice.mode, choice.rival) == (exact.backend, "exact", exact.rival)
        assert reason in choice.declined["a8_fp8"] and choice.declined.items() >= exact.declined.items()


@needs_triton
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 1), (10, 3), (11, 0), (12, 0)])
def test_every_mode_that_is_not_declined_has_a_kernel(capability: tuple[int, int]) -> None:
    """On every GPU, also one that came after its family's first."""
    for name, mode in itertools.product(CODES, triton.MODES):
        changes = {"capability": capability, "scheme": SCHEME[name], "codec": name, "mode": mode}
        call = dataclasses.replace(ACCEPTED, dtype=torch.float16, **changes)
        if triton.declines(call) is None:
            assert backend.config(10 * capability[0] + capability[1], name, mode)


@needs_triton
@pytest.mark.parametrize(
    ("failure", "cure"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install a C compiler"),
        (subprocess.CalledProcessError(1, "gcc", stderr=b"main.c:1: fatal error: Python.h: No such file"), "headers"),
        (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
        (PermissionError(13, "Permission denied", "/home/user/.triton"), "TRITON_CACHE_DIR"),
        (ValueError("something new"), "reinstall Triton"),
    ],
)
def test_a_broken_triton_is_raised_with_the_cure(
    failure: Exception, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time; what kernels raise says nothing about whether Triton is there."""
    monkeypatch.setattr(backend, "launch", raising(failure))
    weight, x = make_weight(41, 128, "trit5"), torch.randn(3, 128, dtype=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(BackendError, match=f"could not compile or start a kernel .*; to use it, .*{cure}") as found:
            backend.multiply(x, weight, torch.randn(41))
        assert found.value.__cause__ is failure and backend.unavailable() is None


@needs_triton
@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_errors_of_the_device_are_raised_as_they_are(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "launch", raising(failure))
    with pytest.raises(type(failure)) as found:
        backend.multiply(torch.randn(3, 128, dtype=torch.bfloat16), make_weight(41, 128, "trit5"))
    assert found.value is failure


def raising(error: Exception) -> Callable:
    """A launch that fails."""

    def launch(*_arguments: object) -> None:
        raise error

    return launch


@needs_triton
@pytest.mark.parametrize(
    ("codec", "mode"), [("trit5", "exact"), ("bit", "exact"), ("crumb", "a8"), ("crumb", "a8_fp8")]
)
def test_a_kernel_that_computes_wrong_values_is_not_used(
    codec: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: torch.Tensor, weight: PackedWeight, bias: None, out: torch.Tensor, *_rest: object) -> None:
        out.copy_(eager.multiply(x, weight)).mul_(1.1)

    monkeypatch.setattr(backend, "launch", wrong)
    weight, x = make_weight(41, 128, codec), torch.randn(3, 128, dtype=torch.bfloat16)
    message = (
        f"kernel of mode {mode} computed wrong values on cpu; to use it, update this plugin and report mode {mode}"
    )
    for _ in range(2):
        with pytest.raises(BackendError, match=message):
            backend.multiply(x, weight, mode=mode)


@needs_triton
def test_a_wrong_kernel_of_one_mode_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through dispatch: a8 is out with its reason, exact goes on with its kernels."""
    launched = []

    def wrong_in_int8(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, _chosen: object, mode: str
    ) -> None:
        launched.append(mode)
        out.copy_(eager.multiply(x, weight, bias)).mul_(1.1 if mode == "a8" else 1)

    monkeypatch.setattr(backend, "launch", wrong_in_int8)
    forced = SimpleNamespace(NAME="triton", MODES=triton.MODES, declines=eager.declines, multiply=triton.multiply)
    others = [b for b in dispatch.BACKENDS if b.NAME not in ("plane", "triton")]
    monkeypatch.setattr(dispatch, "BACKENDS", (forced, *others))
    weight, x = make_weight(41, 128, "crumb"), torch.randn(3, 128, dtype=torch.float16)
    for mode in ("a8", "exact", "a8"):
        assert torch.equal(kernels.linear(x, weight, mode=mode), eager.multiply(x, weight))
    choice = kernels.resolve(kernels.call_of(x.device, x.dtype, weight, "a8"))
    assert launched == ["a8", "exact", "exact", "exact", "exact"]  # two of them probes
    assert (choice.backend.NAME, choice.mode) == ("triton", "exact") and "wrong values" in choice.declined["a8"]
    assert len(caplog.records) == 1 and "report mode a8 on cpu" in caplog.text


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
    """The probes that kernels were compared with; the kernels give the right product."""
    probes: list[PackedWeight] = []
    verify = probe.verify

    def right(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, _chosen: object, mode: str
    ) -> None:
        out.copy_(eager.multiply(x, weight, bias))

    def noting(launch: Callable, *rest: Any) -> None:
        def noted(x: torch.Tensor, weight: PackedWeight, *others: Any) -> None:
            probes.append(weight)
            launch(x, weight, *others)

        verify(noted, *rest)

    monkeypatch.setattr(backend, "launch", right)
    monkeypatch.setattr(probe, "verify", noting)
    monkeypatch.setattr(probe, "SIZE", probe.SMALL)
    return probes


@needs_triton
def test_each_kernel_is_verified_once(verified: list[PackedWeight]) -> None:
    """A kernel: codec, dtypes, mode, with or without bias. The probe is exact in every mode."""
    weight, x = make_weight(41, 128, "crumb"), torch.randn(3, 128, dtype=torch.float16)
    for mode in kernels.MODES:
        for bias in (None, torch.randn(41, dtype=torch.float16)):
            for _ in range(2):
                assert torch.equal(backend.multiply(x, weight, bias, mode), eager.multiply(x, weight, bias))
            assert [found.codec for found in verified] == ["crumb"]
            verified.clear()


@needs_triton
def test_each_alignment_has_a_kernel_of_its_own(verified: list[PackedWeight]) -> None:
    """Triton compiles another one where 16 divides a number or an address, and for 1: it is verified too, as such."""
    half = torch.float16
    weight, x = make_weight(41, 128, "crumb"), torch.randn(32, 128, dtype=half)
    moved = replace(weight, scale=torch.empty(42, 1, dtype=weight.scale.dtype)[1:].copy_(weight.scale))
    for count, (tokens, packed) in enumerate(
        [
            (x, weight),
            (x[:3], weight),
            (x[:1], weight),
            (x, make_weight(48, 128, "crumb")),
            (x, make_weight(16 * 32, 128, "crumb")),
            (x, make_weight(7, 128, "crumb")),
            (x, moved),
        ],
        start=1,
    ):
        for like in (tokens, tokens.clone()):
            assert torch.equal(backend.multiply(like, packed), eager.multiply(like, packed))
            backend.multiply(like[: len(like) // 16 * 16 or len(like)], packed)
        assert len(verified) == count
    assert [w.scale.data_ptr() % 16 == 0 for w in verified] == [True] * 6 + [False]
    kinds = [(w.shape[0] % 16 == 0, w.codes.shape[0] // 8 % 16 == 0, w.codes.shape[0] == 8) for w in verified]
    odd, even, full, one = (False, False, False), (True, False, False), (True, True, False), (False, False, True)
    assert kinds == [odd, odd, odd, even, full, one, odd]


FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    # what a kernel may get wrong beyond its first tile: (its result [M, N], that of its first 128 columns alone)
    "one step over the columns": lambda out, first: out.copy_(first),
    "the second tile of tokens": lambda out, first: out[256:257].mul_(1.1),
    "the last token": lambda out, first: out[-1:].zero_(),
    "the last row": lambda out, first: out[:, -1:].zero_(),
    "a plane of the byte rows": lambda out, first: out[:, 400:410].neg_(),
    "one value": lambda out, first: out[300, 600].add_(20),
    "values that are not written": lambda out, first: out[-3:, -3:].fill_(float("nan")),
}


@needs_triton
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_right_in_its_first_tile_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of a few tokens and rows is right with it."""

    def wrong(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, _chosen: object, mode: str
    ) -> None:
        out.copy_(eager.multiply(x, weight, bias))
        if min(out.shape) > 256:
            codes, scale, shape = weight.codes[:, :128], weight.scale[:, :1], (weight.shape[0], 128)
            FAULTS[fault](out, eager.multiply(x[:, :128], replace(weight, codes=codes, scale=scale, shape=shape), bias))

    monkeypatch.setattr(backend, "launch", wrong)
    monkeypatch.setattr(probe, "SMALL", probe.SIZE)
    weight, x = make_weight(640, 128, "crumb"), torch.randn(16, 128, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="computed wrong values"):
        backend.multiply(x, weight)


@needs_triton
@once
@pytest.mark.parametrize("place", configs.CONFIGS, ids=str)
def test_the_probe_has_several_tiles_and_edges(place: tuple[str, str, str]) -> None:
    """For every alignment: more than two tiles of tokens and byte rows, steps over the columns, and edges."""
    chosen, (_, codec, mode) = configs.CONFIGS[place], place
    for rows, tokens in ((3072, 1536), (83, 3), (1024, 512)):
        x, weight = torch.zeros(tokens, 128), make_weight(rows, 128, codec)
        inputs, made, _ = probe.make(x, weight, None, chosen)
        assert made.shape[1] == 1024 >= 8 * chosen.block_k
        assert len(inputs) >= max(384, 2 * chosen.block_m) and made.shape[0] >= 640
        assert len(inputs) % chosen.block_m or chosen.block_m == 16
        n, aligned = made.codes.shape[0], weight.codes.shape[0] % 128 == 0
        assert n > 2 * chosen.block_n and (n % chosen.block_n or aligned)
        assert made.shape[0] % (8 * codecs.get_codec(codec).fields)
        assert probe.kind_of(inputs, made, None, mode) == probe.kind_of(x, weight, None, mode)


@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sys.modules['triton'] = None", f"not installed; to use it, {backend.INSTALL}"),
        ("import types; sys.modules['triton'] = types.ModuleType('triton')", "reinstall"),
    ],
)
def test_imports_without_a_usable_triton(block: str, reason: str) -> None:
    code = (
        f"import sys, torch; {block}\n"
        "from bonsai_ops.kernels.triton import backend\n"
        "from bonsai_ops.weights.packed_weight import PackedWeight\n"
        "w = PackedWeight(torch.zeros(8, 128, dtype=torch.uint8), torch.ones(8, 1), (8, 128), 'binary', 'bit', 128)\n"
        "try:\n    backend.multiply(torch.ones(1, 128), w)\n"
        "except backend.BackendError as error:\n    print(error, str(error) == backend.unavailable())\n"
        "from bonsai_ops import kernels\n"
        "call = kernels.Call(torch.device('cuda'), torch.float16, 8, 128, 'binary', 'bit', 128, (8, 0))\n"
        "choice = kernels.resolve(call)\n"
        "print(choice.backend.NAME, choice.declined['triton'] == backend.unavailable())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    first, _, rest = done.stdout.partition("\n")
    assert first.startswith("Triton ") and reason in first and first.endswith(" True") and rest.strip() == "eager True"
