"""The Triton backend without a GPU: kernels in Triton's interpreter, their PTX in a small emulation, and its refusals.

The interpreter must be chosen before Triton is imported and would confuse other tests of this process, so
`test_in_the_interpreter` runs this file again in a child with TRITON_INTERPRET=1; only there do the tests marked with
`interpreter` run. The interpreter cannot run inline PTX: there the kernels take their plain branch, and the emulation
checks every PTX string over all bytes.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bonsai_ops import codec as codecs
from bonsai_ops.backends import eager
from bonsai_ops.backends import triton as backend
from bonsai_ops.packed_weight import PackedWeight

REPOSITORY = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CODEC = {"ternary": "trit5", "binary": "bit"}
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 2**-7}  # the interpreter truncates to bf16 instead of rounding
TARGETS = (86, 90, 100, "gfx1100")
SHAPES = [
    # M, N, K: one row, fewer rows than a byte, padding in the last plane, ragged tiles, several tiles
    (1, 1, 128),
    (1, 8, 256),
    (3, 7, 128),
    (5, 41, 384),
    (16, 83, 256),
    (33, 320, 128),
    (65, 648, 256),
    (130, 1030, 128),
]

CASES = [(shape, target) for i, shape in enumerate(SHAPES) for j, target in enumerate(TARGETS) if i < 3 or (i + j) % 2]
"""The small shapes on every configuration family, the slow large ones on half of them, each family in turn."""

needs_triton = pytest.mark.skipif(backend.kernels is None, reason="Triton is not installed")


def interpreter(test: Callable) -> Callable | None:
    """The test in the child of test_in_the_interpreter, nothing to collect elsewhere."""
    return test if INTERPRETED else None


@pytest.fixture(autouse=True)
def fresh_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_health", backend._Health())


def make_weight(
    rows: int, columns: int, scheme: str, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PackedWeight:
    """Every byte value that the codec writes, in a shuffled order (repeated as often as the shape needs)."""
    generator = torch.Generator().manual_seed(seed)
    n = codecs.get_codec(CODEC[scheme]).byte_rows(rows)
    values = torch.arange(243 if scheme == "ternary" else 256)
    if scheme == "ternary":
        values = (values * 256 / 243).ceil().to(torch.int64)
    index = torch.arange(n * columns)[torch.randperm(n * columns, generator=generator)] % len(values)
    codes = values[index].to(torch.uint8).view(n, columns)
    scale = torch.rand(rows, columns // 128, generator=generator) * 2 + 0.01
    return PackedWeight(codes, scale.to(scale_dtype), (rows, columns), scheme, CODEC[scheme], 128)


def exact(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Float64 product with the weight rounded to x's dtype, as the backends define it."""
    return x.double() @ weight.dequantize(x.dtype).double().t()


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def launch_poisoned(x: torch.Tensor, weight: PackedWeight, target: int | str, mode: str = "exact") -> torch.Tensor:
    """Runs the kernel into the middle of a NaN-filled buffer and checks that nothing around it was written."""
    rows = weight.shape[0]
    buffer = torch.full((x.shape[0] + 2, rows + 32), float("nan"), dtype=x.dtype)
    out = buffer[1:-1, 16:-16]
    chosen = backend.config(target, weight.scheme == "ternary", mode)
    tokens = None
    if mode == "fp16_accumulate":
        x, tokens = backend._bounded(x, chosen.block_k)
    backend.launch(x, weight, out, tokens, chosen)
    result = out.clone()
    out.fill_(float("nan"))
    assert buffer.isnan().all(), "the kernel wrote outside its output"
    assert not result.isnan().any(), "the kernel left outputs unwritten"
    return result


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", str(Path(__file__).resolve())]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d+ passed", done.stdout), done.stdout[-2000:]


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
@pytest.mark.parametrize(("shape", "target"), CASES)
def test_exact_matches_float64(shape: tuple, target: int | str, scheme: str, dtype: torch.dtype) -> None:
    rows_x, rows, columns = shape
    weight = make_weight(rows, columns, scheme)
    x = torch.randn(rows_x, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert error(launch_poisoned(x, weight, target), exact(x, weight)) < TOLERANCE[dtype]


@interpreter
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp16_accumulate_matches_float64(shape: tuple, scheme: str) -> None:
    rows_x, rows, columns = shape
    weight = make_weight(rows, columns, scheme)
    x = torch.randn(rows_x, columns, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    assert error(launch_poisoned(x, weight, 86, "fp16_accumulate"), exact(x, weight)) < 2e-3


@interpreter
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_fp16_accumulate_does_not_overflow(scheme: str) -> None:
    """All products of a token have one sign and sum to 128 * 6e4 before the scale; its neighbours are small."""
    codes = torch.zeros(40, 128, dtype=torch.uint8)
    weight = PackedWeight(
        codecs.encode(CODEC[scheme], codes), torch.full((40, 1), 2.0**-9), (40, 128), scheme, CODEC[scheme], 128
    )
    x = torch.full((3, 128), 60000.0, dtype=torch.float16)
    x[1] = 0.5
    y = launch_poisoned(x, weight, 86, "fp16_accumulate")
    assert torch.isfinite(y).all() and error(y[0], exact(x, weight)[0]) < 2e-3
    assert error(y[1], exact(x, weight)[1]) < 2e-3


@interpreter
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_dtypes(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight = make_weight(41, 256, "ternary", scale_dtype)
    x = torch.randn(4, 256).to(dtype)
    assert error(launch_poisoned(x, weight, 86), exact(x, weight)) < 2 * TOLERANCE[dtype]  # twice truncated


@interpreter
@pytest.mark.parametrize("mode", backend.MODES)
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_linear_takes_any_shape_stride_and_bias(scheme: str, mode: str) -> None:
    weight = make_weight(41, 256, scheme)
    bias = torch.randn(41, dtype=torch.float16)
    whole = torch.randn(2, 5, 400, dtype=torch.float16)
    for x in (whole[:, :, :256], whole[:, :, 3:259], whole[0, 0, 16:272], whole[:, :0, :256]):
        y = backend.linear(x, weight, bias, mode)
        assert y.shape == (*x.shape[:-1], 41) and backend.unavailable() is None
        assert error(y, exact(x, weight) + bias.double()) < 2e-3


@interpreter
@pytest.mark.parametrize("mode", backend.MODES)
def test_a_broken_token_leaves_the_others_alone(mode: str) -> None:
    weight = make_weight(41, 128, "ternary")
    x = torch.randn(4, 128, dtype=torch.float16)
    clean = backend.linear(x, weight, None, mode)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = backend.linear(x, weight, None, mode)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all() and not torch.isfinite(y[2]).all()


@interpreter
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_many_tokens(scheme: str) -> None:
    weight = make_weight(9, 128, scheme)
    x = torch.randn(20_000, 128, dtype=torch.float16)
    assert error(launch_poisoned(x, weight, 86), exact(x, weight)) < TOLERANCE[torch.float16]


class Ptx:
    """Runs the few PTX instructions the kernels use, on int64 arrays that hold 32-bit registers."""

    MASK = 0xFFFFFFFF

    def __init__(self, text: str, inputs: dict[int, torch.Tensor]) -> None:
        self.registers: dict[str, torch.Tensor] = {f"${i}": value for i, value in inputs.items()}
        for statement in filter(None, (part.strip(" {}") for part in text.split(";"))):
            name, _, operands = statement.partition(" ")
            if name != ".reg":
                target, *sources = (part.strip() for part in operands.split(","))
                self.registers[target] = self.run(name, [self.value(source) for source in sources])

    def value(self, source: str) -> torch.Tensor:
        return self.registers[source] if source in self.registers else torch.tensor(int(source, 0))

    def run(self, name: str, v: list[torch.Tensor]) -> torch.Tensor:
        match name:
            case "mov.b32":
                return v[0]
            case "and.b32":
                return v[0] & v[1]
            case "neg.s32":
                return -v[0] & self.MASK
            case "shl.b32":
                return v[0] << v[1] & self.MASK
            case "mad.lo.u32":
                return v[0] * v[1] + v[2] & self.MASK
            case "lop3.b32":
                terms = [
                    (v[0] if i & 4 else ~v[0]) & (v[1] if i & 2 else ~v[1]) & (v[2] if i & 1 else ~v[2])
                    for i in range(8)
                    if int(v[3]) >> i & 1
                ]
                result = torch.zeros_like(terms[0])
                for term in terms:
                    result = result | term
                return result & self.MASK
            case "prmt.b32":
                pool = [v[i // 4] >> 8 * (i % 4) & 255 for i in range(8)]
                picks = [int(v[2]) >> 4 * i & 15 for i in range(4)]
                assert max(picks) < 8, "sign replication is not emulated"
                return sum(pool[pick] << 8 * i for i, pick in enumerate(picks))
            case "mul.rn.f16x2":
                return self.lanes(torch.float16, v[0], v[1])
            case "fma.rn.bf16x2":
                assert int(v[2]) == 0x80008000  # -0.0: the sum is the product
                return self.lanes(torch.bfloat16, v[0], v[1])
        raise AssertionError(f"{name} is not emulated")

    @staticmethod
    def lanes(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = [x.double() * y.double() for x, y in zip(as_floats(a, dtype), as_floats(b, dtype), strict=True)]
        halves = [product.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF for product in products]
        return halves[0] | halves[1] << 16


def as_floats(register: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The two 16-bit lanes of a register, low first."""
    parts = [register >> 16 * lane & 0xFFFF for lane in (0, 1)]
    return [part.where(part < 0x8000, part - 0x10000).to(torch.int16).view(dtype) for part in parts]


def every_pair(scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(256)
    if scheme == "ternary":
        values = (torch.arange(243) * 256 / 243).ceil().to(torch.int64)
    low, high = torch.meshgrid(values, values, indexing="ij")
    return low.reshape(-1), high.reshape(-1)


def first_lanes(scheme: str, source: str, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The register of 16-bit lanes (low, high), made from four bytes by each of the strings that can make it."""
    k = backend.kernels
    other = low * 0 + 0xA7
    upper, lower = low | high << 8 | other << 16 | other << 24, other | other << 8 | low << 16 | high << 24
    if source == "word":
        texts = k.ASM_WORD_TERNARY if scheme == "ternary" else k.ASM_WORD_BINARY
        made = [Ptx(text, {1: bytes4}).registers["$0"] for text, bytes4 in zip(texts, (upper, lower), strict=True)]
    else:
        text = k.ASM_BYTES_TERNARY if scheme == "ternary" else k.ASM_BYTES_BINARY
        made = [Ptx(text, {2: bytes4}).registers[f"${i}"] for i, bytes4 in enumerate((upper, lower))]
    assert torch.equal(made[0], made[1])
    return made[0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
@pytest.mark.parametrize("source", ["word", "bytes"])
def test_ptx_decodes_every_pair_of_bytes(source: str, scheme: str, dtype: torch.dtype) -> None:
    """In the order of weight_first_kernel and input_first_kernel: the weight (twice it for ternary) is exact."""
    k = backend.kernels
    pair = every_pair(scheme)
    y = first_lanes(scheme, source, *pair)
    scale = torch.tensor([0.0371, 1e-5, 1.0, 77.0]).to(dtype)[torch.arange(len(y)) % 4]
    bits = scale.view(torch.int16).to(torch.int64) & 0xFFFF
    codes = [list(codecs.planes(CODEC[scheme], byte.to(torch.uint8))) for byte in pair]
    for plane in range(codecs.get_codec(CODEC[scheme]).fields):
        if scheme == "ternary":
            u = Ptx(k.ASM_DIGIT[plane % 4], {1: y}).registers["$0"]
            text = k.ASM_SCALE_FP16 if dtype == torch.float16 else k.ASM_SCALE_BF16
            w = Ptx(text, {1: u, 2: bits | bits << 16}).registers["$0"]
            y = Ptx(k.ASM_NEXT_TERNARY[plane % 2], {1: y, 2: u}).registers["$0"]
        else:
            w = Ptx(k.ASM_SIGN, {1: y, 2: bits | bits << 16}).registers["$0"]
            y = Ptx(k.ASM_NEXT_BINARY, {1: y}).registers["$0"]
        for lane, value in enumerate(as_floats(w, dtype)):
            code = codes[lane][plane].double()
            expected = (1 - code) * 2 * scale.double() if scheme == "ternary" else (1 - 2 * code) * scale.double()
            assert torch.equal(value.double(), expected), f"plane {plane}, lane {lane}"


@needs_triton
@pytest.mark.parametrize("skipped", [0, 4])
def test_ptx_skips_planes(skipped: int) -> None:
    """Programs that take half of the planes start at plane 4."""
    k = backend.kernels
    pair = every_pair("binary")
    y = Ptx(k.ASM_SKIP, {1: first_lanes("binary", "bytes", *pair), 2: torch.tensor(skipped * 0x10001)}).registers["$0"]
    ones = torch.tensor(0x3C003C00)
    for plane in range(skipped, skipped + 4):
        w = Ptx(k.ASM_SIGN, {1: y, 2: ones}).registers["$0"]
        for byte, value in zip(pair, as_floats(w, torch.float16), strict=True):
            assert torch.equal(value.double(), 1 - 2 * (byte >> 7 - plane & 1).double())
        y = Ptx(k.ASM_NEXT_BINARY, {1: y}).registers["$0"]


CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ACCEPTED = {
    "device": CUDA,
    "capability": (8, 6),
    "dtype": torch.bfloat16,
    "rows": 9216,
    "columns": 3072,
    "scheme": "ternary",
    "codec": "trit5",
    "group_size": 128,
    "mode": "exact",
}


@needs_triton
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"capability": (12, 0)},
        {"dtype": torch.float16, "mode": "fp16_accumulate"},
        {"scheme": "binary", "codec": "bit", "rows": 1, "columns": 128},
    ],
)
def test_accepts(change: dict) -> None:
    assert backend.declines(**{**ACCEPTED, **change}) is None


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("mps")}, "not mps"),
        ({"capability": (7, 5)}, "capability 7.5"),
        ({"capability": None}, "unknown"),
        ({"dtype": torch.float32}, "not float32"),
        ({"scheme": "affine", "codec": "nibble"}, "affine weights stored as nibble"),
        ({"group_size": 64}, "not 64"),
        ({"columns": 192}, "in 192"),
        ({"mode": "a8"}, "no mode 'a8'"),
        ({"mode": "fp16_accumulate"}, "not bfloat16"),
        ({"mode": "fp16_accumulate", "dtype": torch.float16, "capability": (9, 0)}, "not faster"),
        ({"rows": 2**27}, "too large"),
    ],
)
def test_declines_with_a_reason(change: dict, reason: str) -> None:
    assert reason in backend.declines(**{**ACCEPTED, **change})


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
def test_a_broken_triton_costs_speed_and_one_line(
    failure: Exception, cure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_arguments: object) -> None:
        raise failure

    monkeypatch.setattr(backend, "launch", broken)
    weight, x = make_weight(41, 128, "ternary"), torch.randn(3, 128, dtype=torch.bfloat16)
    bias = torch.randn(41)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(backend.linear(x, weight, bias), eager.linear(x, weight, bias))
    assert len(caplog.records) == 1 and cure in caplog.text
    assert cure in backend.unavailable()


@needs_triton
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_a_kernel_that_computes_wrong_values_is_not_used(
    scheme: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, *_rest: object) -> None:
        out.copy_(eager.linear(x, weight)).mul_(1.1)

    monkeypatch.setattr(backend, "launch", wrong)
    weight, x = make_weight(41, 128, scheme), torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(backend.linear(x, weight), eager.linear(x, weight))
    assert "wrong values" in backend.unavailable() and "report" in caplog.text


@needs_triton
def test_a_kernel_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def right(x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, *_rest: object) -> None:
        calls.append(weight.shape)
        out.copy_(eager.linear(x, weight))

    monkeypatch.setattr(backend, "launch", right)
    weight, x = make_weight(41, 128, "ternary"), torch.randn(3, 128, dtype=torch.bfloat16)
    for _ in range(3):
        assert torch.equal(backend.linear(x, weight), eager.linear(x, weight))
    assert calls == [(160, 256), (41, 128), (41, 128), (41, 128)] and backend.unavailable() is None


@needs_triton
def test_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode 'fast'"):
        backend.linear(torch.zeros(1, 128), make_weight(8, 128, "binary"), mode="fast")


@pytest.mark.skipif(INTERPRETED, reason="the parent's")
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sys.modules['triton'] = None", "not installed"),
        ("import types; sys.modules['triton'] = types.ModuleType('triton')", "reinstall"),
    ],
)
def test_imports_without_a_usable_triton(block: str, reason: str) -> None:
    code = (
        f"import sys, torch; {block}\n"
        "from bonsai_ops.backends import triton as backend\n"
        "from bonsai_ops.packed_weight import PackedWeight\n"
        "w = PackedWeight(torch.zeros(8, 128, dtype=torch.uint8), torch.ones(8, 1), (8, 128), 'binary', 'bit', 128)\n"
        "print(backend.linear(torch.ones(1, 128), w)[0, 0].item(), backend.unavailable())\n"
        "print(backend.declines(torch.device('cpu'), None, torch.float16, 8, 128, 'binary', 'bit', 128, 'exact'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("128.0 Triton") and reason in done.stdout
