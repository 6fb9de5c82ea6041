"""What the LoRAs of one model keep on a device from call to call: their matrices.

Without them each call would send the matrices of its layer to the device, and wait. They are bounded, and leave where
ComfyUI asks for memory back.
"""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

LARGEST = 512 << 20
"""Bytes that the LoRAs of one model may keep: a rank of 180 on every layer of FLUX.2 Klein 4B."""


class Keeper(Protocol):
    """The LoRAs of one layer."""

    @property
    def kept(self) -> list[torch.Tensor]: ...

    def forget(self) -> None: ...


class Kept:
    """The bytes of one model. limit: how many there may be. Nothing is added between `give_back` and `reopen`."""

    def __init__(self, limit: int = LARGEST) -> None:
        self.limit = limit
        self._open, self._told = True, False
        self._keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(matrix.nbytes for keeper in self._keepers for matrix in keeper.kept)

    def admits(self, keeper: Keeper, nbytes: int) -> bool:
        """Whether the keeper may keep that many bytes in place of those it has; it is asked for them later."""
        if not self._open:
            return False
        others = self.nbytes - sum(matrix.nbytes for matrix in keeper.kept)
        if others + nbytes > self.limit:
            if not self._told:
                self._told = True
                logger.info(
                    "Bonsai: the LoRAs take more than the %d MB that may stay on the device; the rest of them is sent "
                    "there at each step, which is slower",
                    self.limit >> 20,
                )
            return False
        self._keepers.add(keeper)
        return True

    def forget(self) -> int:
        """Lets go of everything; returns how many bytes that were."""
        nbytes = self.nbytes
        for keeper in list(self._keepers):
            keeper.forget()
        self._keepers.clear()
        return nbytes

    def give_back(self) -> int:
        """`forget`, and keeps nothing more before `reopen`: memory is short."""
        self._open = False
        return self.forget()

    def reopen(self) -> None:
        """Room was made: LoRAs may keep matrices again."""
        self._open, self._told = True, False
