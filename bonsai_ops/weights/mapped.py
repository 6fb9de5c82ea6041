"""Memory given back to the system: pages of mapped files that nobody needs for a while, and what was freed.

The system's cache has the pages of files, and may drop them. Only Linux tells whether a page is still as the file has
it; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

SMAPS = Path("/proc/self/smaps")
HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ [0-9a-f]+ \S+ ([0-9]+) ")
OWN = re.compile(r"(Anonymous|Swap|Shared_Hugetlb|Private_Hugetlb): +([0-9]+) ")
"""Kilobytes that are no longer the file's, or never were: written to in memory, or huge pages, which are of no file."""
MADV_DONTNEED = 4


def give_back(tensors: Iterable[torch.Tensor]) -> int:
    """Lets go of the resident pages of the files that these tensors are mapped from; returns their bytes at most.

    Reading a tensor brings its pages again, from the system's cache or from the disk. A file that was written to in
    memory is kept as it is, and so is what is not of a file, and everything where the system does not tell.
    """
    wanted = {tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()}
    if not wanted:
        return 0
    places = [(first, last) for first, last in _unchanged() if any(first <= address < last for address in wanted)]
    if not places:
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(last - first for first, last in places if advise(first, last - first, MADV_DONTNEED) == 0)


def give_back_freed() -> None:
    """Lets go of what was freed and the C library keeps for the next request: gigabytes, after work on many tensors.

    Of glibc alone, which is most of Linux; others keep less.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim.argtypes = (ctypes.c_size_t,)
        trim(0)


def _unchanged() -> Iterator[tuple[int, int]]:
    """(first address, last + 1) of every mapping of a file of which no page was changed in memory."""
    try:
        told = SMAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, a process that may not look at itself, no handle left
        return
    found, own = None, {}
    for line in [*told.splitlines(), "0-0 - 0 - 0 "]:
        if (head := HEAD.match(line)) is None:
            own.update(OWN.findall(line))
            continue
        if found is not None and "Anonymous" in own and not any(map(int, own.values())):
            yield found
        found, own = (int(head[1], 16), int(head[2], 16)) if head[3] != "0" else None, {}
