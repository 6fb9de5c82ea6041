"""One dense linear weight -> a packed one, and how far that is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..weights import codec as codecs
from ..weights.packed_weight import PackedWeight, narrow_exact, pack_signs
from . import lowrank
from .compensate import compensate, inverse_factor, output_error
from .groups import existing_scale, quantize_affine, quantize_groups, values
from .statistics import Statistics

GROUP_SIZES = (256, 128, 64, 32)
AFFINE = {"4bit": "nibble", "8bit": "byte"}
"""Recipes of evenly spaced levels, the smallest first: their codec."""
RECIPES = ("ternary", "binary", *AFFINE)
"""What a user picks; the first two are also the schemes that they make."""


@dataclass(frozen=True)
class Settings:
    """How to quantize. recipe: ternary, binary, 4bit or 8bit. rank: of the 16-bit residual, 0 for none.

    rounds: how often residual and codes are fitted to one another in turn. Raises ValueError for what is not offered.
    """

    recipe: str = "ternary"
    group_size: int = 128
    rank: int = 0
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is unknown, expected one of {', '.join(RECIPES)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not offered, expected one of {GROUP_SIZES[::-1]}")
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} is negative")


@dataclass(frozen=True)
class LayerError:
    """relative: |W - Q| / |W| (Frobenius). output: the same of the outputs for the recorded inputs, None without."""

    relative: float
    output: float | None = None

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise of the weights in dB."""
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)


@dataclass(frozen=True)
class Quantized:
    """The packed weight and its errors. squared: the absolute squared error the budget compares layers by."""

    weight: PackedWeight
    error: LayerError
    squared: float


def recipe_of(weight: PackedWeight) -> str:
    """The recipe that makes such a weight; the name of its scheme if none does."""
    return next((r for r, codec in AFFINE.items() if (weight.scheme, weight.codec) == ("affine", codec)), weight.scheme)


def fitting_group(columns: int, wanted: int) -> int | None:
    """The largest offered group size up to `wanted` that divides `columns`, None if 32 does not."""
    return next((g for g in GROUP_SIZES if g <= wanted and columns % g == 0), None)


def quantize_layer(weight: torch.Tensor, settings: Settings, statistics: Statistics | None = None) -> Quantized:
    """Quantizes a dense weight [N, K]; the result lies on its device.

    With statistics the output error is made small instead of the weight error. Of all that is tried, the result with
    the least such error is kept, so that neither calibration nor residual makes it worse. A weight that has the levels
    already comes back exactly. Raises ValueError if 32 does not divide K or a value is not finite.
    """
    columns = weight.shape[1]
    group_size = fitting_group(columns, settings.group_size)
    if group_size is None:
        raise ValueError(f"{columns} columns are no multiple of {GROUP_SIZES[-1]}")
    if statistics is not None and statistics.power.shape != (columns,):
        raise ValueError(f"statistics of {tuple(statistics.power.shape)} inputs do not fit {columns} columns")
    settings = replace(settings, group_size=group_size)
    dense = weight.detach().to(torch.float32)
    if settings.recipe not in AFFINE and existing_scale(dense, settings.recipe, group_size) is not None:
        return measured(dense, _codes(dense, settings, None)[0], statistics)
    if statistics is not None and statistics.gram is not None:
        statistics = replace(statistics, gram=statistics.gram.to(dense.device, torch.float32))
        factor = None if settings.recipe in AFFINE else inverse_factor(statistics.gram)
    else:
        factor = None
    base, squared = _codes(dense, settings, statistics, factor)
    if settings.rank:
        base, squared = _with_residual(dense, base, squared, settings, statistics, factor)
    return measured(dense, base, statistics, squared)


def _with_residual(
    dense: torch.Tensor,
    plain: PackedWeight,
    squared: float | None,
    settings: Settings,
    statistics: Statistics | None,
    factor: torch.Tensor | None,
) -> tuple[PackedWeight, float]:
    """The best of `plain`, its codes with a residual, and what fitting the two to one another in turn comes to.

    With its squared error; squared: that of `plain` where it is known.
    """
    importance = None if statistics is None else statistics.power
    base, near, tried = plain, None, torch.empty_like(dense)
    rest = _difference(dense, plain)
    best, least = plain, _sum(rest, statistics) if squared is None else squared
    for _ in range(max(1, settings.rounds)):
        up, down = lowrank.fit(rest, settings.rank, importance, near)
        near, residual = down, (up.float(), down.float())
        torch.addmm(rest, *residual, alpha=-1, out=tried)
        error = _sum(tried, statistics)
        if error < least:
            best, least = replace(base, up=up, down=down), error
        torch.addmm(dense, *residual, alpha=-1, out=tried)
        base, error = _codes(tried, settings, statistics, factor)
        rest = _difference(tried, base)
        error = _sum(rest, statistics) if error is None else error
        if error < least:
            best, least = replace(base, up=up, down=down), error
        rest.addmm_(*residual)
    return best, least


def _sum(difference: torch.Tensor, statistics: Statistics | None) -> float:
    return float(squared_error(difference, statistics).sum())


def _difference(dense: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """[N, K], in the memory of the packed weight's values: new memory costs more here than arithmetic."""
    values = packed.dequantize()
    return torch.sub(dense, values, out=values)


def squared_error(difference: torch.Tensor, statistics: Statistics | None) -> torch.Tensor:
    """float64 [N]: what a difference [N, K] of the weights costs in each row: outputs if inputs are known."""
    if statistics is None:
        return torch.linalg.vector_norm(difference, dim=-1).double().square()
    if statistics.gram is not None:
        return output_error(difference, statistics.gram)
    width = statistics.power.to(difference.device, torch.float32).sqrt()
    return torch.linalg.vector_norm(difference * width, dim=-1).double().square()


def _codes(
    target: torch.Tensor, settings: Settings, statistics: Statistics | None, factor: torch.Tensor | None = None
) -> tuple[PackedWeight, float | None]:
    """The best codes for `target` [N, K], row by row: the plain optimum, the weighted one and the compensated one.

    With their squared error where it came out on the way. factor: of `compensate`. Affine recipes have one way only,
    which does not look at the inputs.
    """
    scheme, group_size = settings.recipe, settings.group_size
    if settings.recipe in AFFINE:
        codec = AFFINE[settings.recipe]
        codes, scale, zero = quantize_affine(target, group_size, codecs.get_codec(codec).radix)
        shape = (target.shape[0], target.shape[1])
        return PackedWeight(codecs.encode(codec, codes), scale, shape, "affine", codec, group_size, zero), None
    codes, scale = quantize_groups(target, scheme, group_size)
    if statistics is None:
        return pack_signs(codes, scale, group_size, scheme), None
    tried = [quantize_groups(target, scheme, group_size, statistics.power.to(target.device))]
    if statistics.gram is not None:
        tried.append(compensate(target, statistics.gram, scheme, group_size, factor))
    scale = scale.float()
    error = squared_error(target - values(codes, scale, scheme), statistics)
    for other_codes, other_scale in tried:
        other_error = squared_error(target - values(other_codes, other_scale.float(), scheme), statistics)
        better = (other_error < error).unsqueeze(-1)
        codes, scale = torch.where(better, other_codes, codes), torch.where(better, other_scale.float(), scale)
        error = torch.minimum(error, other_error)
    return pack_signs(codes, narrow_exact(scale), group_size, scheme), float(error.sum())


def measured(
    dense: torch.Tensor, packed: PackedWeight, statistics: Statistics | None = None, squared: float | None = None
) -> Quantized:
    """A packed weight with its errors against the dense one, float32 [N, K] on the same device.

    squared: the squared error for these statistics where it is known.
    """
    difference = _difference(dense, packed)
    plain = _sum(difference, None)
    relative = _ratio(plain, _sum(dense, None))
    if statistics is None:
        return Quantized(packed, LayerError(relative), plain)
    squared = _sum(difference, statistics) if squared is None else squared
    output = _ratio(squared, _sum(dense, statistics))
    return Quantized(packed, LayerError(relative, output), squared)


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole > 0 else 0.0
