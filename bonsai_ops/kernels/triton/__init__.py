"""The fused kernels of GPUs: what they take. Importing this costs nothing; Triton is imported for a call that fits.

backend.py   imports Triton and launches        half.py      kernels with 16-bit activations
configs.py   the sizes they run with            int8.py      kernels of mode a8
probe.py     compares them before their use     fp8.py       kernels of mode a8_fp8
                                                plane.py     the kernel of by_plane.py, a backend of its own
"""

from __future__ import annotations

import os

import torch

from ...weights.packed_weight import PackedWeight
from ..call import EXACT, Call, Limits
from . import configs

NAME = "triton"
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
"""ROCm calls itself cuda. Triton's interpreter, chosen before Triton is imported, runs on the CPU."""
FLOATS = (torch.float16, torch.bfloat16)
CODECS = {"binary": ("bit",), "ternary": ("trit5", "crumb")}
PLANES = {"binary": ("bit",), "ternary": ("crumb",)}
LIMITS = {
    EXACT: Limits(DEVICES, FLOATS, CODECS, configs.GROUP),
    "fp16_accumulate": Limits(DEVICES, (torch.float16,), CODECS, configs.GROUP),
    "a8": Limits(DEVICES, FLOATS, PLANES, configs.GROUP),
    "a8_fp8": Limits(DEVICES, FLOATS, PLANES, configs.GROUP),
}
MODES = tuple(LIMITS)
"""exact: fp32 sums. fp16_accumulate: fp16 sums of 64 or 128 products, then fp32; relative error about 5e-4.
a8: x as int8 with a scale for each token and group of 128 columns, exact int32 sums of a group, then fp32; relative
error 6.5e-3 for normal x, up to 2.4e-2 with outliers. a8_fp8: the same with e4m3, whose sums are in fp32; 2.6e-2 for
normal x, 1.4e-2 with outliers, as four bits of each value are kept."""
LEAST_CAPABILITY = (8, 0)


def declines(call: Call) -> str | None:
    """Why these kernels do not multiply a call, None if they do. What no installation cures comes first."""
    if (unmet := LIMITS[call.mode].unmet(call)) is not None:
        return unmet
    if call.rows * (call.columns // configs.GROUP) >= 2**31 or call.rows >= 2**27:
        return f"a weight of {call.rows} rows is too large for Triton's 32-bit scale index"
    if call.device.type == "cuda" and (lacking := _gpu_lacks(call)) is not None:
        return lacking
    from . import backend  # takes seconds

    return backend.unavailable()


def _gpu_lacks(call: Call) -> str | None:
    target: int | str = "AMD"
    if torch.version.hip is None:
        if call.capability is None or call.capability < LEAST_CAPABILITY:
            shown = "unknown" if call.capability is None else f"{call.capability[0]}.{call.capability[1]}"
            return f"Triton has no tensor-core code for compute capability {shown}, only for 8.0 and newer"
        target = 10 * call.capability[0] + call.capability[1]
    if call.mode == "a8_fp8" and call.mode not in configs.modes(target):
        return "this GPU has no e4m3 tensor cores; NVIDIA's of compute capability 8.9 and newer do"
    if call.mode not in configs.modes(target):
        return f"mode {call.mode} is not faster than exact on this GPU"
    return None


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for a call that was not declined, as backend.multiply computes it."""
    from . import backend

    return backend.multiply(x, weight, bias, mode)
