"""The packed matmul as torch custom ops, so that torch.compile sees one opaque call with known shapes.

    bonsai::linear(x, codes, scale, zero, bias, up, down, ..)   y = x W^T + bias + x down^T up^T
    bonsai::linear_transposed(y, codes, scale, zero, ..)   x = y W, for its gradient (exact in every mode)

What is of low rank, a weight's residual or what is trained beside it, is added in place, to y and to the gradient of x:
a buffer of that size, which the system has to clear, costs a CPU many times the product, and a GPU a launch.

An operator costs more than the rest of a small call, so `linear` asks the dispatcher itself where nobody would see one.

Registered once a process, also when this module is imported under two names (as ComfyUI's plugin and as `bonsai_ops`).
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from ..weights.packed_weight import PackedWeight
from . import dispatch
from .call import EXACT

NAMESPACE = "bonsai"
X, BIAS, UP, DOWN = 0, 4, 5, 6
"""Which arguments of bonsai::linear get gradients."""
LowRank = tuple[torch.Tensor, torch.Tensor]
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes of tensors that nobody watches."""
try:
    below_autograd = torch._C._AutoDispatchBelowAutograd
    WATCHING = (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._is_tracing,
        lambda: forward_ad._current_level >= 0,
    )
    """Each says whether something watches the operators of torch just now."""
except AttributeError:  # a torch that has other names for them
    below_autograd, WATCHING = contextlib.nullcontext, (lambda: True,)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    mode: str = EXACT,
    beside: LowRank | None = None,
) -> torch.Tensor:
    """y = x W^T + bias: x [.., K] bf16, fp16 or fp32 -> [.., N] in the same dtype. mode: one of call.MODES.

    beside: (up [N, r], down [r, K]) whose x down^T up^T is added and which get gradients, in any dtype. The product of
    the codes is the best backend's, in `mode` where one offers it, else exact. The residual of the weight and what
    stands beside it are multiplied in x's dtype, whatever the mode.

    Raises ValueError if x has not K columns, the bias not N values, or one lies on another device than the weight.
    """
    _check_arguments(x, weight, bias)
    up, down = _low_rank(weight, beside, x.dtype)
    if not is_watched(x, weight.codes, bias, up, down):
        with below_autograd():  # as in the operator
            return _multiply(x, weight.without_residual(), bias, up, down, mode)
    return torch.ops.bonsai.linear(
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        bias,
        up,
        down,
        weight.shape[0],
        weight.scheme,
        weight.codec,
        weight.group_size,
        mode,
    )


def is_watched(*tensors: torch.Tensor | None) -> bool:
    """True if somebody wants to see one operator in place of what a backend does to these tensors.

    That is whoever compiles, traces or exports, records gradients, has a mode of torch on, transforms functions, or
    passes a tensor of a class of its own.
    """
    if torch.compiler.is_compiling():
        return True
    for sign in WATCHING:
        if sign():
            return True
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or (recording and tensor.requires_grad)):
            return True
    return False


def _check_arguments(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"input has {x.shape[-1]} columns, the packed weight {columns}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the packed weight {rows} rows")
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.device != weight.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, the packed weight on {weight.codes.device}")


def _low_rank(
    weight: PackedWeight, beside: LowRank | None, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(up [N, r], down [r, K]) of the residual and what stands beside it, in one; (None, None) if there is neither."""
    if beside is None:
        return (None, None) if weight.up is None else (weight.up.to(dtype), weight.down.to(dtype))
    up, down = (tensor.to(device=weight.codes.device, dtype=dtype) for tensor in beside)
    if weight.up is None:
        return up, down
    return torch.cat((weight.up.to(dtype), up), 1), torch.cat((weight.down.to(dtype), down))


def _multiply(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    mode: str,
) -> torch.Tensor:
    y = dispatch.multiply(x, weight, bias, mode)
    return y if up is None else _add(y, _product(x, down.t()), up.t())


def _product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [.., K] matrix [K, N] -> [M, N] in x's dtype, within autocast too."""
    return torch.mm(x.reshape(-1, x.shape[-1]), matrix).to(x.dtype)


def _add(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """y [.., N] with left [M, r] right [r, N] added in place."""
    y.view(-1, y.shape[-1]).addmm_(left, right)
    return y


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    rows: int,
    scheme: str,
    codec: str,
    group_size: int,
    mode: str,
) -> torch.Tensor:
    weight = PackedWeight(codes, scale, (rows, codes.shape[1]), scheme, codec, group_size, zero)
    return _multiply(x, weight, bias, up, down, mode)


def _linear_transposed(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    rows: int,
    scheme: str,
    codec: str,
    group_size: int,
) -> torch.Tensor:
    weight = PackedWeight(codes, scale, (rows, codes.shape[1]), scheme, codec, group_size, zero)
    return dispatch.multiply_transposed(grad, weight)


def _save_for_backward(ctx: FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    x, codes, scale, zero, bias, up, down, rows, scheme, codec, group_size, _ = inputs
    of_x, of_up, of_down = (ctx.needs_input_grad[number] for number in (X, UP, DOWN))
    packed = (codes, scale, zero) if of_x else (None,) * 3  # an offloaded layer's lie on the device as long as that
    ctx.save_for_backward(
        *packed,
        up if of_x or of_down else None,
        down if of_x or of_up else None,
        x if of_up or of_down else None,
    )
    ctx.weight = (rows, scheme, codec, group_size)
    ctx.has_bias = bias is not None


def _backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple:
    """g of y -> those of x: g W + g up down; bias: the sum of g; up: g^T (x down^T); down: (g up)^T x."""
    codes, scale, zero, up, down, x = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None] * len(wanted)
    rows = grad.reshape(-1, grad.shape[-1])
    inner = None if up is None else _product(grad, up)
    if wanted[X]:
        grads[X] = torch.ops.bonsai.linear_transposed(grad, codes, scale, zero, *ctx.weight)
        if inner is not None:
            grads[X] = _add(grads[X], inner, down)
    if wanted[BIAS] and ctx.has_bias:
        grads[BIAS] = rows.sum(0)
    if wanted[UP]:
        grads[UP] = _product(rows.t(), _product(x, down.t()))
    if wanted[DOWN]:
        grads[DOWN] = _product(inner.t(), x.reshape(-1, x.shape[-1]))
    return tuple(grads)


def _is_registered() -> bool:
    return hasattr(torch.ops.bonsai, "linear")


def _register() -> None:
    if _is_registered():
        return
    op = torch.library.custom_op(f"{NAMESPACE}::linear", _linear, mutates_args=())
    op.register_fake(
        lambda x, codes, scale, zero, bias, up, down, rows, scheme, codec, group_size, mode: x.new_empty(
            *x.shape[:-1], rows
        )
    )
    op.register_autograd(_backward, setup_context=_save_for_backward)
    transposed = torch.library.custom_op(f"{NAMESPACE}::linear_transposed", _linear_transposed, mutates_args=())
    transposed.register_fake(
        lambda grad, codes, scale, zero, rows, scheme, codec, group_size: grad.new_empty(
            *grad.shape[:-1], codes.shape[1]
        )
    )


_register()
