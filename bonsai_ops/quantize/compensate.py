"""Codes chosen column by column, each rounding error made good in the columns that are still to come.

The output error of a row w - q is (w - q) H (w - q)^T with H = X^T X of the layer's inputs X. After column j is
rounded, the best change of the columns k > j is -(w_j - q_j) U_jk / U_jj, U the upper Cholesky factor of H^-1: GPTQ
(arXiv 2210.17323). A group's scale is its optimum (groups.py) for the weights as they are when their turn comes.
"""

from __future__ import annotations

import torch

from .groups import SCALE_DTYPE, best_scale, to_codes, values

COLUMNS, BLOCK = 16, 256
"""Columns whose errors are spread one by one before a product spreads them; columns of a product of second moments."""
DAMPING = 0.01
"""Added to the diagonal of H, relative to its mean; ten times more whenever the factorization fails."""


def compensate(
    weight: torch.Tensor, gram: torch.Tensor, scheme: str, group_size: int, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scale bf16 [N, K / group]) of a dense weight for inputs of second moment gram [K, K].

    factor: inverse_factor(gram) where it is known.
    """
    rest = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    factor = inverse_factor(gram) if factor is None else factor
    factor, importance = factor.to(rest.device), gram.diagonal().to(rest.device, torch.float32)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    errors = torch.empty(group_size, rest.shape[1], device=rest.device)
    scales = []
    for lo in range(0, rest.shape[0], group_size):
        hi = lo + group_size
        scale = best_scale(rest[lo:hi].T, scheme, importance[lo:hi]).float()
        for first in range(lo, hi, COLUMNS):
            last = min(first + COLUMNS, hi)
            for j in range(first, last):
                code = to_codes(rest[j].unsqueeze(-1), scale, scheme)
                error = (rest[j] - values(code, scale, scheme).squeeze(-1)) / factor[j, j]
                rest[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
                errors[j - lo], codes[j] = error, code.squeeze(-1)
            rest[last:hi].addmm_(factor[first:last, last:hi].T, errors[first - lo : last - lo], alpha=-1)
        rest[hi:].addmm_(factor[lo:hi, hi:].T, errors, alpha=-1)
        scales.append(scale)
    return codes.T.contiguous(), torch.stack(scales, dim=1).to(SCALE_DTYPE)


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """float64 [N]: the squared output error of each row of a difference [N, K] for inputs of second moment gram.

    gram is symmetric: each pair of blocks of columns is multiplied once.
    """
    difference, gram = difference.float(), gram.to(difference.device, torch.float32)
    total = torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
    for lo in range(0, difference.shape[1], BLOCK):
        hi = lo + BLOCK
        own = difference[:, lo:hi]
        products = torch.addmm(own @ gram[lo:hi, lo:hi], difference[:, :lo], gram[:lo, lo:hi], alpha=2)
        total += (products.double() * own).sum(-1)
    return total.clamp_min(0)


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment [K, K]. Inputs never seen count as 1."""
    gram = gram.to(torch.float32, copy=True)
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
