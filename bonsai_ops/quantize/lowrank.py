"""A low-rank residual up [N, r] down [r, K] beside the codes: the best matrix for what they leave over, in bf16."""

from __future__ import annotations

import torch

EXACT_BELOW = 512
"""Matrices with a side up to this are decomposed exactly, larger ones by randomized subspace iteration."""
EXTRA, SEED = 16, 0
ROUNDS, ROUNDS_FROM_NEAR = 4, 2
"""Rounds of the iteration from random directions, and from those of a matrix that is much like this one."""


def fit(
    rest: torch.Tensor, rank: int, importance: torch.Tensor | None = None, near: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up bf16 [N, r], down bf16 [r, K]) close to `rest` float32 [N, K], r = min(rank, N, K). Deterministic.

    importance: float [K]; the error of column k counts importance[k] times. Columns of importance 0 get a small one.
    near: the down [r, K] of a matrix much like this one, where the search begins.
    """
    rank = min(rank, *rest.shape)
    if importance is None:
        width = None
    else:
        width = importance.to(rest.device, torch.float32).sqrt()
        width = width.clamp_min(1e-3 * float(width.mean()) or 1.0)
        rest = rest * width
    if min(rest.shape) <= EXACT_BELOW:
        left, size, right = torch.linalg.svd(rest, full_matrices=False)
    else:
        near = None if near is None else near.float() if width is None else near.float() * width
        left, size, right = _randomized(rest, rank + EXTRA, near)
    root = size[:rank].sqrt()
    up, down = left[:, :rank] * root, right[:rank] * root.unsqueeze(-1)
    if width is not None:
        down = down / width
    return up.to(torch.bfloat16).contiguous(), down.to(torch.bfloat16).contiguous()


def _randomized(
    matrix: torch.Tensor, rank: int, near: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triples by subspace iteration from a fixed start (Halko et al., arXiv 0909.4061)."""
    start = torch.randn(matrix.shape[1], rank, generator=torch.Generator().manual_seed(SEED)).to(matrix.device)
    if near is not None:
        start[:, : len(near)] = near.T
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ROUNDS if near is None else ROUNDS_FROM_NEAR):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, size, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, size, right
