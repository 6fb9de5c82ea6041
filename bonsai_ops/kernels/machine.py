"""What this processor multiplies fast, how much of its time this process has, and what the GPU is doing."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path, PurePosixPath

import torch

MOST_BYTES = 1 << 14
"""Bound on what is read of a file of the system."""


def cpu_has_fast_bf16(root: Path = Path("/")) -> bool:
    """True if this CPU multiplies bf16 matrices in hardware: AVX-512 BF16 or AMX, or ARM's bf16 with oneDNN in torch.

    ARM is told below `root`, as Linux has it; what torch does with bf16 on Apple's processors elsewhere is not known.
    """
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, lambda: False)() for name in names):
        return True
    return "bf16" in arm_features(root) and torch.backends.mkldnn.is_available()


@functools.cache
def arm_features(root: Path) -> frozenset[str]:
    """What Linux's proc/cpuinfo below `root` lists as features of an ARM processor; empty on any other."""
    for line in read_start(root / "proc/cpuinfo").splitlines():
        name, _, features = line.partition(":")
        if name.strip() == "Features":
            return frozenset(features.split())
    return frozenset()


def read_start(path: Path) -> str:
    """The first MOST_BYTES of a file of the system; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES).decode("ascii", "replace")
    except OSError:
        return ""


def cpu_has_fast_int8() -> bool:
    """True if this CPU multiplies int8 matrices in hardware (AVX-512 VNNI or AMX)."""
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def allowed_time(root: Path) -> float | None:
    """Processor seconds a second that Linux's control groups allow this process; None without a limit.

    A container is such a group, of version 1 or 2. A group has no more than those around it.
    """
    allowed = []
    for line in read_start(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        folders = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(folders) + 1):
            folder = top.joinpath(*folders[:depth])
            with contextlib.suppress(ValueError):  # "max", or no such file
                quota, period = map(int, " ".join(read_start(folder / file) for file in files).split())
                if quota > 0 and period > 0:
                    allowed.append(quota / period)
    return min(allowed, default=None)


def capturing() -> bool:
    """True while a CUDA graph is recorded: the stream must not be waited for, and what is written then holds later.

    The graph runs what was recorded, not the code around it, and with memory of its own. Never starts CUDA.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
