"""Which ptxas makes machine code of plane_kernel on Hopper, and whether one that did can be trusted.

There wgmma reads the weight from registers while the warps go on. ptxas before CUDA 13.3 gives these registers away
before the product has read them: wrong values, now and then, by its timing (Triton's developers found it; the release
notes of CUDA 13.3 list it as resolved). Triton 3.8 brings two of them and takes the older one for Hopper; it is also
the first whose PTX keeps such registers apart. `of` has Triton take the newer one, `check` reads in the machine code
who made it: it may come from Triton's cache.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ..failure import BackendError
from .configs import Config

LEAST_TRITON = (3, 8)
LEAST_PTXAS = (13, 3)
FROM_REGISTERS = 2
"""Config.plane of the kernels whose products read registers."""
CURE = "take Triton 3.8 or newer with the ptxas of CUDA 13.3 or newer (TRITON_PTXAS_PATH may name one)"

_sound: set[Any] = set()
"""Compiled kernels whose machine code was looked at."""


def unavailable() -> str | None:
    """Why no machine code can be trusted on Hopper, with the cure; None if it can. Triton must be importable."""
    return None if _tool() is not None else f"its ptxas overwrites registers of a running product; to use it, {CURE}"


def _tool() -> Any:
    """The ptxas to take: that of Hopper if it is new enough, else that of Blackwell, None if neither is."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return None
    for name in ("ptxas", "ptxas_blackwell"):
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # a Triton without it
            tool = getattr(triton.knobs.nvidia, name)
            if tuple(map(int, tool.version.split("."))) >= LEAST_PTXAS:
                return tool
    return None


@contextlib.contextmanager
def of(config: Config) -> Iterator[None]:
    """Within the block Triton compiles kernels of a configuration with a ptxas that can be trusted.

    Raises BackendError where there is none. Other kernels keep what Triton takes.
    """
    if config.plane != FROM_REGISTERS:
        yield
        return
    import triton

    tool = _tool()
    if tool is None:
        raise BackendError("Triton's ptxas overwrites registers of a running product", CURE)
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.ptxas = tool.path
        yield


def check(compiled: Any, config: Config) -> None:
    """Raises BackendError if the machine code of a compiled kernel is by a ptxas that cannot be trusted."""
    if config.plane != FROM_REGISTERS or compiled is None or compiled in _sound:  # None: the interpreter
        return
    if maker(compiled.asm["cubin"]) < LEAST_PTXAS:
        raise BackendError("Triton's cache holds a kernel that an old ptxas made", f"empty ~/.triton/cache; {CURE}")
    _sound.add(compiled)


def maker(cubin: bytes) -> tuple[int, int]:
    """The release of CUDA whose ptxas made this machine code; (0, 0) if it does not say."""
    found = re.search(rb"Cuda compilation tools, release (\d+)\.(\d+)", cubin)
    return (int(found[1]), int(found[2])) if found else (0, 0)
