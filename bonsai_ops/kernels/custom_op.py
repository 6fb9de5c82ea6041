"""The packed matmul as torch custom ops, so that torch.compile sees one opaque call with known shapes.

    bonsai::linear(x, codes, scale, zero, bias, ..)   y = x W^T + bias
    bonsai::linear_transposed(y, codes, scale, zero, ..)   x = y W, its gradient (exact in every mode)

Registered once a process, also when this module is imported under two names (as ComfyUI's plugin and as `bonsai_ops`).
"""

from __future__ import annotations

import torch

from ..weights.packed_weight import PackedWeight
from . import dispatch, eager

NAMESPACE = "bonsai"


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = dispatch.EXACT
) -> torch.Tensor:
    """y = x W^T + bias: x [.., K] bf16, fp16 or fp32 -> [.., N] in the same dtype. mode: one of dispatch.MODES.

    A low-rank residual of the weight is added in x's dtype, whatever the mode.

    Raises ValueError if x has not K columns, the bias not N values, or one lies on another device than the weight.
    """
    dispatch.check_arguments(x, weight, bias)
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
    return dispatch.add_residual(y, x, weight)


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
    return dispatch.linear(x, weight, bias, mode=mode)


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
    return eager.linear_transposed(grad, weight)


def _save_for_backward(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, codes, scale, zero, bias, rows, scheme, codec, group_size, _ = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.weight = (rows, scheme, codec, group_size)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: torch.Tensor) -> tuple:
    codes, scale, zero = ctx.saved_tensors
    grad_x = torch.ops.bonsai.linear_transposed(grad, codes, scale, zero, *ctx.weight)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


def _register() -> None:
    if hasattr(torch.ops.bonsai, "linear"):
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
