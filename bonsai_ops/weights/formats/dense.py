"""Unpacked files: ordinary 16-bit (or fp32) .safetensors whose weights really have two or three levels a group.

Diffusers names (`transformer/diffusion_pytorch_model.safetensors` of the unpacked repositories) or BFL names. Nothing
in the file says that it is low-bit; `find_levels` proves it for each weight, value by value:

    {-s, s}       in every group of g consecutive columns   -> 1-bit codes
    {-s, 0, s}                                              -> 2-bit codes
    {a, b} or three equally spaced levels                   -> 1- or 2-bit codes with both tables kept

with the largest g of 128, 64 and 32 for which it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..finite import NOT_FINITE, is_finite
from ..levels import groups_of, signed_levels
from ..packed_weight import PackedWeight
from .entries import DOWNLOAD_AGAIN, CodedTensor, DenseTensor, Entry, Pack
from .safetensors_file import SafetensorsFile

NAME = "unpacked"
FILE = SafetensorsFile
PLACES = {
    "transformer": ("transformer/diffusion_pytorch_model.safetensors",),
    "text_encoder": ("text_encoder/model.safetensors",),
}
GROUP_SIZES = (128, 64, 32)
PROBE_ROWS = 64
CURE = (
    'Load a dense model with "Load Diffusion Model" (a checkpoint with "Load Checkpoint"), or quantize it with '
    '"Patch to BitLinear".'
)


def claims(file: SafetensorsFile) -> bool:
    """Any file that no other format claims: its weights tell only when they are read."""
    return True


def read(file: SafetensorsFile) -> Pack:
    """Every tensor of the file as DenseTensor; `pack_dense` makes a LevelsTensor of one."""
    return Pack(file.path, NAME, {name: file.dense(name) for name in file.tensors}, LevelsTensor.of)


@dataclass(frozen=True)
class LevelsTensor(Entry):
    """A weight [N, K] stored dense that becomes packed once its levels are found."""

    dense: DenseTensor

    @classmethod
    def of(cls, dense: DenseTensor) -> LevelsTensor:
        return cls(dense.path, dense.key, dense.shape, dense)

    def weight(self) -> PackedWeight:
        return find_levels(self.dense).weight()

    def kind(self) -> str:
        return self.dense.kind()


def find_levels(entry: DenseTensor) -> CodedTensor:
    """The codes and tables that give exactly the values of a dense weight [N, K].

    Raises PackError if the groups of the weight have more levels than two or three equally spaced ones.
    """
    weight = entry.load()
    if not is_finite(weight):
        raise entry.error(NOT_FINITE, DOWNLOAD_AGAIN)
    if weight.ndim != 2:
        raise entry.error(f"has shape {list(entry.shape)}", "Expected a weight [N, K].")
    for group_size in GROUP_SIZES:
        if weight.shape[1] % group_size:
            continue
        if signed_levels(weight[:PROBE_ROWS], group_size) is not None:
            found = signed_levels(weight, group_size)
            if found is not None:
                return _symmetric(entry, weight, group_size, *found)
        for bits in (1, 2):
            if _spaced_tables(weight[:PROBE_ROWS], group_size, bits) is not None:
                spaced = _spaced_tables(weight, group_size, bits)
                if spaced is not None:
                    return _spaced(entry, weight, group_size, bits, *spaced)
    raise entry.error("has groups of more than three levels, so this is no 1-bit or ternary model", CURE)


def _symmetric(
    entry: DenseTensor, weight: torch.Tensor, group_size: int, magnitude: torch.Tensor, levels: int
) -> CodedTensor:
    ternary = levels == 3

    def read(lo: int, hi: int) -> torch.Tensor:
        rows = weight[lo:hi]
        return (rows.sign() + 1).to(torch.uint8) if ternary else (rows > 0).to(torch.uint8)

    scale = magnitude if ternary else 2 * magnitude
    return CodedTensor(
        entry.path,
        entry.key,
        (weight.shape[0], weight.shape[1]),
        2 if ternary else 1,
        group_size,
        lambda: (scale, -magnitude),
        read,
    )


def _spaced_tables(weight: torch.Tensor, group_size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(spacing, lowest level) if every group has at most 2 (1 bit) or 3 (2 bit) equally spaced levels, else None."""
    scales, lows = [], []
    for _, groups in groups_of(weight, group_size):
        low = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - low) / bits
        rebuilt = (_nearest(groups, scale, low) * scale + low).to(weight.dtype).float()
        if not torch.equal(rebuilt, groups):
            return None
        scales.append(scale.squeeze(-1))
        lows.append(low.squeeze(-1))
    return torch.cat(scales), torch.cat(lows)


def _nearest(groups: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, (groups - low) / torch.where(scale > 0, scale, 1), 0).round()


def _spaced(
    entry: DenseTensor, weight: torch.Tensor, group_size: int, bits: int, scale: torch.Tensor, low: torch.Tensor
) -> CodedTensor:
    def read(lo: int, hi: int) -> torch.Tensor:
        groups = weight[lo:hi].float().view(hi - lo, -1, group_size)
        codes = _nearest(groups, scale[lo:hi].unsqueeze(-1), low[lo:hi].unsqueeze(-1))
        return codes.to(torch.uint8).view(hi - lo, -1)

    return CodedTensor(
        entry.path, entry.key, (weight.shape[0], weight.shape[1]), bits, group_size, lambda: (scale, low), read
    )
