"""Codes chosen column by column, each rounding error made good in the columns that are still to come.

The output error of a row w - q is (w - q) H (w - q)^T with H = X^T X of the layer's inputs X. After column j is
rounded, the best change of the columns k > j is -(w_j - q_j) U_jk / U_jj, U the upper Cholesky factor of H^-1: GPTQ
(arXiv 2210.17323). A group's scale is its optimum (groups.py) for the weights as they are when their turn comes.
"""

from __future__ import annotations

import torch

from .groups import SCALE_DTYPE, best_scale, to_codes, values

DAMPING = 0.01
"""Added to the diagonal of H, relative to its mean; ten times more whenever the factorization fails."""


def compensate(
    weight: torch.Tensor, gram: torch.Tensor, scheme: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scale bf16 [N, K / group]) of a dense weight for inputs of second moment gram [K, K]."""
    rest = weight.to(torch.float32, copy=True)
    gram = gram.to(rest.device, torch.float32)
    factor = _inverse_factor(gram)
    importance = gram.diagonal()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    scales = []
    for lo in range(0, rest.shape[1], group_size):
        hi = lo + group_size
        block, upper = rest[:, lo:hi], factor[lo:hi, lo:hi]
        scale = best_scale(block, scheme, importance[lo:hi]).float()
        errors = torch.empty_like(block)
        for j in range(group_size):
            column = block[:, j : j + 1]
            code = to_codes(column, scale, scheme)
            errors[:, j : j + 1] = (column - values(code, scale, scheme)) / upper[j, j]
            block[:, j:] -= errors[:, j : j + 1] * upper[j, j:]
            codes[:, lo + j] = code.squeeze(-1)
        rest[:, hi:] -= errors @ factor[lo:hi, hi:]
        scales.append(scale)
    return codes, torch.stack(scales, dim=1).to(SCALE_DTYPE)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """float64 [N]: the squared output error of each row of a difference [N, K] for inputs of second moment gram."""
    return ((difference.float() @ gram.to(difference.device, torch.float32)).double() * difference).sum(-1).clamp_min(0)


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment [K, K]. Inputs never seen count as 1."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1.0
    damping = DAMPING
    while True:
        damped = gram + torch.eye(gram.shape[0], device=gram.device) * (damping * float(diagonal.mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return factor
        damping *= 10
