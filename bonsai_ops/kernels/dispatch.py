"""Which backend multiplies a packed weight: the first in order that does not decline, and why the others did.

A backend is a name, a function that says why it cannot take a call (or None), and the product. Order: fused kernels,
the CPU's own path, then the eager reference, which takes everything. `use_backend("eager")` forces one within a block,
the environment variable BONSAI_BACKEND for a whole process. A backend that raises is out for that device and mode from
then on: one line in the log with the cure, and the next one takes over. Where memory ran out or the device's context is
lost, the error is the caller's, and nothing is out.

A mode other than exact is a wish: where no backend offers it for a call, the call is exact, and the reason is kept
under the mode's name beside those of the backends.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ..weights.packed_weight import PackedWeight
from . import cpu, eager
from .failure import BackendError, is_the_devices
from .machine import cpu_has_fast_bf16, cpu_has_fast_int8

logger = logging.getLogger(__name__)

OVERRIDE = "BONSAI_BACKEND"

EXACT = "exact"
MODES = (EXACT, "fp16_accumulate", "a8")
"""exact: the weight's values, fp32 sums. fp16_accumulate: fp16 sums of up to 128 products. a8: activations in int8."""


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


Product = Callable[..., torch.Tensor]
"""(x [.., K], weight without a low-rank residual, bias, mode=..) -> [.., N] in x's dtype."""


@dataclass(frozen=True)
class Backend:
    """One implementation. `declines(call)`: why not, in a few words, or None."""

    name: str
    declines: Callable[[Call], str | None]
    linear: Product


@dataclass(frozen=True)
class Choice:
    """What multiplies a call, in which mode, and {backend, mode or dtype that would be faster: why not}."""

    backend: Backend
    mode: str
    declined: dict[str, str]


def _cpu_declines(call: Call) -> str | None:
    return cpu.declines(call.device, call.dtype, call.scheme, cpu_has_fast_bf16(), call.mode, cpu_has_fast_int8())


def _triton_declines(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"the weight is on {call.device.type}"
    from .triton import backend as triton  # imports Triton, which only a GPU needs

    return triton.unavailable() or triton.declines(
        call.device,
        call.capability,
        call.dtype,
        call.rows,
        call.columns,
        call.scheme,
        call.codec,
        call.group_size,
        call.mode,
    )


def _triton_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    from .triton import backend as triton

    return triton.linear(x, weight, bias, mode=mode)


def _eager_declines(call: Call) -> str | None:
    return None if call.mode == EXACT else "it is always exact"


BACKENDS = (
    Backend("triton", _triton_declines, _triton_linear),
    Backend("cpu", _cpu_declines, cpu.linear),
    Backend("eager", _eager_declines, eager.linear),
)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("bonsai_backend", default=None)


@dataclass
class _Failures:
    """Backends that failed at run time. reasons: {(name, device, mode): reason}. said: (name, cure) of the log."""

    reasons: dict[tuple[str, str, str], str] = field(default_factory=dict)
    said: set[tuple[str, str]] = field(default_factory=set)

    def record(self, choice: Choice, device: torch.device, error: Exception) -> None:
        """Retires the backend for a device and mode; said in the log unless a failure with the same cure was."""
        name = choice.backend.name
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        reason = f"failed on {device} in mode {choice.mode}: {first_line}"
        self.reasons[(name, str(device), choice.mode)] = reason
        said = (name, error.cure if isinstance(error, BackendError) else first_line)
        if said not in self.said:
            self.said.add(said)
            logger.warning("Bonsai: backend %s %s. Going on without it, slower", name, reason)


_failures = _Failures()


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


def forget_failures() -> None:
    """Takes every backend that failed in this process back into the choice."""
    _failures.reasons.clear()
    _failures.said.clear()


def resolve(call: Call) -> Choice:
    """The backend and the mode for a call: exact by the best backend where none offers the call's mode.

    Raises ValueError for an unknown mode.
    """
    check_mode(call.mode)
    backend, declined = _first(call)
    if backend is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in declined.items() if name != "eager")
        backend, others = _first(replace(call, mode=EXACT))
        call, declined = replace(call, mode=EXACT), {call.mode: why, **others}
    if call.device.type == "cpu" and call.dtype == torch.float32 and not cpu_has_fast_bf16():
        declined = {**declined, "bf16": "this CPU has no AVX-512 BF16 or AMX"}
    return Choice(backend, call.mode, declined)


def _first(call: Call) -> tuple[Backend | None, dict[str, str]]:
    """(the first backend that takes a call as it is, or None; {name of each one before it: why it declined})."""
    wanted = _forced.get() or _override()
    declined: dict[str, str] = {}
    for backend in BACKENDS:
        reason = _failures.reasons.get((backend.name, str(call.device), call.mode))
        if reason is None and wanted not in (None, backend.name) and backend.name != "eager":
            reason = f"{wanted} is asked for"
        if reason is None:
            reason = backend.declines(call)
        if reason is None:
            return backend, declined
        declined[backend.name] = reason
    return None, declined


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT) -> torch.Tensor:
    """y = x W^T + bias by the best backend; x [.., K] -> [.., N]. The weight's low-rank residual is added in x's dtype.

    A backend that breaks is replaced, not raised. Raises ValueError for arguments that do not fit together, what says
    that memory ran out or that the device is lost, and what the reference raises.
    """
    check_arguments(x, weight, bias)
    return add_residual(_without_residual(x, weight.without_residual(), bias, mode), x, weight)


def check_arguments(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
    """Raises ValueError unless x is [.., K] and the bias [N], both on the weight's device."""
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"input has {x.shape[-1]} columns, the packed weight {columns}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the packed weight {rows} rows")
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.device != weight.codes.device:
            raise ValueError(f"{name} is on {tensor.device}, the packed weight on {weight.codes.device}")


def add_residual(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """y [.., N] + x down^T up^T in x's dtype, whatever the mode; y itself where the weight has no residual."""
    if weight.up is None:
        return y
    inner = torch.nn.functional.linear(x, weight.down.to(x.dtype))
    return y + torch.nn.functional.linear(inner, weight.up.to(x.dtype))


def _without_residual(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    call = call_of(x.device, x.dtype, weight, mode)
    while True:
        choice = resolve(call)
        try:
            return choice.backend.linear(x, weight, bias, mode=choice.mode)
        except Exception as error:  # a compiler that breaks at its first launch may raise anything
            if choice.backend.name == "eager" or is_the_devices(error):
                raise
            _failures.record(choice, call.device, error)


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


def _check(name: str | None) -> None:
    if name is not None and name not in backend_names():
        raise ValueError(f"backend {name!r} is unknown, expected one of {', '.join(backend_names())}")


@functools.cache
def _override() -> str | None:
    name = os.environ.get(OVERRIDE) or None
    _check(name)
    return name
