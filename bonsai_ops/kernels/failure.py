"""Faults of a backend, which another one makes good, and the one that nothing does."""

from __future__ import annotations

from ..weights.errors import TravellingError


class BackendError(TravellingError, RuntimeError):
    """A kernel that cannot be built or started, or computes wrong values. The message is the cause and `cure`."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(f"{cause}; to use it, {cure}")
        self.cure = cure


class LostDeviceError(TravellingError, RuntimeError):
    """The device answers nothing any more in this process, whoever asks. The message has the cause and the cure."""

    def __init__(self, device: str, error: BaseException) -> None:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        super().__init__(
            f"{device} stopped working ({first_line}) and answers nothing more until ComfyUI is restarted: restart it. "
            "What ran last need not be to blame. If it happens again, update the GPU's driver and undo overclocking"
        )
