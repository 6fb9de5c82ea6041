"""The CUDA kernel that unpacks, compiled for the processor, in place of a GPU: by the compiler's options that it gets.

The text is the very one that NVRTC compiles; cuda_on_host.cpp has what CUDA brings to it, and a driver that runs every
thread of a grid in turn.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from bonsai_ops.kernels.unpack import by_nvrtc

SHIM = Path(__file__).with_name("cuda_on_host.cpp")
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
NAMES = ("SCHEME", "RADIX", "PLANES", "GROUP", "OUT", "SCALE", "ZERO")
ARGUMENTS = (
    "*(const unsigned char **)a[0], *(const Entry<SCALE>::stored **)a[1], *(const Entry<ZERO>::stored **)a[2], "
    "*(uint4 **)a[3], *(int *)a[4], *(int *)a[5], *(int *)a[6], *(int *)a[7], *(int *)a[8], *(int *)a[9]"
)


class Host:
    """A driver with the kernels of some kinds, and what it was asked for: `count("launches")`, `set("spoiled", 1)`."""

    def __init__(self, driver: ctypes.CDLL, kinds: Sequence[tuple[str, ...]]) -> None:
        self.driver = driver
        self.kinds = list(kinds)

    def compile_source(self, source: str, capability: tuple[int, int], options: Sequence[str]) -> bytes:
        """As nvrtc.compile_source: the number of the kernel."""
        return str(self.kinds.index(tuple(options))).encode() + b"\0"

    def count(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.driver, name).value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.driver, name).value = value


def build(folder: Path, kinds: Sequence[tuple[str, ...]]) -> Host:
    """Compiles the kernel for `kinds`, each the options that NVRTC would get. Skips the test without a compiler."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    text = [SHIM.read_text(encoding="ascii")]
    for number, kind in enumerate(kinds):
        text += [f"#define {option.removeprefix('-D').replace('=', ' ')}" for option in kind]
        text += [f"#define unpack unpack_{number}", f"namespace variant_{number} {{"]
        text += [f'#line 1 "{by_nvrtc.SOURCE.name}"', by_nvrtc.SOURCE.read_text(encoding="ascii")]
        text += [f"void start(void **a) {{ unpack({ARGUMENTS}); }}", "}"]
        text += [f"#undef {name}" for name in (*NAMES, "unpack", "SIGNED", "PAIRS", "RUN")]
    text.append(f"Variant variants[] = {{{', '.join(f'{{variant_{i}::start}}' for i in range(len(kinds)))}}};")
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text("\n".join(text), encoding="ascii")
    flags = ("-std=c++17", "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC")
    done = subprocess.run([COMPILER, *flags, source, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return Host(ctypes.CDLL(str(library)), kinds)
