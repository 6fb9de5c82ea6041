"""The backend "plane": the fused kernel of GPUs that multiply while their warps go on, H100 and B200 for instance.

What it does stands in plane.py. Where it declines or fails, the kernels of the backend "triton" follow.
Importing this never fails and costs nothing; Triton is imported for a call that fits.
"""

from __future__ import annotations

import torch

from ...weights.packed_weight import PackedWeight
from .. import triton
from ..call import EXACT, Call

NAME = "plane"
MODES = (EXACT,)
FAMILIES = (9, 10)
"""Major compute capabilities, those of configs.PLANE_TILES."""


def declines(call: Call) -> str | None:
    """Why this kernel does not multiply a call, None if it does. What no installation cures comes first."""
    if call.device.type == "cuda" and (call.capability is None or call.capability[0] not in FAMILIES):
        return "it is for compute capability 9.0 and 10.x"
    if (reason := triton.declines(call)) is not None or call.device.type != "cuda" or call.capability[0] != 9:
        return reason
    from . import assembler

    return assembler.unavailable()


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, mode: str = EXACT
) -> torch.Tensor:
    """y = x W^T + bias for a call that was not declined, as backend.run computes and raises."""
    from . import backend

    return backend.run(x, weight, bias, mode, lambda flat: backend.plane_config(flat, weight))
