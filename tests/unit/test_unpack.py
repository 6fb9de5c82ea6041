"""Unpacking in one launch: how values are multiplied, and that what breaks costs nothing else.

Here torch writes the values; what the kernel writes, test_unpack_kernel.py looks at.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from forced import force
from random_weights import random_weight
from waits import Waits, recording

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, dispatch, eager
from bonsai_ops.kernels.triton import backend as fused
from bonsai_ops.kernels.unpack import by_nvrtc, by_triton, product
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
needs_triton = pytest.mark.skipif(fused.unavailable() is not None, reason=str(fused.unavailable()))


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    by_triton.forget_verified()
    kernels.forget_failures()
    yield
    by_triton.forget_verified()
    kernels.forget_failures()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(rows of the weight, first, last) of what the kernel was asked for; torch writes the right values."""
    asked: list[tuple] = []

    def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
        asked.append((weight.shape[0], first, last))
        out.copy_(weight.dequantize(out.dtype)[first:last])

    monkeypatch.setattr(by_triton, "write", write)
    return asked


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_in_parts(dtype: torch.dtype, bias: bool, writes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight larger than the scratch takes turns in it: the same product, and no more memory at a time."""
    weight = random_weight("affine", "byte", 1000, 256)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    shift = torch.linspace(-1, 1, 1000) if bias else None
    whole = by_triton.multiply(x, weight, shift)
    monkeypatch.setattr(product, "SCRATCH_BYTES", 200 * 256 * dtype.itemsize)
    writes.clear()
    parts = by_triton.multiply(x, weight, shift)
    assert [(first, last) for _, first, last in writes] == [(lo, min(lo + 192, 1000)) for lo in range(0, 1000, 192)]
    exact = x.double() @ weight.dequantize(dtype).double().t() + (0 if shift is None else shift.double())
    for found in (whole, parts):
        assert found.shape == (2, 5, 1000) and found.dtype == dtype
        assert (found.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("scratch", [1 << 30, 200 * 256 * 4])
def test_autocast_changes_no_dtype(scratch: int, writes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual is added to the result in place, in the dtype of the input: whole and in parts."""
    monkeypatch.setattr(product, "SCRATCH_BYTES", scratch)
    weight = random_weight("affine", "byte", 1000, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert by_triton.multiply(torch.ones(3, 256), weight).dtype == torch.float32
        assert by_triton.multiply_transposed(torch.ones(3, 1000), weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_parts(dtype: torch.dtype, writes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """y W: the parts of a weight larger than the scratch take turns in it, and their products are summed in fp32."""
    weight = random_weight("affine", "byte", 1000, 256)
    grad = torch.randn(2, 5, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = grad.double() @ weight.dequantize(dtype).double()
    whole = by_triton.multiply_transposed(grad, weight)
    monkeypatch.setattr(product, "SCRATCH_BYTES", 200 * 256 * dtype.itemsize)
    writes.clear()
    parts = by_triton.multiply_transposed(grad, weight)
    assert [(first, last) for _, first, last in writes] == [(lo, min(lo + 192, 1000)) for lo in range(0, 1000, 192)]
    for found in (whole, parts):
        assert found.shape == (2, 5, 256) and found.dtype == dtype
        assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_gradients_of_any_form(writes: list) -> None:
    """None, strides, and the same value everywhere, as `sum` gives it; a residual would be left out."""
    weight = random_weight("ternary", "trit5", 83, 384)
    whole = torch.randn(4, 5, 100, generator=torch.Generator().manual_seed(2))
    for grad in (whole[:0, :, :83], whole[::2, 1:3, 17:], whole[0, 0, :83], torch.ones(()).expand(3, 83)):
        found = by_triton.multiply_transposed(grad, weight)
        exact = grad.double() @ weight.dequantize().double()
        assert found.shape == exact.shape and (found - exact).norm() <= 1e-6 * exact.norm()
    with pytest.raises(ValueError, match="residual"):
        by_triton.multiply_transposed(
            torch.ones(1, 83), dataclasses.replace(weight, up=torch.ones(83, 2), down=torch.ones(2, 384))
        )


def test_each_kind_is_compared_once(writes: list) -> None:
    """A kind: scheme, codec, group, dtypes. The comparison writes in two parts; the layers after it only themselves."""
    x = torch.ones(2, 256, dtype=torch.float16)
    probe = [(83, 0, 27), (83, 27, 83)]
    for weight in (random_weight("ternary", "trit5", 40, 256), random_weight("zero_point", "nibble", 40, 256, 64)):
        for y in (x, x.bfloat16()):
            by_triton.multiply(y, weight)
            by_triton.multiply(y, weight)
            assert writes == [*probe, (40, 0, 40), (40, 0, 40)]
            writes.clear()


def test_no_product_waits_after_the_first(writes: list) -> None:
    weight, x = random_weight("affine", "nibble", 136, 256), torch.ones(3, 256, dtype=torch.bfloat16)
    for first in (True, False):
        with Waits() as waits:
            by_triton.multiply(x, weight, torch.ones(136))
        assert bool(waits.found) == first


def test_a_recorded_kernel_is_compared_later(writes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph records comes from the reference until a call outside has compared the kernel."""
    graph = recording(monkeypatch)
    weight, x = random_weight("affine", "nibble", 136, 256), torch.ones(3, 256)
    grad = torch.ones(3, 136)
    for on, expected in ((True, 0), (False, 4), (True, 2)):
        graph.on = on
        assert torch.equal(by_triton.multiply(x, weight), eager.multiply(x, weight))
        found = by_triton.multiply_transposed(grad, weight)
        assert torch.allclose(found, eager.multiply_transposed(grad, weight), rtol=1e-5, atol=1e-4)
        assert len(writes) == expected
        writes.clear()


def test_nothing_is_kept(writes: list) -> None:
    """The scratch is torch's again when a product is done."""
    import gc
    import weakref

    seen: list[weakref.ref] = []
    weight, x = random_weight("ternary", "crumb", 136, 256), torch.ones(3, 256)
    torchs = by_triton.write

    def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
        seen.append(weakref.ref(out))
        torchs(weight, first, last, out)

    product.multiply(x, weight, None, write, set(), fused.explained)
    gc.collect()
    assert len(seen) == 3 and all(ref() is None for ref in seen)


TERNARY_ONLY = SimpleNamespace(
    NAME="fused",
    MODES=("exact",),
    declines=lambda call: None if call.scheme == "ternary" else "ternary weights only",
    multiply=eager.multiply,
)


@needs_triton
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ImportError("cannot import name 'language'"), "reinstall Triton"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install a C compiler"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "reinstall Triton"),
        (RuntimeError("out of resource: shared memory"), "report the GPU's name"),
        (None, "wrote wrong values on cpu; to use it, update this plugin and report affine, nibble on cpu"),
    ],
    ids=["import", "compile", "launch", "resources", "values"],
)
def test_what_breaks_leaves_the_others(
    fault: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference multiplies in its place, the fused kernel goes on, and the log says the cure once."""

    def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
        if fault is not None:
            raise fault
        out.copy_(weight.dequantize(out.dtype)[first:last])
        out[-1, -1] += 1

    monkeypatch.setattr(by_triton, "write", write)
    used = force(monkeypatch, by_triton, TERNARY_ONLY)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    ternary, affine = random_weight("ternary", "trit5", 40, 256), random_weight("affine", "nibble", 40, 256)
    with caplog.at_level(logging.WARNING):
        for weight in (ternary, affine, affine, ternary):
            assert torch.equal(kernels.linear(x, weight), eager.multiply(x, weight))
    assert used == [("fused", "ternary")] * 2
    assert len(caplog.records) == 1 and said in caplog.text
    assert said in kernels.resolve(kernels.call_of(x.device, x.dtype, affine)).declined["unpack"]


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 108.00 MiB"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=["memory", "context"],
)
@pytest.mark.parametrize("late", [False, True], ids=["compared", "used"])
def test_errors_of_the_device_are_the_callers(
    late: bool, fault: Exception, writes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised, in the comparison and after it; the kernel is asked again at the next call."""
    x, weight = torch.ones(4, 256), random_weight("affine", "nibble", 40, 256)
    used, torchs = force(monkeypatch, by_triton), by_triton.write
    if late:
        kernels.linear(x, weight)

    def write(*_arguments: object) -> None:
        raise fault

    monkeypatch.setattr(by_triton, "write", write)
    with pytest.raises(RuntimeError) as found:
        kernels.linear(x, weight)
    lost = type(found.value) is kernels.LostDeviceError
    assert (found.value.__cause__ if lost else found.value) is fault and lost == ("illegal" in str(fault))
    monkeypatch.setattr(by_triton, "write", torchs)
    used.clear()
    kernels.linear(x, weight)
    assert used == [("unpack", "affine")]


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("left out", lambda out, first: out[-1].fill_(float("nan"))),
        ("one bit of one value", lambda out, first: out.view(torch.int16)[3, 5].bitwise_xor_(1)),
        ("a shifted run", lambda out, first: out.copy_(out.roll(1, 0)) if first else None),
        ("written before", lambda out, first: out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()),
        ("written behind", lambda out, first: out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()),
    ],
)
def test_wrong_values_are_seen(what: str, spoil: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
        out.copy_(weight.dequantize(out.dtype)[first:last])
        spoil(out, first)

    monkeypatch.setattr(by_triton, "write", write)
    for pair in PAIRS:
        with pytest.raises(BackendError, match=rf"unpacks {pair[0]} weights stored as {pair[1]} wrote wrong values"):
            by_triton.multiply(torch.ones(2, 256, dtype=torch.float16), random_weight(*pair, 40, 256))


TAKEN = kernels.Call(torch.device("cuda"), torch.bfloat16, 9216, 3072, "affine", "nibble", 64, (7, 5))


@needs_triton
def test_takes_every_weight_on_a_gpu() -> None:
    for pair in PAIRS:
        for dtype in DTYPES:
            for group in (32, 96, 128, 3072):
                call = dataclasses.replace(TAKEN, scheme=pair[0], codec=pair[1], dtype=dtype, group_size=group)
                assert by_triton.declines(call) is None


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("scheme", ["affine", "zero_point"])
def test_text_encoders_are_unpacked_in_one_launch(scheme: str, capability: tuple[int, int], dtype: torch.dtype) -> None:
    """The largest layer of Qwen3-4B in 4 bits as MLX and HQQ pack it; without Triton it is the other one's."""
    call = dataclasses.replace(
        TAKEN, rows=9728, columns=2560, scheme=scheme, dtype=dtype, group_size=64, capability=capability
    )
    choice = kernels.resolve(call)
    assert (choice.backend, choice.mode) == (by_triton, "exact") and by_triton.NAME not in choice.declined
    assert (
        by_nvrtc.LIMITS.unmet(call) is None and by_nvrtc.LIMITS.unmet(dataclasses.replace(call, group_size=128)) is None
    )


@needs_triton
def test_gradients_on_a_gpu_are_unpacked_in_one_launch() -> None:
    """Also where a fused kernel multiplies, which has none for them; in fp32 and in every mode; named or not."""
    for scheme, codec, group in (("ternary", "trit5", 128), ("binary", "bit", 128), ("affine", "nibble", 64)):
        for dtype, mode in itertools.product(DTYPES, kernels.MODES):
            call = dataclasses.replace(
                TAKEN, scheme=scheme, codec=codec, group_size=group, dtype=dtype, capability=(8, 6), mode=mode
            )
            choice = dispatch.resolve_transposed(call)
            assert choice.backend is by_triton and choice.mode == kernels.EXACT and set(choice.declined) == {"cpu"}
    with kernels.use_backend("eager"):
        assert dispatch.resolve_transposed(call).backend is eager


def test_a_gradient_goes_on_where_the_kernel_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By kernels.linear: the kernel is asked for the gradient of what another multiplied; then by the reference."""
    asked: list[str] = []

    def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        asked.append(weight.scheme)
        raise BackendError("the kernel cannot be started", "update the driver")

    taking = SimpleNamespace(
        NAME="unpack", MODES=("exact",), declines=eager.declines, multiply_transposed=multiply_transposed
    )
    monkeypatch.setattr(dispatch, "TRANSPOSING", (taking, eager))
    weight, x = random_weight("ternary", "trit5", 136, 256), torch.randn(3, 256, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            x.grad = None
            kernels.linear(x, weight).sum().backward()
    assert asked == ["ternary"] and len(caplog.records) == 1 and "update the driver" in caplog.text
    assert torch.allclose(x.grad, torch.ones(3, 136) @ weight.dequantize(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("mps")}, "the weight is on mps"),
        ({"capability": (6, 1)}, "capability 6.1"),
        ({"capability": None}, "unknown"),
        ({"dtype": torch.float64}, "not float64"),
        ({"rows": 2**26}, "too large"),
    ],
)
def test_declines_with_a_reason(change: dict, reason: str) -> None:
    assert reason in by_triton.declines(dataclasses.replace(TAKEN, **change))


@needs_triton
@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 192, 256, 320, 3072, 12288])
def test_tiles_fit_every_group(group: int) -> None:
    """What a program owns lies in one group, in powers of two, and is about the same for all."""
    given = by_triton.constants("affine", "nibble", group, torch.float16)
    owned = given["BLOCK_K"] * given["STEPS"]
    assert group % owned == 0 and 32 <= owned <= 128
    assert all(given[name] & given[name] - 1 == 0 for name in ("BLOCK_N", "BLOCK_K"))
    assert 2048 < owned * given["BLOCK_N"] <= 4096
