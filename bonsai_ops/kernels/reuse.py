"""Memory of large CPU tensors, used again while a model is sampled.

The C library returns memory of this size to the system as soon as a tensor dies, and the system clears it page by page
when the next one is written: so a third of all page faults of a step of the 4B model at 512x512 come about. Between
`open` and `close` a `Reuse` keeps that memory and lends it to the next tensor once the last view of the previous one is
gone. Several may have it open at a time, such as a sampling and a picture that is decoded meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

LEAST_BYTES = 1 << 20
"""Smaller tensors come from memory that the C library keeps anyway."""
LARGEST_WASTE = 2
"""A tensor gets at most this many times the memory it needs."""
IDLE_TURNS = 10
"""Memory that so many turns did not need is given back. A double block of FLUX.2 has eight layers."""


@dataclass
class _Buffer:
    """memory: uint8. loan: dies with the last tensor on that memory; None before the first. turn: of the last loan."""

    memory: np.ndarray
    loan: weakref.ref | None = None
    turn: int = 0

    @property
    def free(self) -> bool:
        return self.loan is None or self.loan() is None


class _User:
    """Of one block."""


class Reuse:
    """Lends memory. A product takes one turn, whatever it needs beside its result. Usable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._users: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def open(self, user: object) -> None:
        """Memory is kept from now on, until the user has closed as often as opened, or is gone."""
        with self._lock:
            self._users[user] = self._users.get(user, 0) + 1

    def close(self, user: object) -> None:
        """The last to close gives back what is free now; the rest goes with the tensors that use it.

        Nothing happens for a user who did not open.
        """
        with self._lock:
            left = self._users.pop(user, 0) - 1
            if left > 0:
                self._users[user] = left
            if not self._users:
                self._buffers.clear()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open within the block."""
        user = _User()
        self.open(user)
        try:
            yield
        finally:
            self.close(user)

    @property
    def nbytes(self) -> int:
        """Bytes kept, in use or not."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def next_turn(self) -> None:
        """Gives back what no product needed for IDLE_TURNS turns."""
        with self._lock:
            self._turn += 1
            self._buffers = [b for b in self._buffers if not b.free or self._turn - b.turn <= IDLE_TURNS]

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor [rows, columns] that shares its memory with no other living tensor."""
        nbytes = rows * columns * dtype.itemsize
        if not self._users or nbytes < LEAST_BYTES:
            return torch.empty(rows, columns, dtype=dtype, device="cpu")
        with self._lock:
            fitting = [b for b in self._buffers if nbytes <= b.memory.nbytes <= LARGEST_WASTE * nbytes and b.free]
            if fitting:
                buffer = min(fitting, key=lambda b: b.memory.nbytes)
            else:
                buffer = _Buffer(torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy())
                self._buffers.append(buffer)
            part = buffer.memory[:nbytes]  # an object of its own, which the tensor's storage keeps alive
            buffer.loan, buffer.turn = weakref.ref(part), self._turn
            return torch.from_numpy(part).view(dtype).view(rows, columns)
