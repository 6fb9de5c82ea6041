"""Which dense weights have the levels of a binary or ternary scheme already."""

from __future__ import annotations

from collections.abc import Iterator

import torch

STEP_WEIGHTS = 2 << 20
"""Weights worked on at a time."""


def groups_of(
    weight: torch.Tensor, group_size: int, step_weights: int = STEP_WEIGHTS
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 [n, K / group, group]) of a weight [N, K], a few rows at a time, until each was seen."""
    step = max(1, step_weights // weight.shape[1])
    for lo in range(0, weight.shape[0], step):
        rows = weight[lo : lo + step].float()
        yield lo, rows.reshape(rows.shape[0], -1, group_size)


def signed_levels(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, int] | None:
    """(s float32 [N, K / group], levels) of a weight [N, K] whose every group has no values but -s, 0 and s, else None.

    levels: 3 if a zero stands beside other values somewhere, 2 otherwise.
    """
    magnitudes, zeros = [], False
    for _, groups in groups_of(weight, group_size):
        size = groups.abs()
        top = size.amax(-1, keepdim=True)
        empty = size == 0
        if not bool(((size == top) | empty).all()):
            return None
        zeros = zeros or bool((empty & (top > 0)).any())
        magnitudes.append(top.squeeze(-1))
    return torch.cat(magnitudes), 3 if zeros else 2
