"""What the tests install, by hash: tests/locks/ holds for Linux on x86-64 with glibc, as the packages were looked up.

Elsewhere the same versions are installed without hashes. `python -m tests.renew_pins --locks` writes the files.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

from .places import PLUGIN

FOLDER = PLUGIN / "tests" / "locks"
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Python versions whose files are in the locks."""


def locked(name: str, requirements: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """(requirement lines, pip's options) of one lock, or (`requirements`, no options) where it does not hold.

    A lock names everything that its requirements ask for and that ComfyUI's do not, so nothing else is looked for.
    """
    place = (sys.platform, platform.machine(), platform.libc_ver()[0])
    if place != ("linux", "x86_64", "glibc") or sys.version_info[:2] not in PYTHONS:
        return requirements, ()
    try:
        lines = (FOLDER / f"{name}.txt").read_text("ascii").splitlines()
    except FileNotFoundError:  # the published archive has no tests
        return requirements, ()
    return [line for line in lines if line and not line.startswith("#")], ("--no-deps",)
