"""The backend "unpack_nvrtc": as "unpack", but the kernel that writes W's values is CUDA C++ (kernel.cu).

NVRTC compiles it in a moment for the GPU at hand. It comes with PyTorch, so neither Triton nor a compiler or CUDA
toolkit has to be installed, and it knows older GPUs than Triton. Importing this never fails and costs nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ...weights.codec import get_codec
from ...weights.packed_weight import PackedWeight
from ..call import EXACT, Call, Limits
from ..failure import BackendError
from . import nvrtc, product

NAME = "unpack_nvrtc"
MODES = (EXACT,)
LIMITS = Limits(("cuda",), product.DTYPES, product.CODECS)

SOURCE = Path(__file__).with_name("kernel.cu")
ROWS = 8
"""Byte rows of a block, one a warp."""
MOST_BLOCKS = 65535
"""In the second dimension of a grid."""

TYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
REPORT = "update this plugin and report the GPU's name and the version of PyTorch"
REINSTALL = "install PyTorch for CUDA from pytorch.org again"
DRIVER = "update the NVIDIA driver"
CURES = (
    ("no code for compute capability", "install a PyTorch built for this GPU"),
    ("no such file", "install this plugin again"),
    ("builtin", REINSTALL),
    ("toolchain", DRIVER),
    ("ptx jit", DRIVER),
    ("driver version", DRIVER),
)
"""Words in an error -> what a user can do. The first that fits is shown."""

_verified: set[tuple] = set()


def forget_verified() -> None:
    """Every kernel is compared with the reference again before its next product."""
    _verified.clear()


def declines(call: Call) -> str | None:
    """Why this kernel does not unpack a weight, None if it does. What no installation cures comes first."""
    if (unmet := LIMITS.unmet(call)) is not None:
        return unmet
    if torch.version.hip is not None:
        return "NVRTC compiles for NVIDIA GPUs alone"
    if call.rows > 2**30 or call.columns > 2**30:
        return f"a weight of {call.rows} rows and {call.columns} columns is too large for 32-bit indices"
    if call.capability is None:
        return "the GPU's compute capability is unknown"
    return unavailable(call.capability)


@functools.cache
def unavailable(capability: tuple[int, int]) -> str | None:
    """Why no kernel can be compiled and started in this process, with the cure; None if it can."""
    try:
        nvrtc.target(capability)
    except OSError as error:
        return str(BackendError(f"NVRTC cannot be loaded ({_line(error)})", REINSTALL))
    except (RuntimeError, AttributeError) as error:  # an older NVRTC lacks functions
        return str(explained(error))
    try:
        nvrtc.driver()
    except OSError as error:
        return str(BackendError(f"the CUDA driver cannot be loaded ({_line(error)})", "install the NVIDIA driver"))
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def explained(error: Exception) -> BackendError:
    """What NVRTC or the driver raised, in one line with the cure."""
    text = str(error).lower()
    cure = next((cure for words, cure in CURES if words in text), REPORT)
    return BackendError(f"NVRTC could not compile or start a kernel ({type(error).__name__}: {_line(error)})", cure)


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for a call that was not declined, as product.multiply computes and raises."""
    return product.multiply(x, weight, bias, write, _verified, explained)


def multiply_transposed(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x = y W for a call that was not declined, as product.multiply_transposed computes and raises."""
    return product.multiply_transposed(grad, weight, write, _verified, explained)


def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
    """out [last - first, K], contiguous = rows first .. last-1 of W in out's dtype, in one launch."""
    codes, scale, zero = product.operands(weight)
    device, columns, n = codes.device, codes.shape[1], codes.shape[0]
    start, end = product.byte_rows(n, first, last)
    run = 16 // out.dtype.itemsize
    grid = (-(-columns // (32 * run)), min(-(-(end - start) // ROWS), MOST_BLOCKS))
    with product.current(device):
        kernel = _kernel(device, weight.scheme, weight.codec, weight.group_size, out.dtype, scale.dtype, zero.dtype)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        kernel.launch(grid, (32, ROWS), stream, (codes, scale, zero, out, columns, n, first, last, start, end))


@functools.cache
def _kernel(device: torch.device, *kind: str | int | torch.dtype) -> nvrtc.Kernel:
    """The kernel for a kind of weight, compiled for a device, which is current."""
    capability = torch.cuda.get_device_capability(device)
    return nvrtc.Kernel.load(compiled(capability, *kind), "unpack")


def compiled(capability: tuple[int, int], *kind: str | int | torch.dtype) -> bytes:
    """Machine code or PTX of the kernel for a kind of weight, as `options` takes it. Needs no GPU."""
    return nvrtc.compile_source(SOURCE.read_text(encoding="ascii"), capability, options(*kind))


def options(
    scheme: str, codec: str, group_size: int, dtype: torch.dtype, scale: torch.dtype, zero: torch.dtype
) -> list[str]:
    """What the compiler is told of a kind of weight. dtype: of the values; scale, zero: of the tables."""
    coder = get_codec(codec)
    given = {
        "SCHEME": scheme.upper(),
        "RADIX": coder.radix,
        "PLANES": coder.fields,
        "GROUP": group_size,
        "OUT": TYPES[dtype],
        "SCALE": TYPES[scale],
        "ZERO": TYPES[zero],
    }
    return [f"-D{name}={value}" for name, value in given.items()]
