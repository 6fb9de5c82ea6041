"""The Triton backend: y = x W^T straight from the packed bytes, on CUDA (sm_80 and newer) and ROCm.

Importing this module never fails: without a usable Triton, `unavailable` says why. What breaks at a launch (no C
compiler, no ptxas, no Python.h, wrong values) is raised with its cure; dispatch.py then goes on without the backend.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch

from ...weights.codec import get_codec
from ...weights.device_errors import is_the_devices
from ...weights.packed_weight import PackedWeight
from .. import eager, machine
from ..call import EXACT, refuse_residual
from ..failure import BackendError
from ..rows import readable
from . import assembler, configs, probe
from .configs import GROUP, Config

try:
    import triton

    from . import fp8, half, int8, plane
except Exception as error:  # a half-installed Triton raises nearly anything: ImportError, OSError, RuntimeError
    triton = fp8 = half = int8 = plane = None
    _IMPORT_ERROR: Exception | None = error
else:
    _IMPORT_ERROR = None

LARGEST_PRODUCT_SUM = 2.0**15
"""What a fp16 sum may reach in fp16_accumulate mode; half of fp16's range."""

INSTALL = "pip install triton" if os.name != "nt" else "pip install triton-windows"
CURES = (
    ("python.h", "install Python's headers (Debian, Ubuntu: apt install python3-dev)"),
    ("c compiler", "install a C compiler (Debian, Ubuntu: apt install build-essential) or set CC to one"),
    ("gcc", "install a C compiler (Debian, Ubuntu: apt install build-essential) or set CC to one"),
    ("ptxas", f"reinstall Triton ({INSTALL} --force-reinstall --no-deps) or point TRITON_PTXAS_PATH to a newer ptxas"),
    ("no such file", f"reinstall Triton: {INSTALL} --force-reinstall --no-deps"),
    ("permission", "make ~/.triton writable or set TRITON_CACHE_DIR to a folder that is"),
    ("out of resource", "update this plugin and report the GPU's name"),
)
"""Words in an error of Triton -> what a user can do. The first that fits is shown."""

_constants = functools.cache(configs.constants)
"""Shared by all launches of a kernel: nobody writes into them."""

_verified: set[tuple] = set()
"""Kernels that gave the reference's answer in this process."""


def forget_verified() -> None:
    """Every kernel is compared with the reference again before its next product."""
    _verified.clear()


def explained(error: Exception) -> BackendError:
    """What Triton raised, in one line with the cure."""
    chain = []
    link: BaseException | None = error
    while link is not None and len(chain) < 4:
        output = getattr(link, "stderr", None) or ""
        chain.append(f"{type(link).__name__}: {link} {output if isinstance(output, str) else output.decode()}")
        link = link.__cause__ or link.__context__
    text = " ".join(chain).lower()
    cure = next((c for words, c in CURES if words in text), f"reinstall Triton: {INSTALL}")
    return BackendError(f"Triton could not compile or start a kernel ({' '.join(chain[0].split())[:300]})", cure)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported), on the CPU."""
    return half is not None and not hasattr(half.weight_first_kernel, "device_caches")


def unavailable() -> str | None:
    """Why no kernel can run in this process, with the cure; None if they can."""
    error = _unusable()
    return None if error is None else str(error)


def _unusable() -> BackendError | None:
    fault = _fault()
    return None if fault is None else BackendError(*fault)


@functools.cache
def _fault() -> tuple[str, str] | None:
    """What keeps Triton from being used in this process, and the cure; None if nothing does."""
    if isinstance(_IMPORT_ERROR, ModuleNotFoundError) and _IMPORT_ERROR.name == "triton":
        return "Triton is not installed", INSTALL
    if _IMPORT_ERROR is not None:
        return f"Triton cannot be imported ({_IMPORT_ERROR})", f"reinstall it: {INSTALL}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 3):
        return f"Triton {triton.__version__} is too old", "update PyTorch to 2.7 or newer (Triton 3.3)"
    return None


def config(target: int | str, codec: str, mode: str = "exact") -> Config:
    """The kernel configuration for a target: compute capability as 86, or an AMD architecture such as "gfx1100".

    Raises ValueError where no kernel has the mode.
    """
    chosen = configs.CONFIGS.get((configs.family(target), codec, mode))
    if chosen is None:
        raise ValueError(f"no Triton kernel multiplies {codec} codes in mode {mode!r} on {target}")
    return chosen


@functools.cache
def _target(device: torch.device) -> int | str:
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias by the kernel of CONFIGS, as `run` computes and raises."""
    return run(x, weight, bias, mode, lambda flat: config(_target(flat.device), weight.codec, mode))


def run(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    mode: str,
    choose: Callable[[torch.Tensor], Config],
) -> torch.Tensor:
    """y = x W^T + bias: x [.., K] fp16 or bf16 -> [.., N] in x's dtype, for a call that was not declined.

    choose(x [M, K]) is the configuration. Raises BackendError, which names the cure, when Triton is unavailable and
    when a kernel cannot be built or started or computes wrong values; ValueError for a weight with a residual. Errors
    of the device (memory, a lost context) are raised as they are.

    A kernel that was not compared yet, which takes a wait, leaves what a CUDA graph records to the reference.
    """
    refuse_residual(weight)
    if (unusable := _unusable()) is not None:
        raise unusable
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        chosen = choose(flat)
        try:
            kind = (*probe.kind_of(flat, weight, bias, mode), chosen)
            if kind not in _verified and machine.capturing():
                return eager.multiply(x, weight, bias)
            if kind not in _verified:
                size = probe.SMALL if interpreting() else probe.SIZE
                with contextlib.nullcontext() if interpreting() else assembler.of(chosen):
                    probe.verify(launch, flat, weight, bias, chosen, mode, size)
                _verified.add(kind)
            launch(flat, weight, bias, out, chosen, mode)
        except Exception as error:  # what a broken Triton raises at first launch has no common class
            if isinstance(error, BackendError) or is_the_devices(error):
                raise
            raise explained(error) from error
    return out.view(*x.shape[:-1], rows)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def plane_config(x: torch.Tensor, weight: PackedWeight) -> Config:
    """The configuration of plane_kernel for x [M, K]."""
    target = _target(x.device) if x.device.type == "cuda" else 90
    return configs.plane_tile(target, weight.codec, x.shape[0], weight.shape[0], _processors(x.device))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with the 16-byte alignment that the kernels are compiled for."""
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)  # without it a transposed one stays transposed
    return x


def _bounded(x: torch.Tensor, summed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] times a power of two per token, so that a fp16 sum of `summed` products with +-2 stays in range.

    Returns (x, fp32 [M] that undoes it). Tokens that fit already, and those with NaN or infinity, stay as they are.
    """
    limit = LARGEST_PRODUCT_SUM / (2 * summed)
    _, exponent = torch.frexp(x.abs().amax(dim=1).float() / limit)
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent.clamp(0, 30))
    return x * factor.to(x.dtype).unsqueeze(1), 1 / factor


def launch(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor, chosen: Config, mode: str
) -> None:
    """Runs the kernels `chosen` names: out [M, N] = x [M, K] W^T + bias."""
    rows, columns = weight.shape
    interpret = interpreting()
    codes = readable(weight.codes)
    n = get_codec(weight.codec).byte_rows(rows)
    constants = _constants(chosen, weight.codec, mode, bias is not None, interpret)
    options = {} if interpret else {"num_warps": chosen.warps, "num_stages": chosen.stages}
    tiles = -(-x.shape[0] // chosen.block_m) * -(-n // chosen.block_n)
    grid = (tiles, get_codec(weight.codec).fields) if chosen.plane else (tiles * chosen.parts,)
    scale = weight.scale.contiguous()
    shift = out if bias is None else bias.contiguous()
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        if mode in configs.ROUNDED:
            q, tokens = quantize(x, chosen, mode)
            kernel = int8.a8_kernel if mode == "a8" else fp8.fp8_kernel
            kernel[grid](
                *(q, codes, scale, tokens, shift, out, x.shape[0], rows, columns, n // 8, out.stride(0)),
                **constants,
                **options,
            )
            return
        tokens = out
        if mode == "fp16_accumulate":
            x, tokens = _bounded(x, chosen.block_k)
        x = _aligned(x)
        sizes = (x.shape[0], rows, columns, n // 8, x.stride(0), out.stride(0))
        if chosen.plane:
            compiled = plane.plane_kernel[grid](x, codes, scale, out, *sizes, **constants, **options)
            assembler.check(compiled, chosen)
        else:
            if chosen.weight_first and constants["ASM"]:
                codes = codes.view(torch.int16)
            kernel = half.weight_first_kernel if chosen.weight_first else half.input_first_kernel
            kernel[grid](x, codes, scale, tokens, out, *sizes, **constants, **options)
    if bias is not None:  # in these kernels it would cost registers that they lack
        out += bias.to(out.dtype)


def quantize(x: torch.Tensor, chosen: Config, mode: str = "a8") -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (int8 or e4m3, fp32), as the quantizing kernel of a mode of ROUNDED lays them out for `chosen`.

    Triton's interpreter has values of e4m3 as fp32.
    """
    columns = x.shape[1]
    x = _aligned(x)
    tiles, groups = -(-x.shape[0] // chosen.block_m), columns // GROUP
    dtype = torch.int8 if mode == "a8" else torch.float32 if interpreting() else torch.float8_e4m3fn
    q = torch.empty(tiles * chosen.block_m * columns, dtype=dtype, device=x.device)
    tokens = torch.empty(tiles * chosen.block_m * groups, dtype=torch.float32, device=x.device)
    constants = {"BLOCK_M": chosen.block_m, "ROWS": configs.QUANTIZED_ROWS}
    grid = (tiles * chosen.block_m // configs.QUANTIZED_ROWS * groups,)
    if mode == "a8":
        int8.quantize_kernel[grid](x, q, tokens, x.shape[0], columns, x.stride(0), **constants)
    else:
        constants["INTERPRET"] = interpreting()
        fp8.fp8_quantize_kernel[grid](x, q, tokens, x.shape[0], columns, x.stride(0), **constants)
    return q, tokens
