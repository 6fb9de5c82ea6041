"""A disk that is full soon: a tmpfs where this process may mount one, or a limit on the length of files."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KINDS = ("disk", "limit")
OTHERS = "of another program"


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int, kind: str) -> Iterator[Callable[[], None]]:
    """Makes the folder; children started with the result as `preexec_fn` find no room in it beyond `nbytes`.

    kind: "disk", a file system of that size, which skips the test where nobody may mount one; "limit", no file may be
    longer, as a quota does it.
    """
    resource = pytest.importorskip("resource")
    folder.mkdir()
    if kind == "limit":
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        return
    if not _mounted(folder, nbytes):
        pytest.skip("this process may not mount a small disk")
    try:
        yield lambda: None
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _mounted(folder: Path, nbytes: int) -> bool:
    options = ["-t", "tmpfs", "-o", f"size={nbytes}", "bonsai-small-disk", str(folder)]
    try:
        return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except OSError:  # there is no such program
        return False


def fill(folder: Path) -> Path:
    """The file that takes what room is left on the disk of a folder, one of small_disk, as others who use it do."""
    path = folder / OTHERS
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as rest:
        while rest.write(bytes(1 << 12)):
            pass
    return path
