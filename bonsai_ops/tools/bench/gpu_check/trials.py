"""The trial kernels and tiles (candidates.py) against the reference."""

from __future__ import annotations

import torch

from ....kernels.triton import backend
from ....kernels.triton.configs import Config
from ...synthetic import random_weight
from .check import Check, relative

SHAPES = ((130, 1030, 256), (513, 3072, 9216), (1536, 9216, 3072))
TINY = ((5, 83, 384),)
"""(tokens, rows, columns)."""
LIMIT = 4e-3


def run(check: Check, _: str) -> None:
    """Notes the wrong share of unpacked weights and, on a GPU, the error of the plane kernels."""
    if not check.on_gpu and not backend.interpreting():
        check.note("not measured", "on a CPU the kernels need TRITON_INTERPRET=1")
        return
    from . import candidates

    shapes = SHAPES if check.on_gpu else TINY
    tiles = candidates.plane_tiles(check.device) if check.on_gpu else {}
    for codec in candidates.FIELDS:
        for dtype in (torch.bfloat16, torch.float16):
            kind = f"{codec} {str(dtype)[6:]}"
            with check.guarded(f"unpack {kind}"):
                wrong = max(_wrong_share(check, codec, dtype, *shape[1:]) for shape in shapes)
                check.note(f"unpack {kind} wrong share", wrong, show=wrong > 0)
            for name, tile in tiles.items():
                with check.guarded(f"{name} {kind}"):
                    error = max(_plane_error(check, codec, dtype, tile, *shape) for shape in shapes)
                    check.note(f"{name} {kind} error", error, show=not error < LIMIT)
    check.note("done", True)


def _wrong_share(check: Check, codec: str, dtype: torch.dtype, rows: int, columns: int) -> float:
    """Of the weights and of their signs, as one launch unpacks them."""
    from . import candidates

    weight = random_weight(codec, rows, columns, check.device)
    truth = weight.dequantize(dtype)
    found = candidates.unpack(weight, torch.full_like(truth, float("nan")))
    signs = candidates.unpack(weight, torch.empty(rows, columns, dtype=torch.int8, device=check.device), True)
    wrong = (found != truth), (signs.sign() != truth.sign().to(torch.int8))
    return max(float(w.float().mean()) for w in wrong)


def _plane_error(
    check: Check, codec: str, dtype: torch.dtype, tile: Config, tokens: int, rows: int, columns: int
) -> float:
    from . import candidates

    weight = random_weight(codec, rows, columns, check.device)
    x = torch.randn(tokens, columns, device=check.device).to(dtype)
    y = candidates.plane_linear(x, weight, tile)
    return relative(y, x.double() @ weight.dequantize(dtype).double().t())
