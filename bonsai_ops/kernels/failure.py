"""Faults of a backend, which another one makes good."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A kernel that cannot be built or started, or computes wrong values. The message is the cause and `cure`."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(f"{cause}; to use it, {cure}")
        self.cure = cure
