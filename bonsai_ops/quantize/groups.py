"""Codes and scales of groups of weights: the exact least-squares optimum, weighted or not.

A group w_1 .. w_g with importances h_i >= 0 (1 where none are given) becomes s c_i. The error, sum h_i (w_i - s c_i)^2,
is

    binary   c_i in {-1, 1}:     least for c_i = sign(w_i) and s = sum h_i |w_i| / sum h_i
    ternary  c_i in {-1, 0, 1}:  for any s the best c_i is sign(w_i) where |w_i| > s / 2, else 0. So the nonzero codes
                                 are the k largest |w_i|. With S_k and H_k, the sums of h |w| and h over those k, the
                                 error is sum h w^2 - s (2 S_k - s H_k), for each k least at s = S_k / H_k.

The scale is stored in 16 bit, and of the representable ones that nearest to S_k / H_k is the best for k, because the
error is a parabola in s. So the largest r (2 S_k - r H_k) over k, r = bf16(S_k / H_k), is the optimum over all codes
and all bf16 scales together. Sums are taken in float64.

A weight whose groups already have these levels keeps its codes and its scales to the bit, in the dtype they need.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..weights.levels import groups_of, signed_levels
from ..weights.packed_weight import SCHEMES, narrow_exact

STEP_WEIGHTS = 1 << 20
"""Weights worked on at a time; about 60 bytes each are in use then."""
SCALE_DTYPE = torch.bfloat16


def quantize_groups(
    weight: torch.Tensor, scheme: str, group_size: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K] as packed_weight.py defines them, scale [N, K / group]) of a dense weight [N, K].

    importance: float [K], not negative: how much an error in a column counts. The scale is bf16, or wider where the
    weight already has the levels of the scheme with scales that need it. Raises ValueError for a value that is not
    finite.
    """
    exact = existing_scale(weight, scheme, group_size)
    scales, codes = [], []
    for lo, rows in _finite_groups(weight, group_size):
        if exact is None:
            scale = best_scale(rows, scheme, None if importance is None else importance.view(-1, group_size))
        else:
            scale = exact[lo : lo + rows.shape[0]]
        codes.append(to_codes(rows, scale.to(rows.dtype), scheme).flatten(1))
        scales.append(scale)
    table = torch.cat(scales)
    return torch.cat(codes), narrow_exact(table) if exact is not None else table.to(SCALE_DTYPE)


def existing_scale(weight: torch.Tensor, scheme: str, group_size: int) -> torch.Tensor | None:
    """The scales float32 [N, K / group] of a weight whose every group has the scheme's levels already, else None."""
    found = signed_levels(weight, group_size)
    return None if found is None or found[1] > SCHEMES[scheme].levels else found[0]


def best_scale(
    groups: torch.Tensor,
    scheme: str,
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = SCALE_DTYPE,
) -> torch.Tensor:
    """Optimal scales float64 [..], exact in `scale_dtype`, of groups float [.., g]; importance: float, broadcastable.

    A group whose importances are all zero is treated as if they were equal.
    """
    size = groups.abs().double()
    if importance is None:
        mass = None
    else:
        mass = importance.double().expand(size.shape)
        mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, 1.0)
    if scheme == "binary":
        mean = size.mean(-1) if mass is None else (size * mass).sum(-1) / mass.sum(-1)
        return mean.to(scale_dtype).double()
    if mass is None:
        size = _descending(groups.abs()).double()
        held = torch.arange(1, size.shape[-1] + 1, dtype=torch.float64, device=size.device)
        sums = size.cumsum(-1)
    else:
        size, order = size.sort(-1, descending=True)
        mass = mass.gather(-1, order)
        held, sums = mass.cumsum(-1), (size * mass).cumsum(-1)
    scale = torch.where(held > 0, sums / held.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    scale = scale.to(scale_dtype).double()
    gain = scale * (2 * sums - scale * held)
    return scale.gather(-1, gain.argmax(-1, keepdim=True)).squeeze(-1)


def to_codes(groups: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """The best codes uint8 [.., g] for given scales [..]: binary 0 (plus), 1 (minus); ternary 0, 1 (zero), 2."""
    if scheme == "binary":
        return (groups < 0).to(torch.uint8)
    half = (scale / 2).unsqueeze(-1)
    return 1 - (groups > half).to(torch.uint8) + (groups < -half).to(torch.uint8)


def values(codes: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """Codes [.., g] and scales [..] -> values [.., g] in the dtype of the scales."""
    return SCHEMES[scheme].values(codes, scale, None, scale.dtype)


def quantize_affine(
    weight: torch.Tensor, group_size: int, radix: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K] below `radix`, scale, zero bf16 [N, K / group]) of a dense weight, w = code * scale + zero.

    Starts from the range of a group and refits both tables to the codes twice, keeping the best of the three.
    """
    codes, scales, zeros, top = [], [], [], radix - 1
    for _, rows in _finite_groups(weight, group_size):
        low, high = rows.amin(-1), rows.amax(-1)
        scale, zero = ((high - low) / top).to(SCALE_DTYPE).float(), low.to(SCALE_DTYPE).float()
        best_scale_, best_zero, best_error = scale, zero, torch.full_like(scale, torch.inf)
        best_codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
        for _ in range(3):
            step = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
            code = ((rows - zero.unsqueeze(-1)) / step).round_().clamp_(0, top)
            error = (code * scale.unsqueeze(-1) + zero.unsqueeze(-1) - rows).square_().sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale_, best_zero = torch.where(better, scale, best_scale_), torch.where(better, zero, best_zero)
            best_codes = torch.where(better.unsqueeze(-1), code.to(torch.uint8), best_codes)
            centred = code - code.mean(-1, keepdim=True)
            spread = centred.square().sum(-1)
            slope = torch.where(spread > 0, (centred * rows).sum(-1) / spread.clamp_min(1e-30), scale)
            scale = slope.to(SCALE_DTYPE).float()
            zero = (rows.mean(-1) - scale * code.mean(-1)).to(SCALE_DTYPE).float()
        codes.append(best_codes.flatten(1))
        scales.append(best_scale_.to(SCALE_DTYPE))
        zeros.append(best_zero.to(SCALE_DTYPE))
    return torch.cat(codes), torch.cat(scales), torch.cat(zeros)


def _finite_groups(weight: torch.Tensor, group_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, float32 [n, K / group, group]) until every row was seen. Raises ValueError if one is not finite."""
    for lo, rows in groups_of(weight, group_size, STEP_WEIGHTS):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"rows {lo}..{lo + rows.shape[0] - 1} hold a value that is not finite")
        yield lo, rows


def _descending(size: torch.Tensor) -> torch.Tensor:
    """The last dimension sorted, largest first. numpy's sort of short rows is several times torch's on a processor."""
    if size.device.type == "cpu":
        return torch.from_numpy(np.sort(size.contiguous().numpy(), axis=-1)).flip(-1)
    return size.sort(-1, descending=True).values
