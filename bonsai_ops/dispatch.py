"""Which backend multiplies a packed weight: the first in order that does not decline, and why the others did.

A backend is a name, a function that says why it cannot take a call (or None), and the product. Order: fused kernels,
the CPU's own path, then the eager reference, which takes everything. `use_backend("eager")` forces one within a block,
the environment variable BONSAI_BACKEND for a whole process. A backend that raises at its first launch on a device is
out for that device from then on: one line in the log with the cure, and the next one takes over.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .backends import cpu, eager
from .packed_weight import PackedWeight
from .precision import cpu_has_fast_bf16

logger = logging.getLogger(__name__)

OVERRIDE = "BONSAI_BACKEND"


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to accept a product.

    rows, columns: N, K of the weight. capability: (major, minor) of an NVIDIA device, None elsewhere.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    columns: int
    scheme: str
    codec: str
    group_size: int
    capability: tuple[int, int] | None = None


Product = Callable[[torch.Tensor, PackedWeight, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation. `declines(call)`: why not, in a few words, or None."""

    name: str
    declines: Callable[[Call], str | None]
    linear: Product


def _cpu_declines(call: Call) -> str | None:
    return cpu.declines(call.device, call.dtype, call.scheme, cpu_has_fast_bf16())


def _triton_declines(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"the weight is on {call.device.type}"
    from .backends import triton  # imports Triton, which only a GPU needs

    return triton.unavailable() or triton.declines(
        call.device,
        call.capability,
        call.dtype,
        call.rows,
        call.columns,
        call.scheme,
        call.codec,
        call.group_size,
        "exact",
    )


def _triton_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from .backends import triton

    return triton.linear(x, weight, bias)


BACKENDS = (
    Backend("triton", _triton_declines, _triton_linear),
    Backend("cpu", _cpu_declines, cpu.linear),
    Backend("eager", lambda call: None, eager.linear),
)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("bonsai_backend", default=None)


@dataclass
class _Broken:
    """Backends that failed at run time, by device: {(name, device): reason}."""

    reasons: dict[tuple[str, str], str] = field(default_factory=dict)


_broken = _Broken()


def backend_names() -> list[str]:
    """Names of all backends in the order in which they are asked."""
    return [backend.name for backend in BACKENDS]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block only `name` is used, or the eager reference where it declines; None takes the choice back.

    Raises ValueError for an unknown name.
    """
    _check(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(call: Call) -> tuple[Backend, dict[str, str]]:
    """(the backend for a call, {name of each one before it: why it declined})."""
    wanted = _forced.get() or _override()
    declined: dict[str, str] = {}
    for backend in BACKENDS:
        reason = _broken.reasons.get((backend.name, str(call.device)))
        if reason is None and wanted not in (None, backend.name) and backend.name != "eager":
            reason = f"{wanted} is asked for"
        if reason is None:
            reason = backend.declines(call)
        if reason is None:
            return backend, declined
        declined[backend.name] = reason
    raise AssertionError("the eager backend takes every call")


def why_not(call: Call) -> dict[str, str]:
    """{backend: why it does not take this call} for those that come before the chosen one."""
    return choose(call)[1]


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias by the best backend; x [.., K] -> [.., N]. A backend that breaks is replaced, not raised."""
    call = call_of(x.device, x.dtype, weight)
    while True:
        backend, _ = choose(call)
        try:
            return backend.linear(x, weight, bias)
        except Exception as error:  # a compiler that breaks at its first launch may raise anything
            if backend.name == "eager" or isinstance(error, torch.OutOfMemoryError):
                raise
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            reason = f"failed on {call.device}: {first_line}"
            _broken.reasons[(backend.name, str(call.device))] = reason
            logger.warning("Bonsai: backend %s %s; going on without it, slower", backend.name, reason)


def call_of(device: torch.device, dtype: torch.dtype, weight: PackedWeight) -> Call:
    """The call that multiplies activations of `dtype` on `device` with `weight`."""
    return Call(device, dtype, *weight.shape, weight.scheme, weight.codec, weight.group_size, _capability(str(device)))


@functools.cache
def _capability(device: str) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA device, None for any other."""
    if not device.startswith("cuda") or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _check(name: str | None) -> None:
    if name is not None and name not in backend_names():
        raise ValueError(f"backend {name!r} is unknown, expected one of {', '.join(backend_names())}")


@functools.cache
def _override() -> str | None:
    name = os.environ.get(OVERRIDE) or None
    _check(name)
    return name
