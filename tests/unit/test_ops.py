"""bonsai::linear as a torch operator: registration, values, gradients, compilation, a second import."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import Operators
from random_weights import random_weight
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from bonsai_ops import kernels
from bonsai_ops.kernels import custom_op, eager, reuse
from bonsai_ops.weights.packed_weight import SCHEMES, PackedWeight

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = [(scheme.name, codec) for scheme in SCHEMES.values() for codec in scheme.codecs]
SIZE = (136, 256, 64)
"""Rows, columns and group size of the weights."""
# relative to the largest output: rounding of the product and of the sum with the bias; fp32: the order of the sum
TOLERANCE = {torch.float32: 5e-6, torch.float16: 8e-4, torch.bfloat16: 2**-7}


def arguments(weight: PackedWeight) -> tuple:
    """The last arguments of the operators, without the mode."""
    return (weight.shape[0], weight.scheme, weight.codec, weight.group_size)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference relative to the largest exact value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(("tokens", "bias"), [((3,), False), ((2, 5), True), ((), True)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_linear_is_the_dense_product(
    scheme: str, name: str, dtype: torch.dtype, tokens: tuple[int, ...], bias: bool
) -> None:
    """By the backend of this machine, against float64 with the weight in the computing dtype; tolerance by dtype."""
    weight = random_weight(scheme, name, *SIZE)
    x = torch.randn(*tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.linspace(-1, 1, 136).to(dtype) if bias else None
    y = kernels.linear(x, weight, b)
    assert y.dtype == dtype and y.shape == (*tokens, 136)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(dtype).double(), None if b is None else b.double())
    assert error(y, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_a_result_is_its_callers(scheme: str, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of models write into what a layer gave them: no input, no weight and no other result sees it.

    With and without a residual and a bias, on memory that is used again.
    """
    monkeypatch.setattr(reuse, "LEAST_BYTES", 1)
    plain = random_weight(scheme, name, *SIZE)
    up, down = torch.linspace(-1, 1, 272).view(136, 2), torch.linspace(-1, 1, 512).view(2, 256)
    index = torch.tensor([3, 3, 7])
    for dtype in TOLERANCE:
        x, bias = torch.linspace(-1, 1, 512).view(2, 256).to(dtype), torch.ones(136, dtype=dtype)
        held = [x, bias, up, down, plain.codes, *plain.tables().values()]
        before = [tensor.clone() for tensor in held]
        for weight in (plain, dataclasses.replace(plain, up=up, down=down)):
            for make in (
                lambda w=weight, x=x: kernels.linear(x, w, None, mode),
                lambda w=weight, x=x, b=bias: kernels.linear(x, w, b, mode),
                lambda w=weight, d=dtype: w.select_rows(index, d),
                lambda w=weight, d=dtype: w.dequantize(d),
            ):
                with torch.inference_mode(), kernels.keeping_memory():
                    truth, living = make().clone(), []
                    for number in range(3):
                        living.append(make())
                        assert torch.equal(living[-1], truth)
                        living[-1].fill_(number)
                    assert [int(y.min()) for y in living] == [int(y.max()) for y in living] == [0, 1, 2]
        assert all(map(torch.equal, held, before))


@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_no_tokens(scheme: str, name: str) -> None:
    x = torch.ones(0, 256, requires_grad=True)
    y = kernels.linear(x, random_weight(scheme, name, *SIZE))
    assert y.shape == (0, 136)
    y.sum().backward()
    assert x.grad.shape == (0, 256)


def test_a_bias_of_another_dtype_is_rounded_to_the_inputs() -> None:
    weight, x, bias = random_weight("ternary", "trit5", *SIZE), torch.randn(3, 256).bfloat16(), torch.randn(136)
    assert torch.equal(kernels.linear(x, weight, bias), kernels.linear(x, weight, bias.bfloat16()))


def test_inputs_that_do_not_fit_are_refused() -> None:
    weight = random_weight("ternary", "trit5", *SIZE)
    with pytest.raises(ValueError, match="input has 255 columns, the packed weight 256"):
        kernels.linear(torch.ones(3, 255), weight)
    with pytest.raises(ValueError, match="input is on meta, the packed weight on cpu"):
        kernels.linear(torch.ones(3, 256, device="meta"), weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("scheme", "name"), PAIRS)
def test_gradients_are_those_of_the_dense_layer(scheme: str, name: str, dtype: torch.dtype) -> None:
    """With respect to x and bias, against float64; tolerance by dtype."""
    weight = random_weight(scheme, name, *SIZE)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 256, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(136, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 9, 136, generator=generator).to(dtype)
    kernels.linear(x, weight, bias).backward(grad)
    exact = grad.double() @ weight.dequantize(dtype).double()
    assert x.grad.dtype == dtype and x.grad.shape == x.shape
    assert error(x.grad, exact) < TOLERANCE[dtype]
    assert error(bias.grad, grad.double().sum((0, 1))) < TOLERANCE[dtype]


def with_residual() -> PackedWeight:
    """A ternary weight with a low-rank residual of rank 5."""
    up, down = torch.randn(136, 5, generator=torch.Generator().manual_seed(4)), torch.full((5, 256), 0.5)
    return dataclasses.replace(random_weight("ternary", "trit5", *SIZE), up=up, down=down)


def test_the_gradient_of_a_low_rank_residual() -> None:
    """fp32, 5e-6."""
    weight, x, grad = with_residual(), torch.randn(3, 256, requires_grad=True), torch.randn(3, 136)
    kernels.linear(x, weight).backward(grad)
    assert error(x.grad, grad.double() @ weight.dequantize().double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tokens", [(9,), (2, 9), ()], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_trained_beside_the_codes(dtype: torch.dtype, tokens: tuple[int, ...], residual: bool) -> None:
    """y and the gradients of x and of both fp32 matrices against float64, beside a residual too; tolerance by dtype."""
    weight = with_residual() if residual else random_weight("ternary", "trit5", *SIZE)
    generator = torch.Generator().manual_seed(5)
    up, down = torch.randn(136, 3, generator=generator), torch.randn(3, 256, generator=generator)
    x = torch.randn(*tokens, 256, generator=generator).to(dtype)
    grad = torch.randn(*tokens, 136, generator=generator).to(dtype)
    ours = x.clone().requires_grad_(), up.clone().requires_grad_(), down.clone().requires_grad_()
    y = kernels.linear(ours[0], weight, beside=ours[1:])
    y.backward(grad)
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in (x, up, down)]
    truth = exact[0] @ (weight.dequantize().double() + exact[1] @ exact[2]).T
    truth.backward(grad.double())
    bound = 4 * TOLERANCE[dtype]  # the products between are rounded too
    assert y.dtype == dtype and error(y.detach(), truth.detach()) < bound
    for found, wanted in zip(ours, exact, strict=True):
        assert found.grad.dtype == found.dtype and error(found.grad, wanted.grad) < bound


def test_what_is_trained_alone_gets_the_gradient() -> None:
    """Before the first layer that is trained nothing is: x needs no gradient, and none is computed."""
    weight, x, grad = random_weight("ternary", "trit5", *SIZE), torch.randn(3, 256), torch.randn(3, 136)
    up, down = torch.randn(136, 3, requires_grad=True), torch.randn(3, 256)
    names = by_profiler(lambda x: kernels.linear(x, weight, beside=(up, down)).backward(grad), x)
    assert "bonsai::linear" in names and "bonsai::linear_transposed" not in names
    assert error(up.grad, grad.double().T @ (x.double() @ down.double().T)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ("x", {"codes", "up", "down"}),
        ("up", {"x", "down"}),
        ("down", {"x", "up"}),
        ("x up down", {"codes", "x", "up", "down"}),
    ],
)
def test_only_what_the_gradients_need_is_kept(wanted: str, kept: set[str]) -> None:
    """For the backward pass: x is as large as all else, and an offloaded layer's codes lie on the device for it."""
    weight = random_weight("ternary", "trit5", *SIZE)
    named = {"x": torch.randn(3, 256), "up": torch.randn(136, 3), "down": torch.randn(3, 256)}
    for name in wanted.split():
        named[name].requires_grad_()
    found: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernels.linear(named["x"], weight, beside=(named["up"], named["down"]))
    named["codes"] = weight.codes
    assert {name for name, tensor in named.items() if tensor.untyped_storage().data_ptr() in found} == kept


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_gradient_of_a_layer_of_many_pieces(dtype: torch.dtype) -> None:
    """27 pieces, whose sum must not be rounded to the dtype after each; tolerance by dtype."""
    weight = random_weight("ternary", "trit5", 9216, 3072, 64)
    assert len(list(weight.pieces(dtype))) > 10
    grad = torch.randn(2, 9216, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = grad.double() @ weight.dequantize(dtype).double()
    assert error(eager.multiply_transposed(grad, weight), exact) < TOLERANCE[dtype]


def test_only_what_needs_a_gradient_gets_one() -> None:
    weight, x, bias = random_weight("affine", "crumb", *SIZE), torch.randn(3, 256), torch.randn(136, requires_grad=True)
    kernels.linear(x, weight, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((136,), 3.0))
    assert not kernels.linear(x, weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beside", ["nothing", "fixed", "trained"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "name"), [("ternary", "trit5"), ("zero_point", "nibble")])
def test_the_operators_are_registered_soundly(
    scheme: str, name: str, bias: bool, beside: str, dtype: torch.dtype
) -> None:
    """Schema, fake tensors and autograd, by torch's own check."""
    up, down = (None, None) if beside == "nothing" else (torch.randn(136, 5), torch.randn(5, 256))
    if up is not None:
        up, down = (tensor.to(dtype).requires_grad_(beside == "trained") for tensor in (up, down))
    weight = random_weight(scheme, name, *SIZE)
    x = torch.randn(2, 3, 256, dtype=dtype, requires_grad=True)
    b = torch.randn(136, dtype=dtype) if bias else None
    torch.library.opcheck(
        torch.ops.bonsai.linear.default,
        (x, weight.codes, weight.scale, weight.zero, b, up, down, *arguments(weight), "exact"),
    )
    grad = torch.randn(2, 3, 136, dtype=dtype)
    torch.library.opcheck(
        torch.ops.bonsai.linear_transposed.default, (grad, weight.codes, weight.scale, weight.zero, *arguments(weight))
    )


Product = Callable[[torch.Tensor], torch.Tensor]


class Functions(TorchFunctionMode):
    """The names of the functions of torch that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def by_mode(mode: type) -> Callable[[Product, torch.Tensor], list[str]]:
    def watch(product: Product, x: torch.Tensor) -> list[str]:
        with mode() as watched:
            product(x)
        return watched.names

    return watch


def by_profiler(product: Product, x: torch.Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product(x)
    return [event.name for event in profile.events()]


WATCHERS: dict[str, Callable[[Product, torch.Tensor], list[str]]] = {
    "dispatch mode": by_mode(Operators),
    "function mode": by_mode(Functions),
    "fx": lambda product, x: [str(node.target) for node in make_fx(product)(x).graph.nodes],
    "jit": lambda product, x: [node.kind() for node in torch.jit.trace(product, x, check_trace=False).graph.nodes()],
    "gradient": lambda product, x: by_profiler(product, x.requires_grad_()),
}


def count(names: list[str]) -> int:
    """How often the operator is among them; what records its gradient is named after it."""
    return sum("bonsai" in name and "linear" in name and "Backward" not in name for name in names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WATCHERS)
def test_whoever_watches_sees_one_operator(kind: str) -> None:
    """And nothing of what it does inside, as torch.compile does; nobody else pays for an operator."""
    weight, x = random_weight("ternary", "trit5", *SIZE), torch.randn(3, 256)
    assert count(WATCHERS[kind](lambda x: kernels.linear(x, weight, torch.ones(136)), x)) == 1
    names = by_profiler(lambda x: kernels.linear(x, weight), torch.randn(3, 256))
    assert names and count(names) == 0


def test_a_gradient_of_the_bias_alone_is_recorded() -> None:
    weight, x, bias = random_weight("ternary", "trit5", *SIZE), torch.randn(3, 256), torch.zeros(136)
    assert kernels.linear(x, weight, bias.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not kernels.linear(x.requires_grad_(), weight, bias).requires_grad


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_there_are_multiplied() -> None:
    """A fake tensor outside of its mode, and a function that torch transforms."""
    weight, x = random_weight("ternary", "trit5", *SIZE), torch.randn(4, 3, 256)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (weight.codes, weight.scale, x)]
    fake = dataclasses.replace(weight, codes=fakes[0], scale=fakes[1])
    y = kernels.linear(fakes[2], fake)
    assert isinstance(y, FakeTensor) and y.shape == (4, 3, 136)
    found = torch.func.vmap(lambda x: kernels.linear(x, weight))(x)
    assert torch.allclose(found, kernels.linear(x, weight), atol=1e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "autocast"])
def test_without_the_operator_nothing_else_changes(mode: str, residual: bool) -> None:
    """Values, dtype, and what autograd knows of the result: also when it is written to with a gradient afterwards."""
    weight = with_residual() if residual else random_weight("ternary", "trit5", *SIZE)
    x, bias = torch.randn(2, 3, 256), torch.randn(136)
    context = {
        "plain": contextlib.nullcontext(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }[mode]
    with context:
        direct = kernels.linear(x, weight, bias)
        with Functions() as functions:
            watched = kernels.linear(x, weight, bias)
    assert count(functions.names) == 1
    assert torch.equal(direct, watched)
    for fact in ("dtype", "shape", "requires_grad", "grad_fn", "is_leaf"):
        assert getattr(direct, fact) == getattr(watched, fact)
    assert direct.stride() == watched.stride()
    assert (direct.is_inference(), direct._is_view()) == (watched.is_inference(), watched._is_view())
    if mode == "plain":
        factor = torch.ones(136, requires_grad=True)
        direct.mul_(factor).sum().backward()
        assert torch.allclose(factor.grad, watched.sum((0, 1)))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_has_no_graph_break(backend: str, residual: bool, beside: bool) -> None:
    """Values and gradients as without it, also for a second number of tokens."""
    weight, bias = with_residual() if residual else random_weight("ternary", "trit5", *SIZE), torch.randn(136)
    trained = (torch.randn(136, 3, requires_grad=True), torch.randn(3, 256, requires_grad=True)) if beside else None

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(kernels.linear(x * 2, weight, bias, beside=trained)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (4, 7):
        x, y = (torch.ones(tokens, 256, requires_grad=True) for _ in range(2))
        assert torch.equal(compiled(x), layer(y))
        found, wanted = (
            torch.autograd.grad(run(z).sum(), (z, *(trained or ()))) for run, z in ((compiled, x), (layer, y))
        )
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("backend", ["eager", None])
def test_inputs_that_do_not_lie_in_a_row(backend: str | None) -> None:
    """What is added in place is added to y itself, whatever x looks like."""
    weight = with_residual()
    x = torch.randn(2, 256, 5, generator=torch.Generator().manual_seed(6)).transpose(1, 2)
    exact = x.double() @ weight.dequantize().double().T
    with kernels.use_backend(backend):
        assert error(kernels.linear(x, weight), exact) < TOLERANCE[torch.float32]
        assert error(kernels.linear(x[:, :1].expand(2, 4, 256), weight), exact[:, :1].expand(2, 4, 136)) < 1e-5


def test_a_second_import_shares_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI imports the plugin under a name of its own; its weights and ours meet the same operators."""
    name = "bonsai_second_import"
    spec = importlib.util.spec_from_file_location(
        name, REPOSITORY / "bonsai_ops" / "__init__.py", submodule_search_locations=[str(REPOSITORY / "bonsai_ops")]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, package)
    spec.loader.exec_module(package)
    registered = torch.ops.bonsai.linear.default, torch.ops.bonsai.linear_transposed.default
    try:
        second = importlib.import_module(f"{name}.kernels.custom_op")
        other = importlib.import_module(f"{name}.weights.packed_weight")
        assert second is not custom_op and other.PackedWeight is not PackedWeight
        assert torch.ops.bonsai.linear.default is registered[0]
        assert torch.ops.bonsai.linear_transposed.default is registered[1]
        weight = random_weight("ternary", "trit5", *SIZE)
        twin = other.PackedWeight(weight.codes, weight.scale, weight.shape, *arguments(weight)[1:])
        x, y = (torch.ones(3, 256, requires_grad=True) for _ in range(2))
        first_result, second_result = kernels.linear(x, weight), second.linear(y, twin)
        assert torch.equal(first_result, second_result)
        first_result.sum().backward()
        second_result.sum().backward()
        assert torch.equal(x.grad, y.grad)
    finally:
        for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
            del sys.modules[module]
