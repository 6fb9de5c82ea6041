"""Choosing a backend, saying why others declined, surviving one that breaks; each backend against the reference."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from random_weights import random_weight, truth

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, cpu, dispatch, eager, is_the_devices, machine
from bonsai_ops.tools.bench.timer import run_with_scratch
from bonsai_ops.weights.packed_weight import PackedWeight

SCHEME = {"bit": "binary", "trit5": "ternary", "crumb": "ternary"}
"""{codec: scheme} of what the fast backends take."""
WITH_ZEROS = [
    ("affine", "bit"),
    ("affine", "crumb"),
    ("affine", "nibble"),
    ("affine", "byte"),
    ("zero_point", "nibble"),
]
SHAPES = [(1, 128), (8, 256), (130, 384), (384, 512), (1000, 1024)]


@pytest.fixture
def no_failures() -> Iterator[None]:
    kernels.forget_failures()
    yield
    kernels.forget_failures()


@pytest.mark.parametrize("mode", ["exact", "a8"])
@pytest.mark.parametrize("name", SCHEME)
def test_cpu_backend_in_many_products(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows across planes, pieces of chunks and tokens in turns: the same values as in one go."""
    weight = random_weight(SCHEME[name], name, 1000, 256)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = cpu.multiply(x, weight, mode=mode)
    for bound, value in {
        "VALUE_BYTES": 1 << 16,
        "PIECE_BYTES": 3000,
        "A8_TOKENS": 7,
        "A8_ROWS": 64,
        "A8_PIECE": 3000,
        "A8_BLOCK": 999,
    }.items():
        monkeypatch.setattr(cpu, bound, value)
    assert torch.allclose(cpu.multiply(x, weight, mode=mode).float(), whole.float(), rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("mode", ["exact", "a8"])
@pytest.mark.parametrize("name", SCHEME)
@pytest.mark.parametrize(("dtype", "rows", "columns"), [(torch.bfloat16, 1600, 3072), (torch.float32, 400, 12288)])
def test_cpu_backend_stays_within_its_scratch(
    name: str, mode: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Real widths, 1536 tokens, each dtype with one of them; rows of more than one product, for which time grows."""
    weight, x = random_weight(SCHEME[name], name, rows, columns), torch.ones(1536, columns, dtype=dtype)
    found, nbytes = run_with_scratch(lambda: cpu.multiply(x, weight, mode=mode), "cpu")
    assert found.shape == (1536, rows)
    assert 5_000_000 < nbytes <= cpu.SCRATCH_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("scheme", "codec"), WITH_ZEROS)
def test_cpu_backend_with_zeros(scheme: str, codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 and a decoder of its own, in one product and in many: rows across planes, pieces of chunks."""
    for shape in ((1000, 256, 64), (83, 384, 128), (1, 96, 32)):
        weight = random_weight(scheme, codec, *shape)
        x = torch.randn(50, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        values, y = truth(weight, dtype), torch.randn(6, shape[0]).to(dtype)
        for piece, rows in ((1 << 19, 384), (3000, 64)):
            monkeypatch.setattr(cpu, "ZERO_PIECE", piece)
            monkeypatch.setattr(cpu, "ZERO_ROWS", rows)
            limit = 2**-7 if dtype == torch.bfloat16 else 5e-6
            for found, exact in (
                (cpu.multiply(x, weight), x.double() @ values.t()),
                (cpu.multiply_transposed(y, weight), y.double() @ values),
            ):
                assert float((found.double() - exact).norm() / exact.norm()) < limit, (shape, piece)


@pytest.mark.parametrize(("dtype", "rows", "columns"), [(torch.bfloat16, 3840, 3072), (torch.float32, 448, 12288)])
def test_cpu_backend_stays_within_its_scratch_with_zeros(
    dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest groups, and as many rows together as for any number of tokens."""
    monkeypatch.setattr(cpu, "ZERO_ROWS", rows)
    weight, x = random_weight("affine", "nibble", rows, columns, 32), torch.ones(4, columns, dtype=dtype)
    found, nbytes = run_with_scratch(lambda: cpu.multiply(x, weight), "cpu")
    assert found.shape == (4, rows)
    assert 20_000_000 < nbytes <= cpu.SCRATCH_BYTES


def test_choice_and_reasons() -> None:
    """fp16 goes to the reference with the reason; bf16 and fp32 to the CPU's own path where the CPU can."""
    weight = random_weight("ternary", "trit5", 128, 256)
    device = torch.device("cpu")
    assert kernels.resolve(kernels.call_of(device, torch.float32, weight)).backend.NAME == "cpu"
    choice = kernels.resolve(kernels.call_of(device, torch.float16, weight))
    assert choice.backend.NAME == "eager"
    assert "float16" in choice.declined["cpu"]
    choice = kernels.resolve(kernels.call_of(device, torch.bfloat16, weight))
    if machine.cpu_has_fast_bf16():
        assert choice.backend.NAME == "cpu"
    else:
        assert "AVX-512 BF16" in choice.declined["cpu"]
    for scheme, codec in WITH_ZEROS:
        call = kernels.Call(device, torch.float32, 128, 256, scheme, codec, 64)
        assert kernels.resolve(call).backend.NAME == "cpu"
        choice = kernels.resolve(dataclasses.replace(call, mode="a8"))
        assert (choice.backend.NAME, choice.mode) == ("cpu", "exact")
        assert f"cpu: mode a8 has no kernel for {scheme} weights stored as {codec}" in choice.declined["a8"]


@pytest.mark.parametrize(
    ("changes", "reason", "instead"),
    [
        ({"capability": (7, 5)}, "compute capability 7.5", "unpack"),
        ({"device": torch.device("mps")}, "the weight is on mps", "eager"),
        ({"device": torch.device("xpu")}, "the weight is on xpu", "eager"),
        ({"columns": 96, "group_size": 96}, "groups of 128", "unpack"),
        ({"dtype": torch.float32}, "float16 and bfloat16", "unpack"),
        ({"scheme": "affine", "codec": "nibble"}, "no kernel for affine weights stored as nibble", "unpack"),
    ],
    ids=["sm_75", "mps", "xpu", "columns", "fp32", "affine"],
)
def test_why_not_triton(changes: dict, reason: str, instead: str) -> None:
    """Unpacking takes what the fused kernels decline, the reference what both do, and the reason is said."""
    pytest.importorskip("triton", reason="Triton is not installed")
    call = kernels.Call(torch.device("cuda", 0), torch.bfloat16, 128, 256, "ternary", "trit5", 128, (8, 6))
    assert kernels.resolve(call).backend.NAME == "triton"
    choice = kernels.resolve(dataclasses.replace(call, **changes))
    assert instead == choice.backend.NAME
    assert reason in choice.declined["triton"]
    if instead == "eager":
        assert choice.declined["unpack"] == reason


def test_why_not_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without it computes in fp32 and says so; bf16 by force goes to the reference, with the cure."""
    monkeypatch.setattr(machine, "cpu_has_fast_bf16", lambda: False)
    call = kernels.Call(torch.device("cpu"), torch.float32, 128, 256, "ternary", "trit5", 128)
    choice = kernels.resolve(call)
    assert choice.backend.NAME == "cpu" and choice.declined["bf16"] == cpu.NO_BF16
    choice = kernels.resolve(dataclasses.replace(call, dtype=torch.bfloat16))
    assert choice.backend.NAME == "eager" and "compute_dtype fp32 is faster" in choice.declined["cpu"]


def test_a_mode_that_nothing_offers_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that is best in exact; the reasons stand under the mode."""
    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: False)
    call = kernels.Call(torch.device("cpu"), torch.float32, 128, 256, "ternary", "trit5", 128)
    for mode, reason in (("a8", "no AVX-512 VNNI"), ("fp16_accumulate", "it has no mode fp16_accumulate")):
        choice = kernels.resolve(dataclasses.replace(call, mode=mode))
        assert (choice.backend.NAME, choice.mode) == ("cpu", "exact")
        assert "triton: the weight is on cpu; cpu: " in choice.declined[mode] and reason in choice.declined[mode]
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.randn(3, 256)
    assert torch.equal(kernels.linear(x, weight, mode="a8"), kernels.linear(x, weight))
    assert kernels.resolve(call).mode == "exact" and "a8" not in kernels.resolve(call).declined
    with pytest.raises(ValueError, match="mode 'fast' is unknown, expected one of exact, fp16_accumulate, a8"):
        kernels.resolve(dataclasses.replace(call, mode="fast"))


def test_a_mode_goes_before_a_faster_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that comes first but lacks the mode is passed over for one that has it."""
    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: True)
    exact_only = SimpleNamespace(NAME="first", MODES=("exact",), declines=eager.declines, multiply=eager.multiply)
    monkeypatch.setattr(dispatch, "BACKENDS", (exact_only, *dispatch.BACKENDS))
    call = kernels.Call(torch.device("cpu"), torch.float32, 128, 256, "ternary", "trit5", 128, mode="a8")
    choice = kernels.resolve(call)
    assert (choice.backend.NAME, choice.mode, choice.declined["first"]) == ("cpu", "a8", "it has no mode a8")
    assert kernels.resolve(dataclasses.replace(call, mode="exact")).backend.NAME == "first"


def test_forcing_a_backend() -> None:
    weight = random_weight("binary", "bit", 128, 256)
    call = kernels.call_of(torch.device("cpu"), torch.bfloat16, weight)
    with kernels.use_backend("eager"):
        choice = kernels.resolve(call)
        assert choice.backend.NAME == "eager"
        assert choice.declined["cpu"] == "eager is asked for"
    with pytest.raises(ValueError, match="backend 'fast' is unknown, expected one of"), kernels.use_backend("fast"):
        pass


def test_environment_override() -> None:
    """BONSAI_BACKEND=eager holds for a process; a wrong name is refused."""
    program = (
        "import torch; from bonsai_ops import kernels; "
        "call = kernels.Call(torch.device('cpu'), torch.bfloat16, 128, 128, 'binary', 'bit', 128); "
        "print(kernels.resolve(call).backend.NAME)"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        import os

        variables = {**os.environ, dispatch.OVERRIDE: value}
        return subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
        )

    assert run("eager").stdout.strip() == "eager"
    wrong = run("quick")
    assert wrong.returncode != 0
    assert "backend 'quick' is unknown" in wrong.stderr


class Breaking:
    """A backend `fused` that takes every call and raises in the given modes; elsewhere it answers as the reference."""

    NAME, MODES = "fused", kernels.MODES

    def __init__(self, errors: dict[str, Exception]) -> None:
        self.errors = errors
        self.launches: list[str] = []

    def declines(self, call: kernels.Call) -> str | None:
        return None

    def multiply(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        self.launches.append(mode)
        if mode in self.errors:
            raise self.errors[mode]
        return eager.multiply(x, weight, bias)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "BACKENDS", (self, dispatch.BACKENDS[-1]))


def test_broken_backend_costs_speed_not_the_picture(
    no_failures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises at its first launch is left out from then on, said once, and the result is the reference's."""
    fused = Breaking({"exact": FileNotFoundError("no compiler here")})
    fused.install(monkeypatch)
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.randn(4, 256)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    assert fused.launches == ["exact"]
    assert [r.getMessage() for r in caplog.records if "fused" in r.getMessage()] == [
        "Bonsai: backend fused failed on cpu in mode exact: no compiler here. Going on without it, slower"
    ]
    call = kernels.call_of(x.device, x.dtype, weight)
    assert "no compiler here" in kernels.resolve(call).declined["fused"]
    kernels.forget_failures()
    assert kernels.resolve(call).backend.NAME == "fused"


def test_a_failure_is_one_of_a_mode(no_failures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend goes on in the others, and the reason stands under the mode."""
    fused = Breaking({"a8": BackendError("it computed wrong values", "report it")})
    fused.install(monkeypatch)
    weight, x = random_weight("ternary", "crumb", 128, 256), torch.randn(4, 256)
    for mode in ("a8", "exact", "a8"):
        assert torch.equal(kernels.linear(x, weight, mode=mode), eager.multiply(x, weight))
    assert fused.launches == ["a8", "exact", "exact", "exact"]
    choice = kernels.resolve(kernels.call_of(x.device, x.dtype, weight, "a8"))
    assert (choice.backend.NAME, choice.mode) == ("fused", "exact")
    assert choice.declined["a8"] == "fused: failed on cpu in mode a8: it computed wrong values; to use it, report it"


def test_one_cure_is_said_once(
    no_failures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing compiler fails in every mode, with another file name each time."""
    modes = ("fp16_accumulate", "exact")
    fused = Breaking({mode: BackendError(f"gcc: /tmp/{mode}", "install a C compiler") for mode in modes})
    fused.install(monkeypatch)
    kernels.linear(torch.randn(4, 256), random_weight("ternary", "crumb", 128, 256), mode="fp16_accumulate")
    assert fused.launches == list(modes)
    assert len(caplog.records) == 1 and "install a C compiler" in caplog.text


def test_a_choice_is_made_once(no_failures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each kind of call: device, dtype, form and shape of the weight, mode; again where failures are forgotten."""
    asked: list[kernels.Call] = []
    fused = Breaking({})
    monkeypatch.setattr(fused, "declines", asked.append)
    fused.install(monkeypatch)
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.randn(4, 256)
    kinds = [
        (x, weight, "exact"),
        (x.bfloat16(), weight, "exact"),
        (x.to("meta"), weight.to("meta"), "exact"),
        (x, random_weight("ternary", "trit5", 136, 256), "exact"),
        (x, random_weight("ternary", "crumb", 128, 256), "exact"),
        (x, random_weight("affine", "crumb", 128, 256), "exact"),
        (x, random_weight("ternary", "trit5", 128, 256, 64), "exact"),
        (x, weight, "a8"),
    ]
    for number, (given, packed, mode) in enumerate(kinds, start=1):
        for tokens in (given, given[:2], given):
            kernels.linear(tokens, packed, mode=mode)
        assert len(asked) == len(set(asked)) == number
        assert asked[-1] == kernels.call_of(given.device, given.dtype, packed, mode)
    with kernels.use_backend("eager"):
        kernels.linear(x, weight)
    assert len(fused.launches) == 3 * len(kinds)
    kernels.linear(x, weight)
    assert len(fused.launches) == 3 * len(kinds) + 1 and len(asked) == len(kinds)
    kernels.forget_failures()
    kernels.linear(x, weight)
    assert len(asked) == len(kinds) + 1


def test_a_kept_choice_ends_with_its_backend(
    no_failures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that worked and then breaks is left out for every kind of call on that device and mode; said once."""
    fused = Breaking({})
    fused.install(monkeypatch)
    weights = [random_weight("ternary", name, 128, 256) for name in ("trit5", "crumb")]
    x = torch.randn(4, 256)
    for weight in weights:
        kernels.linear(x, weight)
    fused.errors["exact"] = RuntimeError("broken now")
    for weight in (*weights, *weights):
        assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    assert len(fused.launches) == 3 and len(caplog.records) == 1


def test_a_kept_choice_ends_with_what_it_rests_on(no_failures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that the processor lost is exact; a backend that came is used."""
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.randn(4, 256)
    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: True)
    exact = kernels.linear(x, weight)
    assert not torch.equal(kernels.linear(x, weight, mode="a8"), exact)
    monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: False)
    assert torch.equal(kernels.linear(x, weight, mode="a8"), exact)
    fused = Breaking({})
    fused.install(monkeypatch)
    kernels.linear(x, weight)
    assert fused.launches == ["exact"]


DEVICE_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
    RuntimeError("Triton Error [HIP]:  Code: 700, Messsage: an illegal memory access was encountered"),
    RuntimeError("cudaErrorLaunchFailure"),
    RuntimeError("CUDA_ERROR_LAUNCH_FAILED"),
    RuntimeError("CUDA_ERROR_ASSERT"),
]
MEMORY_ERRORS = 6
if hasattr(torch, "AcceleratorError"):
    DEVICE_ERRORS.append(torch.AcceleratorError("CUDA error: an illegal instruction was encountered"))


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=repr)
def test_errors_of_the_device_are_the_callers(
    error: Exception, no_failures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Raised, and the backend is asked again at the next call. A lost device is called that, with the cure."""
    fused = Breaking({"exact": error})
    fused.install(monkeypatch)
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.randn(4, 256)
    for _ in range(2):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            kernels.linear(x, weight)
        if error in DEVICE_ERRORS[:MEMORY_ERRORS]:
            assert found.value is error
            continue
        assert type(found.value) is kernels.LostDeviceError and found.value.__cause__ is error
        said = str(found.value)
        assert str(error) in said and "restart it" in said and "fused" not in said and "\n" not in said
    assert fused.launches == ["exact", "exact"] and not caplog.records


def test_arguments_that_do_not_fit_retire_nothing(no_failures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Breaking({})
    fused.install(monkeypatch)
    weight, x = random_weight("ternary", "trit5", 128, 256), torch.ones(4, 256)
    with pytest.raises(ValueError, match="input has 255 columns, the packed weight 256"):
        kernels.linear(x[:, :255], weight)
    with pytest.raises(ValueError, match=r"bias has shape \(127,\), the packed weight 128 rows"):
        kernels.linear(x, weight, torch.ones(127))
    with pytest.raises(ValueError, match="bias is on meta, the packed weight on cpu"):
        kernels.linear(x, weight, torch.ones(128, device="meta"))
    assert kernels.linear(x, weight).shape == (4, 128) and fused.launches == ["exact"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("CUDA error: too many resources requested for launch"),
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, "ptxas"),
        BackendError("a kernel computed wrong values", "report it"),
    ],
    ids=repr,
)
def test_errors_of_a_kernel_are_not_the_devices(error: Exception) -> None:
    assert not is_the_devices(error)
