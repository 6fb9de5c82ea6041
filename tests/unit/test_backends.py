"""Every backend of dispatch.BACKENDS keeps the protocol of kernels/call.py: what it declares, and what it computes.

Values are compared with the float64 product wherever a backend does not decline on this machine, on every device that
it has; processors count as fast. A new backend needs no word here. Triton's kernels run on a GPU, and on the CPU in the
child of test_triton.py, in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from interpreted import INTERPRETED
from random_weights import random_weight

from bonsai_ops import kernels
from bonsai_ops.kernels import dispatch, machine
from bonsai_ops.kernels.call import ERRORS, Backend
from bonsai_ops.kernels.triton import configs
from bonsai_ops.weights import codec as codecs
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

BACKENDS = [b for b in dispatch.BACKENDS if not INTERPRETED or b.NAME in ("plane", "triton", "unpack")]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
"""Relative error of mode exact: rounding of the product and of the sum with the bias; fp32: the order of the sum."""
HALVES = (torch.bfloat16, torch.float16)
SHAPES = [
    # rows, columns, group size: one row, fewer rows than a byte, ragged planes, several products
    (1, 128, 128),
    (83, 384, 128),
    *([] if INTERPRETED else [(3, 256, 32), (39, 128, 128), (136, 256, 64), (1000, 1024, 128), (384, 512, 32)]),
]


def fast_processor() -> contextlib.ExitStack:
    """Within the block this processor counts as fast at everything."""
    stack = contextlib.ExitStack()
    for name in ("cpu_has_fast_bf16", "cpu_has_fast_int8"):
        stack.enter_context(mock.patch.object(machine, name, lambda: True))
    return stack


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with fast_processor():
        yield


def call_for(
    device: str, dtype: torch.dtype, pair: tuple[str, str], mode: str, shape: tuple[int, int, int] = (83, 384, 128)
) -> kernels.Call:
    capability = None
    if device == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 6)
    rows, columns, group = shape
    return kernels.Call(torch.device(device), dtype, rows, columns, *pair, group, capability, mode)


def taken() -> Iterator[object]:
    """(backend, mode, device, scheme and codec, dtype) of all that is not declined here."""
    with fast_processor():
        for backend in BACKENDS:
            for mode, device, pair, dtype in itertools.product(backend.MODES, DEVICES, PAIRS, TOLERANCE):
                if backend.declines(call_for(device, dtype, pair, mode)) is None:
                    name = "-".join((backend.NAME, mode, device, *pair, str(dtype).removeprefix("torch.")))
                    yield pytest.param(backend, mode, device, pair, dtype, id=name)


def is_turn(case: object, pairs: list[tuple[str, str]]) -> bool:
    """In the interpreter all kernels but the exact ones of "triton" have one dtype, all but those of it `pairs` alone.

    test_triton.py has the modes that round x in both dtypes.
    """
    backend, mode, _, pair, dtype = case.values
    if not INTERPRETED:
        return True
    if backend.NAME == "triton":
        return mode not in configs.ROUNDED or dtype == HALVES[pair[0] == "ternary"]
    return pair in pairs and dtype == list(TOLERANCE)[PAIRS.index(pair) % len(TOLERANCE)]


TAKEN = list(taken())
FEW = [("ternary", "trit5"), ("affine", "byte"), ("zero_point", "nibble")]
"""Whose products differ in nothing but the values, which test_unpack_kernel.py and `test_exact_values` look at."""
ARGUMENTS = ("backend", "mode", "device", "pair", "dtype")
everything_taken = pytest.mark.parametrize(ARGUMENTS, [case for case in TAKEN if is_turn(case, FEW)])
everything_exact = pytest.mark.parametrize(
    ARGUMENTS, [case for case in TAKEN if case.values[1] == kernels.EXACT and is_turn(case, PAIRS)]
)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.NAME)


def random_input(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def check(backend: Backend, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> None:
    """The product has its shape, dtype and device and is as near to the exact one as the mode states."""
    truth = x.double() @ weight.dequantize(x.dtype).double().t() + (0 if bias is None else bias.double())
    before = x.clone()
    found = backend.multiply(x, weight, bias, mode)
    assert torch.equal(x, before), "the input was changed"
    assert (found.shape, found.dtype, found.device) == (truth.shape, x.dtype, x.device)
    error = float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    assert error <= max(TOLERANCE[x.dtype], ERRORS.get(mode, 0)), f"{tuple(x.shape)} by {weight.shape}"


@each_backend
def test_what_a_backend_declares(backend: Backend) -> None:
    """Its name is its own, its modes are known, and it answers every call with a reason or None."""
    assert [b.NAME for b in dispatch.BACKENDS].count(backend.NAME) == 1
    assert backend.MODES and set(backend.MODES) <= set(kernels.MODES) and kernels.EXACT in backend.MODES
    devices = ("cpu", "cuda", "mps", "xpu", "meta")
    for mode, device, pair, dtype in itertools.product(backend.MODES, devices, PAIRS, TOLERANCE):
        for group in (32, 128):
            reason = backend.declines(call_for(device, dtype, pair, mode, (136, 256, group)))
            assert reason is None or (isinstance(reason, str) and reason and "\n" not in reason)


def test_the_last_one_takes_everything() -> None:
    last = dispatch.BACKENDS[-1]
    for device, pair, dtype in itertools.product(("cpu", "cuda", "mps"), PAIRS, TOLERANCE):
        assert last.declines(call_for(device, dtype, pair, kernels.EXACT)) is None


@everything_taken
def test_values(backend: Backend, mode: str, device: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    """Against float64, for every shape that it takes, each dtype of scales, also with a bias of another dtype."""
    tables = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    for shape, table in zip(SHAPES, tables, strict=False):
        if backend.declines(call_for(device, dtype, pair, mode, shape)) is not None:
            continue
        weight = random_weight(*pair, *shape, table).to(device)
        bias = random_input(shape[0], dtype=dtype, device=device).float()
        x = random_input(3, 7, shape[1], dtype=dtype, device=device)
        for b in (None, bias):
            check(backend, x, weight, b, mode)


@everything_taken
def test_inputs(backend: Backend, mode: str, device: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    """One token, none, many; strides and offsets; tokens of zeros give the bias."""
    weight = random_weight(*pair, 83, 384, 128, torch.bfloat16).to(device)
    bias = random_input(83, dtype=dtype, device=device)
    whole = random_input(4, 5, 400, dtype=dtype, device=device)
    turned = random_input(384, 5, dtype=dtype, device=device).t()
    expanded = random_input(384, dtype=dtype, device=device).expand(3, 384)
    for x in (whole[0, 0, :384], whole[:0, :, :384], whole[:, :, 3:387], whole[::2, 1:3, 16:], turned, expanded):
        check(backend, x, weight, bias, mode)
    x = whole[0, :, :384].clone()
    x[2] = 0
    assert torch.equal(backend.multiply(x, weight, bias, mode)[2], bias)


@everything_exact
def test_exact_values(backend: Backend, mode: str, device: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    """The identity times the weight is the weight, bit for bit: every byte in every plane, any scale."""
    coder, (scheme, codec) = codecs.get_codec(pair[1]), pair
    levels = SCHEMES[scheme].levels or coder.radix
    columns = -(-(levels**coder.fields) // 128) * 128
    codes = torch.cartesian_prod(*[torch.arange(levels, dtype=torch.uint8)] * coder.fields).view(-1, coder.fields)
    codes = torch.nn.functional.pad(codes.t(), (0, columns - len(codes))).repeat_interleave(8, 0)
    info = torch.finfo(dtype)
    scale = torch.tensor([1.0, -0.5, 0.0, info.max / 4, info.tiny, 0.3, 1.7, 2.0]).repeat(coder.fields)
    scale = scale.unsqueeze(1).repeat(1, columns // 128).bfloat16()
    if SCHEMES[scheme].has_zero:
        scale = scale.clamp(-2, 2)
    zero = scale * 3 if SCHEMES[scheme].has_zero else None
    weight = PackedWeight(codecs.encode(codec, codes), scale, (len(codes), columns), *pair, 128, zero).to(device)
    eye = torch.eye(columns, dtype=dtype, device=device)
    assert torch.equal(backend.multiply(eye, weight, None, mode).t(), weight.dequantize(dtype))


@everything_taken
def test_a_residual(backend: Backend, mode: str, device: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    """`linear` adds it once, in every mode; the backend alone adds it too or refuses it."""
    weight = random_weight(*pair, 83, 384, 128, torch.bfloat16).to(device)
    up, down = (random_input(*shape, dtype=torch.bfloat16, device=device) for shape in ((83, 3), (3, 384)))
    weight = dataclasses.replace(weight, up=up, down=down)
    x, bias = (random_input(*shape, dtype=dtype, device=device) for shape in ((2, 5, 384), (83,)))
    truth = x.double() @ weight.dequantize(torch.float64).t() + bias.double()

    def error(found: torch.Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    limit = max(2 * TOLERANCE[dtype], ERRORS.get(mode, 0))
    with kernels.use_backend(backend.NAME):
        choice = kernels.resolve(kernels.call_of(x.device, dtype, weight, mode))
        assert (choice.backend, choice.mode) == (backend, mode)
        assert error(kernels.linear(x, weight, bias, mode)) < limit
    try:
        alone = backend.multiply(x, weight, bias, mode)
    except ValueError as refusal:
        assert "kernels.linear adds" in str(refusal)
    else:
        assert error(alone) < limit
