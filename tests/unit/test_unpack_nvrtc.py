"""Unpacking without Triton: the CUDA source on the processor, real NVRTC without a GPU, and all that can break.

cuda_on_host.py compiles the source and stands for the driver, so that a launch goes its whole way here.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cuda_on_host
import pytest
import torch
from cuda_on_host import Host
from forced import force
from random_weights import bits, random_weight, truth
from waits import recording

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, dispatch, eager
from bonsai_ops.kernels.triton import backend as fused
from bonsai_ops.kernels.unpack import by_nvrtc, by_triton, nvrtc, product
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
TABLES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    # rows, columns, group size: ragged planes, odd groups, less than a warp's columns
    (83, 384, 128),
    (39, 192, 96),
    (200, 64, 32),
]


def kind_of(pair: tuple[str, str], dtype: torch.dtype) -> tuple[int, torch.dtype, torch.dtype]:
    """(group size, dtypes of scale and zero) of the weight that `weight_of` makes."""
    turn = PAIRS.index(pair) + product.DTYPES.index(dtype)
    scale = TABLES[(turn + turn // 3) % 3]
    return SHAPES[turn % 3][2], scale, TABLES[turn % 3] if SCHEMES[pair[0]].has_zero else scale


def weight_of(pair: tuple[str, str], dtype: torch.dtype) -> PackedWeight:
    """Scales of both signs; the same group and tables at each call with these arguments."""
    group, table, zeros = kind_of(pair, dtype)
    rows, columns, _ = next(shape for shape in SHAPES if shape[2] == group)
    weight = random_weight(*pair, rows, columns, group, table)
    scale = weight.scale * torch.tensor([1, -1], dtype=table)[torch.arange(rows) % 2, None]
    return dataclasses.replace(weight, scale=scale, zero=None if weight.zero is None else weight.zero.to(zeros))


KINDS = [(*pair, *kind_of(pair, dtype)[:1], dtype, *kind_of(pair, dtype)[1:]) for pair in PAIRS for dtype in TABLES]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Host:
    kinds = [tuple(by_nvrtc.options(*kind)) for kind in KINDS]
    return cuda_on_host.build(tmp_path_factory.mktemp("host"), kinds)


def forget() -> None:
    by_nvrtc.forget_verified()
    by_nvrtc.unavailable.cache_clear()
    by_nvrtc._kernel.cache_clear()
    kernels.forget_failures()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def host(built: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """What is on the processor is unpacked by the source's own code, through the launch of a driver."""
    monkeypatch.setattr(nvrtc, "driver", lambda: built.driver)
    monkeypatch.setattr(nvrtc, "compile_source", built.compile_source)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("load_status", "launch_status", "launches", "loads", "bound", "unbound", "spoiled"):
        built.set(name, 0)
    return built


def write_poisoned(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """What the kernel writes into the middle of a buffer of NaN, which stays what it is around it."""
    buffer = torch.full((last - first + 2, weight.shape[1]), float("nan"), dtype=dtype)
    by_nvrtc.write(weight, first, last, buffer[1:-1])
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), "the kernel wrote outside of its output"
    return buffer[1:-1]


@pytest.mark.parametrize("dtype", product.DTYPES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_values(pair: tuple[str, str], dtype: torch.dtype, host: Host) -> None:
    """Those of the reference to the bit, and of float64; the whole weight, and runs across planes and within one."""
    weight = weight_of(pair, dtype)
    rows = weight.shape[0]
    plane = min(codecs.get_codec(pair[1]).byte_rows(rows), rows)
    expected, reference = truth(weight, dtype), weight.dequantize(dtype)
    limit = torch.finfo(dtype).eps * expected.abs().amax()
    runs = ((0, rows), (5, rows - 3), (plane - 7, plane - 2), (rows - 1, rows))
    for first, last in runs:
        found = write_poisoned(weight, first, last, dtype)
        assert torch.equal(bits(found), bits(reference[first:last]))
        assert (found.double() - expected[first:last]).abs().max() <= limit
    assert host.count("launches") == len(runs) and host.count("loads") == 1


def test_every_table_and_group_has_its_turn() -> None:
    for dtype in product.DTYPES:
        mine = [kind for kind in KINDS if kind[3] == dtype]
        assert {kind[2] for kind in mine} == {32, 96, 128} and {kind[4] for kind in mine} == set(TABLES)
    assert {kind[5] for kind in KINDS if kind[0] == "zero_point"} == set(TABLES)


def test_more_byte_rows_than_a_grid_has(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_nvrtc, "MOST_BLOCKS", 2)
    weight = weight_of(("affine", "byte"), torch.float16)
    assert torch.equal(write_poisoned(weight, 0, weight.shape[0], torch.float16), weight.dequantize(torch.float16))


def test_codes_and_tables_anywhere_in_memory(host: Host) -> None:
    """At odd addresses, with strides, and as views of something larger."""
    weight = weight_of(("affine", "nibble"), torch.float16)
    codes = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8)[1:].view(weight.codes.shape).copy_(weight.codes)
    rows, groups = weight.scale.shape
    scale = torch.zeros(rows, 2 * groups + 1, dtype=weight.scale.dtype)[:, 1::2].copy_(weight.scale)
    moved = dataclasses.replace(weight, codes=codes, scale=scale, zero=weight.zero.t().contiguous().t())
    turned = dataclasses.replace(weight, codes=weight.codes.t().contiguous().t())
    assert codes.data_ptr() % 16 and not scale.is_contiguous() and not turned.codes.is_contiguous()
    for other in (moved, turned):
        assert torch.equal(write_poisoned(other, 0, rows, torch.float16), weight.dequantize(torch.float16))


@pytest.mark.parametrize("dtype", product.DTYPES)
def test_numbers_at_the_edges(dtype: torch.dtype, host: Host) -> None:
    """Subnormal, halfway between two, too large, infinite and undefined: as torch rounds them."""
    for pair in (("affine", "nibble"), ("zero_point", "nibble"), ("binary", "bit")):
        weight = weight_of(pair, dtype)
        info = torch.finfo(weight.scale.dtype)
        few = [0.0, -0.0, info.tiny, info.tiny / 4, 2.0**-24, 2.0**-14, 2.0**-140, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
        few += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 65504, 65520, 5000, info.max, float("inf"), float("nan")]
        values = torch.tensor([*few, *(-x for x in few)]).to(weight.scale.dtype)
        scale = values[torch.arange(weight.scale.numel()) % len(values)].view(weight.scale.shape)
        zero = None if weight.zero is None else scale.flip(0).to(weight.zero.dtype)
        weight = dataclasses.replace(weight, scale=scale, zero=zero)
        found, expected = write_poisoned(weight, 0, weight.shape[0], dtype), weight.dequantize(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        known = ~expected.isnan()
        assert torch.equal(bits(found)[known], bits(expected)[known])


TERNARY_ONLY = SimpleNamespace(
    NAME="unpack",
    MODES=("exact",),
    declines=lambda call: None if call.scheme == "ternary" else "ternary weights only",
    multiply=eager.multiply,
)


def test_product_after_its_comparison(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is loaded and compared once for a kind, then each layer is one launch."""
    used = force(monkeypatch, by_nvrtc)
    for pair in PAIRS:
        weight = weight_of(pair, torch.bfloat16)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        for launches in (3, 1):
            host.set("launches", 0)
            y = kernels.linear(x, weight)
            assert torch.equal(y, torch.nn.functional.linear(x, weight.dequantize(x.dtype)))
            assert host.count("launches") == launches
    assert used == [("unpack_nvrtc", scheme) for scheme, _ in PAIRS for _ in range(2)]
    assert host.count("loads") == len(PAIRS)


@pytest.mark.parametrize("dtype", product.DTYPES)
def test_gradient_in_parts(dtype: torch.dtype, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """y W, of the whole weight and of its parts in turns, against float64."""
    for pair in PAIRS:
        weight = weight_of(pair, dtype)
        grad = torch.randn(3, 2, weight.shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = grad.double() @ truth(weight, dtype).double()
        for scratch in (1 << 20, 64 * weight.shape[1] * dtype.itemsize):
            with monkeypatch.context() as patch:
                patch.setattr(product, "SCRATCH_BYTES", scratch)
                found = by_nvrtc.multiply_transposed(grad, weight)
            assert found.shape == exact.shape and found.dtype == dtype
            assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_nothing_is_compiled_while_a_graph_is_recorded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = recording(monkeypatch)
    weight = weight_of(("affine", "nibble"), torch.float32)
    x = torch.ones(3, weight.shape[1])
    for on, loads, launches in ((True, 0, 0), (False, 1, 3), (True, 1, 4)):
        graph.on = on
        assert torch.equal(by_nvrtc.multiply(x, weight), eager.multiply(x, weight))
        assert (host.count("loads"), host.count("launches")) == (loads, launches)


def fail_to_compile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_source(*_arguments: object) -> bytes:
        raise RuntimeError('kernel.cu(7): error: identifier "half" is undefined\n1 error detected')

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)


FAULTS = {
    "compile": (fail_to_compile, 'kernel.cu(7): error: identifier "half" is undefined', "report the GPU's name"),
    "source": (
        lambda host, patch: patch.setattr(by_nvrtc, "SOURCE", by_nvrtc.SOURCE.with_name("no.cu")),
        "no.cu",
        "install this plugin again",
    ),
    "load": (lambda host, _: host.set("load_status", 222), "cuModuleLoadData", "update the NVIDIA driver"),
    "launch": (lambda host, _: host.set("launch_status", 1), "cuLaunchKernel: invalid argument (1)", "report the GPU"),
    "values": (lambda host, _: host.set("spoiled", 1), "wrote wrong values on cpu", "report affine, nibble on cpu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_leaves_the_others(
    fault: str, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference multiplies in its place, other kernels go on, and the log says the cure once."""
    break_it, cause, cure = FAULTS[fault]
    break_it(host, monkeypatch)
    used = force(monkeypatch, by_nvrtc, TERNARY_ONLY)
    ternary, affine = (weight_of(pair, torch.float32) for pair in (("ternary", "trit5"), ("affine", "nibble")))
    with caplog.at_level(logging.WARNING):
        for weight in (ternary, affine, affine, ternary):
            x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
            assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    assert used == [("unpack", "ternary")] * 2
    assert len(caplog.records) == 1 and cause in caplog.text and cure in caplog.text
    declined = kernels.resolve(kernels.call_of(x.device, x.dtype, affine)).declined["unpack_nvrtc"]
    assert cure in declined and "\n" not in declined


@pytest.mark.parametrize("status", [2, 700], ids=["memory", "context"])
@pytest.mark.parametrize("late", [False, True], ids=["compared", "used"])
@pytest.mark.parametrize("where", ["load_status", "launch_status"])
def test_errors_of_the_device_are_the_callers(
    where: str, late: bool, status: int, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised, a lost context with the cure; the kernel is asked again at the next call."""
    weight = weight_of(("affine", "nibble"), torch.float32)
    x = torch.ones(4, weight.shape[1])
    used = force(monkeypatch, by_nvrtc)
    if late:
        kernels.linear(x, weight)
        by_nvrtc._kernel.cache_clear()
    host.set(where, status)
    with pytest.raises(RuntimeError, match={2: "out of memory", 700: "illegal memory access.*restart it"}[status]):
        kernels.linear(x, weight)
    host.set(where, 0)
    used.clear()
    kernels.linear(x, weight)
    assert used == [("unpack_nvrtc", "affine")]


def test_a_thread_that_used_no_gpu_yet(host: Host) -> None:
    """The driver knows no current GPU there: the one that torch calls current becomes it."""
    host.set("unbound", 1)
    weight = weight_of(("ternary", "crumb"), torch.float16)
    assert torch.equal(write_poisoned(weight, 0, 9, torch.float16), weight.dequantize(torch.float16)[:9])
    assert host.count("bound") == 1


TAKEN = kernels.Call(torch.device("cuda"), torch.bfloat16, 9216, 3072, "affine", "nibble", 64, (6, 1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NVRTC knows compute capability 5.0 and newer, and there is a driver."""

    def numbers(known: Any) -> int:
        known[:] = (50, 61, 75, 86)
        return 0

    def count(pointer: Any) -> int:
        pointer._obj.value = 4
        return 0

    library = SimpleNamespace(nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=numbers)
    monkeypatch.setattr(nvrtc, "compiler", lambda: library)
    monkeypatch.setattr(nvrtc, "driver", SimpleNamespace)
    nvrtc.target.cache_clear()
    yield
    nvrtc.target.cache_clear()


def test_takes_every_weight_on_a_gpu(gpu: None) -> None:
    cases = itertools.product(PAIRS, product.DTYPES, (32, 96, 128, 3072), ((6, 1), (8, 9), (12, 0)))
    for pair, dtype, group, capability in cases:
        assert by_nvrtc.declines(kernels.Call(TAKEN.device, dtype, 9216, 3072, *pair, group, capability)) is None


def test_what_is_compiled_for_a_gpu(gpu: None) -> None:
    """Machine code of its generation, PTX for a newer one, and a reason for one that is too old."""
    found = {capability: nvrtc.target(capability) for capability in ((6, 1), (6, 2), (8, 9), (9, 0), (12, 0))}
    assert found == {
        (6, 1): (61, True),
        (6, 2): (61, True),
        (8, 9): (86, True),
        (9, 0): (86, False),
        (12, 0): (86, False),
    }
    with pytest.raises(RuntimeError, match=r"no code for compute capability 3\.5"):
        nvrtc.target((3, 5))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("mps")}, "the weight is on mps"),
        ({"device": torch.device("cpu")}, "the weight is on cpu"),
        (
            {"capability": (3, 5)},
            "no code for compute capability 3.5); to use it, install a PyTorch built for this GPU",
        ),
        ({"capability": None}, "unknown"),
        ({"dtype": torch.float64}, "not float64"),
        ({"rows": 2**31}, "too large"),
    ],
)
def test_declines_with_a_reason(change: dict, reason: str, gpu: None) -> None:
    assert reason in by_nvrtc.declines(dataclasses.replace(TAKEN, **change))


def test_declines_where_nothing_can_be_compiled(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> ctypes.CDLL:
        raise OSError("libcuda.so.1: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "driver", missing)
        assert "the CUDA driver cannot be loaded (libcuda.so.1: " in by_nvrtc.declines(TAKEN)
    for broken, reason in ((missing, "NVRTC cannot be loaded"), (lambda: SimpleNamespace(), "could not compile")):
        forget()
        nvrtc.target.cache_clear()
        monkeypatch.setattr(nvrtc, "compiler", broken)
        assert reason in by_nvrtc.declines(TAKEN)
    forget()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA GPUs alone" in by_nvrtc.declines(dataclasses.replace(TAKEN, capability=None))


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(nvrtc, "compiler", nvrtc.compiler.__wrapped__)
    nvrtc.target.cache_clear()
    assert "this PyTorch was not built for CUDA" in by_nvrtc.declines(dataclasses.replace(TAKEN, capability=(9, 9)))


def test_after_triton_before_the_reference(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what Triton has no code for, and everything where Triton is missing."""
    choice = kernels.resolve(TAKEN)
    assert choice.backend is by_nvrtc and set(choice.declined) == {"plane", "triton", "cpu", "unpack"}
    monkeypatch.setattr(fused, "unavailable", lambda: "Triton is not installed; to use it, pip install triton")
    newer = dataclasses.replace(TAKEN, capability=(7, 5))
    assert by_triton.declines(newer) is not None and kernels.resolve(newer).backend is by_nvrtc
    assert dispatch.resolve_transposed(TAKEN).backend is dispatch.resolve_transposed(newer).backend is by_nvrtc
    with kernels.use_backend("unpack_nvrtc"):
        assert kernels.resolve(dataclasses.replace(TAKEN, capability=(8, 6))).backend is by_nvrtc


def real_compiler() -> ctypes.CDLL:
    try:
        return nvrtc.compiler()
    except OSError as error:
        pytest.skip(f"this PyTorch has no NVRTC: {error}")


@pytest.mark.parametrize("dtype", product.DTYPES)
def test_nvrtc_compiles_the_source(dtype: torch.dtype) -> None:
    """To machine code for the oldest and the newest GPU that it knows, to PTX for one that is newer."""
    real_compiler()
    for pair, capability in zip((PAIRS[1], PAIRS[5]), ((7, 5), (12, 0)), strict=True):
        code = by_nvrtc.compiled(capability, *pair, 128, dtype, torch.bfloat16, torch.float16)
        assert code.startswith(b"\x7fELF") and b"unpack" in code
    code = by_nvrtc.compiled((99, 0), *PAIRS[7], 96, dtype, torch.float32, torch.float32)
    assert b".entry unpack(" in code and code.endswith(b"\0")


def test_nvrtc_says_what_is_wrong() -> None:
    real_compiler()
    with pytest.raises(RuntimeError, match=r'kernel\.cu\(1\): error: identifier "y" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void unpack(float *x) { *x = y; }', (8, 6))
    assert "report the GPU's name" in by_nvrtc.explained(RuntimeError("kernel.cu(1): error")).cure
    assert isinstance(by_nvrtc.explained(RuntimeError("x")), BackendError)
