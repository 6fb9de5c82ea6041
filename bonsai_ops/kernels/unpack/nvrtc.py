"""NVIDIA's run-time compiler, which PyTorch for CUDA brings along, and the driver: the few calls that a kernel needs.

Both have a C interface that does not change; they are called by ctypes. `torch.cuda._compile_kernel` calls them too,
but first looks for the headers of a CUDA toolkit, and raises where none is installed (torch 2.14); older torches have
nothing of the kind.

Signatures and meanings: NVRTC's and the CUDA driver's reference manuals.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: this thread has used no GPU yet."""


@functools.cache
def compiler() -> ctypes.CDLL:
    """NVRTC of the CUDA that PyTorch was built for. Raises OSError where it is not to be found."""
    if torch.version.cuda is None:
        raise OSError("this PyTorch was not built for CUDA")
    major = int(torch.version.cuda.split(".")[0])
    version = {11: ("112", "11.2")}.get(major, (f"{major}0", str(major)))
    if sys.platform == "win32":
        names = [f"nvrtc64_{version[0]}_0.dll"]
    else:
        # The second is torch's own and finds NVRTC, whose functions it then passes on, where the first does not.
        names = [f"libnvrtc.so.{version[1]}", str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so")]
    return _first(names)


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises OSError where there is none."""
    return _first(["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"])


def _first(names: Sequence[str]) -> ctypes.CDLL:
    for name in names[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(names[-1])


@functools.cache
def target(capability: tuple[int, int]) -> tuple[int, bool]:
    """(what is compiled for a GPU, such as 86; whether that is machine code, which holds for its generation).

    For a GPU that is newer than the compiler it is PTX, which the driver compiles. Raises RuntimeError for one that is
    too old.
    """
    count = ctypes.c_int()
    _compilers(compiler().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _compilers(compiler().nvrtcGetSupportedArchs(known))
    major, minor = capability
    fitting = [one for one in known if one <= 10 * major + minor]
    if not fitting:
        raise RuntimeError(f"NVRTC of CUDA {torch.version.cuda} has no code for compute capability {major}.{minor}")
    return max(fitting), max(fitting) // 10 == major


def compile_source(source: str, capability: tuple[int, int], options: Sequence[str] = ()) -> bytes:
    """CUDA C++ -> machine code or PTX for a GPU. Needs no GPU. Raises RuntimeError with what the compiler says."""
    library, (number, machine) = compiler(), target(capability)
    given = [f"--gpu-architecture={'sm' if machine else 'compute'}_{number}", "--std=c++17", *options]
    program = ctypes.c_void_p()
    _compilers(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        words = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        status = library.nvrtcCompileProgram(program, len(given), words)
        if status:
            log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            raise RuntimeError(log or _status(status))
        return _read(program, "CUBIN" if machine else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compilers(getattr(compiler(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    found = ctypes.create_string_buffer(size.value)
    _compilers(getattr(compiler(), f"nvrtcGet{what}")(program, found))
    return found.raw


def _status(status: int) -> str:
    describe = compiler().nvrtcGetErrorString
    describe.restype = ctypes.c_char_p
    return f"NVRTC: {describe(status).decode()}"


def _compilers(status: int) -> None:
    if status:
        raise RuntimeError(_status(status))


@dataclass(frozen=True)
class Kernel:
    """A kernel in the memory of the GPU that was current when it was loaded, for the life of the process."""

    function: ctypes.c_void_p

    @classmethod
    def load(cls, code: bytes, name: str) -> Kernel:
        """The kernel `name` of compiled code. Raises RuntimeError in the driver's words."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _drivers("cuModuleLoadData", ctypes.byref(module), code)
        _drivers("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return cls(function)

    def launch(
        self, grid: tuple[int, int], block: tuple[int, int], stream: int, arguments: Sequence[torch.Tensor | int]
    ) -> None:
        """Starts it on a stream of its GPU, which is current. Tensors are passed by address, numbers as 32-bit ones."""
        values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        size = (*grid, 1, *block, 1, 0)
        _drivers("cuLaunchKernel", self.function, *size, ctypes.c_void_p(stream), addresses, None)


def _drivers(name: str, *arguments: object) -> None:
    call = getattr(driver(), name)
    status = call(*arguments)
    if status == INVALID_CONTEXT:
        _make_current()
        status = call(*arguments)
    if status:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"CUDA error in {name}: {(words.value or b'unknown').decode()} ({status})")


def _make_current() -> None:
    """Lets this thread use what PyTorch calls the current GPU, as PyTorch's own operators would."""
    context = ctypes.c_void_p()
    driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device())
    driver().cuCtxSetCurrent(context)
