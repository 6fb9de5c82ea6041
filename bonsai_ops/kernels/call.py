"""What is multiplied, and what a backend is: the words that the dispatcher and the backends share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..weights.packed_weight import DENSITIES, PackedWeight

EXACT = "exact"
MODES = (EXACT, "fp16_accumulate", "a8", "a8_fp8")
"""exact: the weight's values, fp32 sums. fp16_accumulate: fp16 sums of up to 128 products. a8: activations in int8.
a8_fp8: activations in the 8-bit floats e4m3."""
ERRORS = {"fp16_accumulate": 2e-3, "a8": 1.2e-2, "a8_fp8": 4e-2}
"""Largest |y - exact| / |exact| of a mode that rounds, for normal x; every backend is tested against it."""


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to accept a product.

    rows, columns: N, K of the weight. capability: (major, minor) of an NVIDIA device, None elsewhere. mode: of MODES.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    scheme: str
    codec: str
    group_size: int
    capability: tuple[int, int] | None = None
    mode: str = EXACT


@dataclass(frozen=True)
class Limits:
    """What a backend takes in one mode. devices: types of torch. codecs: {scheme: codecs}. group_size: None for any."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    codecs: Mapping[str, tuple[str, ...]]
    group_size: int | None = None

    def unmet(self, call: Call) -> str | None:
        """The first of these limits that a call does not keep to, in a few words for the user, or None."""
        if call.device.type not in self.devices:
            return f"the weight is on {call.device.type}"
        codecs = self.codecs.get(call.scheme, ())
        if call.codec not in codecs:
            density = next((name for name, codec in DENSITIES.items() if codec in codecs), None)
            cure = "" if density is None else f"; choose the layout {density} in the loader"
            return f"mode {call.mode} has no kernel for {call.scheme} weights stored as {call.codec}{cure}"
        if call.dtype not in self.dtypes:
            return f"mode {call.mode} computes in {' and '.join(map(_name, self.dtypes))}, not {_name(call.dtype)}"
        if self.group_size not in (None, call.group_size):
            return f"it needs groups of {self.group_size} columns, not {call.group_size}"
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Backend(Protocol):
    """One implementation: a module with these names. BACKENDS of dispatch.py lists all."""

    NAME: str
    MODES: tuple[str, ...]
    """Modes that it computes in; it is asked for no other."""

    def declines(self, call: Call) -> str | None:
        """Why not, in a few words for the user, or None. Must not raise. The answer is kept for equal calls."""

    def multiply(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        """y = x W^T + bias for a call that it did not decline: x [.., K] -> [.., N] in x's dtype.

        The weight comes without a residual, which `linear` adds; a backend that would leave it out refuses it. Raises
        BackendError where the backend is broken. A backend of dispatch.TRANSPOSING has `multiply_transposed(grad,
        weight)` too, y W in mode exact.
        """


def refuse_residual(weight: PackedWeight) -> None:
    """Raises ValueError for a weight with a residual."""
    if weight.rank:
        raise ValueError(f"the weight has a residual (rank {weight.rank}), which kernels.linear adds: call that")


@dataclass(frozen=True)
class Choice:
    """What multiplies a call, in which mode, and {backend, mode or dtype that would be faster: why not}.

    rival: what may be faster from contest.LEAST_TOKENS tokens on. settled: {tokens of contest.TOKENS: the faster one}.
    """

    backend: Backend
    mode: str
    declined: dict[str, str]
    rival: Choice | None = None
    settled: dict[int, Choice] = field(default_factory=dict, compare=False)


def call_of(device: torch.device, dtype: torch.dtype, weight: PackedWeight, mode: str = EXACT) -> Call:
    """The call that multiplies activations of `dtype` on `device` with `weight`."""
    return Call(
        device, dtype, *weight.shape, weight.scheme, weight.codec, weight.group_size, _capability(str(device)), mode
    )


@functools.cache
def _capability(device: str) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA device, None for any other."""
    if not device.startswith("cuda") or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def check_mode(mode: str) -> None:
    """Raises ValueError for a mode that MODES does not list."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown, expected one of {', '.join(MODES)}")
