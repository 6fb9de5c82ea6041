"""The packed matmul as torch custom ops, so that torch.compile sees one opaque call with known shapes.

    bonsai::linear(x, codes, scale, zero, bias, ..)   y = x W^T + bias
    bonsai::linear_transposed(y, codes, scale, zero, ..)   x = y W, its gradient (exact in every mode)

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


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT) -> torch.Tensor:
    """y = x W^T + bias: x [.., K] bf16, fp16 or fp32 -> [.., N] in the same dtype. mode: one of call.MODES.

    The product of the codes is the best backend's, in `mode` where one offers it, else exact. The residual of the
    weight is multiplied here, in x's dtype, whatever the mode.

    Raises ValueError if x has not K columns, the bias not N values, or one lies on another device than the weight.
    """
    _check_arguments(x, weight, bias)
    if not is_watched(x, weight.codes, bias):
        with below_autograd():  # as in the operator
            y = dispatch.multiply(x, weight.without_residual(), bias, mode)
        return _add_residual(y, x, weight)
    y = torch.ops.bonsai.linear(
        x,
        weight.codes,
        weight.scale,
        weight.zero,
        bias,
        weight.shape[0],
        weight.scheme,
        weight.codec,
        weight.group_size,
        mode,
    )
    return _add_residual(y, x, weight)


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


def _add_residual(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """y [.., N] + x down^T up^T in x's dtype; y itself where the weight has no residual."""
    if weight.up is None:
        return y
    inner = torch.nn.functional.linear(x, weight.down.to(x.dtype))
    return y + torch.nn.functional.linear(inner, weight.up.to(x.dtype))


def _linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    scheme: str,
    codec: str,
    group_size: int,
    mode: str,
) -> torch.Tensor:
    weight = PackedWeight(codes, scale, (rows, codes.shape[1]), scheme, codec, group_size, zero)
    return dispatch.multiply(x, weight, bias, mode)


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
    _, codes, scale, zero, bias, rows, scheme, codec, group_size, _ = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.weight = (rows, scheme, codec, group_size)
    ctx.has_bias = bias is not None


def _backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple:
    codes, scale, zero = ctx.saved_tensors
    grad_x = torch.ops.bonsai.linear_transposed(grad, codes, scale, zero, *ctx.weight)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


def _is_registered() -> bool:
    return hasattr(torch.ops.bonsai, "linear")


def _register() -> None:
    if _is_registered():
        return
    op = torch.library.custom_op(f"{NAMESPACE}::linear", _linear, mutates_args=())
    op.register_fake(
        lambda x, codes, scale, zero, bias, rows, scheme, codec, group_size, mode: x.new_empty(*x.shape[:-1], rows)
    )
    op.register_autograd(_backward, setup_context=_save_for_backward)
    transposed = torch.library.custom_op(f"{NAMESPACE}::linear_transposed", _linear_transposed, mutates_args=())
    transposed.register_fake(
        lambda grad, codes, scale, zero, rows, scheme, codec, group_size: grad.new_empty(
            *grad.shape[:-1], codes.shape[1]
        )
    )


_register()
