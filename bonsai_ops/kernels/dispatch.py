"""Which backend multiplies a packed weight: the first in order that does not decline, and why the others did.

Order: fused kernels, the CPU's own path, unpacking in one launch by Triton or by CUDA C++, then the eager reference,
which takes everything in mode exact.
`use_backend("eager")` forces one within a block, the environment variable BONSAI_BACKEND for a whole process. A backend
that raises is out for that device and mode from then on: one line in the log with the cure, and the next one takes
over. Where memory ran out or the device's context is lost, or while a CUDA graph is recorded, which an error ends, the
error is the caller's, and nothing is out; a lost context is said to be one, with the cure.

Where a fused kernel takes a call with many tokens and unpacking could too, contest.py tells which is faster.

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

from ..weights.device_errors import is_lost, is_the_devices
from ..weights.packed_weight import PackedWeight
from . import contest, cpu, eager, machine, triton
from .call import EXACT, Backend, Call, Choice, call_of, check_mode
from .choices import FUSED, UNPACK
from .failure import BackendError, LostDeviceError
from .triton import by_plane
from .unpack import by_nvrtc, by_triton

logger = logging.getLogger(__name__)

OVERRIDE = "BONSAI_BACKEND"

BACKENDS: tuple[Backend, ...] = (by_plane, triton, cpu, by_triton, by_nvrtc, eager)
"""In the order in which they are asked. A new one is a module with the names of call.Backend and a word here; the tests
of the protocol walk this list."""

TRANSPOSING: tuple[Backend, ...] = (cpu, by_triton, by_nvrtc, eager)
"""Those that have `multiply_transposed` too, in the order in which they are asked for it."""

CONTESTED, RIVALS = (by_plane, triton), (by_triton, by_nvrtc)
"""What one of the first multiplies, the first of the second that takes it in mode exact may multiply faster."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("bonsai_backend", default=None)


@dataclass
class _Failures:
    """Backends that failed at run time. reasons: {(name, device, mode): reason}. said: (name, cure) of the log."""

    reasons: dict[tuple[str, str, str], str] = field(default_factory=dict)
    said: set[tuple[str, str]] = field(default_factory=set)

    def record(self, choice: Choice, device: torch.device, error: Exception) -> None:
        """Retires the backend for a device and mode; said in the log unless a failure with the same cure was."""
        name = choice.backend.NAME
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        reason = f"failed on {device} in mode {choice.mode}: {first_line}"
        self.reasons[(name, str(device), choice.mode)] = reason
        _kept.choices.clear()
        said = (name, error.cure if isinstance(error, BackendError) else first_line)
        if said not in self.said:
            self.said.add(said)
            logger.warning("Bonsai: backend %s %s. Going on without it, slower", name, reason)


_failures = _Failures()


@dataclass
class _Kept:
    """Choices that `multiply` made, {call, as tuple: choice}, for as long as `basis`, which they rest on, is there."""

    basis: tuple = ()
    choices: dict[tuple, Choice] = field(default_factory=dict)


_kept = _Kept()
MOST_KEPT = 1024
"""More kinds of calls than any model has."""


def backend_names() -> list[str]:
    """Names of all backends in the order in which they are asked."""
    return [backend.NAME for backend in BACKENDS]


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
    _kept.choices.clear()


def resolve(call: Call) -> Choice:
    """The backend and the mode for a call: exact by the best backend where none offers the call's mode.

    Raises ValueError for an unknown mode.
    """
    check_mode(call.mode)
    backend, declined = _first(call)
    if backend is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in declined.items() if name != eager.NAME)
        backend, others = _first(replace(call, mode=EXACT))
        call, declined = replace(call, mode=EXACT), {call.mode: why, **others}
    if call.device.type == "cpu" and call.dtype == torch.float32 and not machine.cpu_has_fast_bf16():
        declined = {**declined, "bf16": cpu.NO_BF16}
    return Choice(backend, call.mode, declined, _rival(call, backend))


def resolve_transposed(call: Call) -> Choice:
    """The backend for the gradient of a call with respect to its input, y W, which is exact in every mode."""
    backend, declined = _first(replace(call, mode=EXACT), TRANSPOSING)
    return Choice(backend, EXACT, declined)


def _rival(call: Call, backend: Backend) -> Choice | None:
    """What may be faster than a backend for some numbers of tokens; None where nothing is or another one is forced."""
    if backend not in CONTESTED or call.device.type not in contest.timers or (_forced.get() or _override()) is not None:
        return None
    call = replace(call, mode=EXACT)
    others = (one for one in BACKENDS if one in RIVALS and _reason(one, call) is None)
    return next((Choice(one, EXACT, {}) for one in others), None)


def _reason(backend: Backend, call: Call) -> str | None:
    """Why a backend does not take a call as it is, None if it does."""
    reason = _failures.reasons.get((backend.NAME, str(call.device), call.mode))
    if reason is None and (_forced.get() or _override()) not in (None, backend.NAME) and backend is not eager:
        reason = f"{_forced.get() or _override()} is asked for"
    if reason is None and call.mode not in backend.MODES:
        reason = f"it has no mode {call.mode}"
    return backend.declines(call) if reason is None else reason


def _first(call: Call, among: tuple[Backend, ...] | None = None) -> tuple[Backend | None, dict[str, str]]:
    """(the first backend that takes a call as it is, or None; {name of each one before it: why it declined}).

    among: which are asked, if not all.
    """
    declined: dict[str, str] = {}
    for backend in BACKENDS if among is None else among:
        reason = _reason(backend, call)
        if reason is None:
            return backend, declined
        declined[backend.NAME] = reason
    return None, declined


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias by the best backend; x [.., K] -> [.., N] in x's dtype. Arguments as `linear` checks them.

    A backend that breaks is replaced, not raised. Raises what says that memory ran out, LostDeviceError where the
    device is lost, what the reference raises, and whatever is raised while a CUDA graph is recorded.
    """
    return _by_the_best(x, weight, mode, lambda backend, mode: backend.multiply(x, weight, bias, mode))


def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x = y W, the gradient of `multiply` with respect to x, exact in every mode; y [.., N] -> [.., K] in y's dtype.

    The weight comes without a residual. Raises as `multiply` does.
    """
    return _by_the_best(grad, weight, None, lambda backend, _: backend.multiply_transposed(grad, weight))


def _by_the_best(
    x: torch.Tensor,
    weight: PackedWeight,
    mode: str | None,
    product: Callable[[Backend, str], torch.Tensor],
) -> torch.Tensor:
    """product(backend, mode) of the first backend that neither declines nor breaks; mode: None for y W."""
    while True:
        choice = _choice(x, weight, mode)
        if choice.rival is not None:
            choice = _faster(choice, x, weight, product)
            if choice is None:
                continue
        try:
            return product(choice.backend, choice.mode)
        except Exception as error:  # a compiler that breaks at its first launch may raise anything
            _raise_or_record(choice, x.device, error)


def _raise_or_record(choice: Choice, device: torch.device, error: Exception) -> None:
    """Retires what failed where another backend makes it good; else raises as `multiply` does."""
    if is_lost(error):
        raise LostDeviceError(str(device), error) from error
    if choice.backend is eager or is_the_devices(error) or machine.capturing():
        raise error
    _failures.record(choice, device, error)


def _faster(
    choice: Choice, x: torch.Tensor, weight: PackedWeight, product: Callable[[Backend, str], torch.Tensor]
) -> Choice | None:
    """The choice or its rival, as contest.py tells for the tokens of x; None where one of them broke."""
    tokens = contest.bucket(x.numel() // weight.shape[1])
    if tokens is None:
        return choice
    settled = choice.settled.get(tokens)
    if settled is None:
        key = contest.key_of(call_of(x.device, x.dtype, weight, choice.mode), tokens)
        side = contest.known(key)
        if side is None:
            if not contest.can_time(x):
                return choice
            side = _timed(key, choice, x.device, product)
            if side is None:
                return None
        settled = choice.settled[tokens] = choice.rival if side == UNPACK else choice
    return settled


def _timed(
    key: contest.Key, choice: Choice, device: torch.device, product: Callable[[Backend, str], torch.Tensor]
) -> str | None:
    """The faster side, timed now; None where one of the two broke. Where memory runs out it is the fused one."""
    sides = {FUSED: choice, UNPACK: choice.rival}
    try:
        for one in sides.values():
            try:
                product(one.backend, one.mode)
            except Exception as error:
                _raise_or_record(one, device, error)
                return None
        calls = {side: functools.partial(product, one.backend, one.mode) for side, one in sides.items()}
        return contest.decide(key, device, calls)
    except Exception as error:
        if isinstance(error, LostDeviceError):
            raise
        if is_lost(error):
            raise LostDeviceError(str(device), error) from error
        return FUSED


def _choice(x: torch.Tensor, weight: PackedWeight, mode: str | None) -> Choice:
    """What `resolve` says, or for mode None `resolve_transposed`; asked once for all products of a kind: it takes
    longer than a small one."""
    basis = (BACKENDS, TRANSPOSING, machine.cpu_has_fast_bf16, machine.cpu_has_fast_int8)
    if _kept.basis != basis or len(_kept.choices) >= MOST_KEPT:
        _kept.basis, _kept.choices = basis, {}
    rows, columns = weight.shape
    kind = (x.device, x.dtype, rows, columns, weight.scheme, weight.codec, weight.group_size, mode, _forced.get())
    choice = _kept.choices.get(kind)
    if choice is None:
        call = call_of(x.device, x.dtype, weight, mode or EXACT)
        choice = _kept.choices[kind] = resolve_transposed(call) if mode is None else resolve(call)
    return choice


def keep_memory(user: object) -> None:
    """Large results of the CPU use memory again from now on: between the steps of one picture, or of a benchmark."""
    cpu.reuse.open(user)


def release_memory(user: object) -> None:
    """Ends the user's `keep_memory`; the last gives back what is free now, the rest goes with what uses it."""
    cpu.reuse.close(user)


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """`keep_memory` within the block."""
    with cpu.reuse.opened():
        yield


def kept_bytes() -> int:
    """Bytes that are kept, in use or not."""
    return cpu.reuse.nbytes


def _check(name: str | None) -> None:
    if name is not None and name not in backend_names():
        raise ValueError(f"backend {name!r} is unknown, expected one of {', '.join(backend_names())}")


@functools.cache
def _override() -> str | None:
    name = os.environ.get(OVERRIDE) or None
    _check(name)
    return name
