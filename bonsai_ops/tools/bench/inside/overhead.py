"""Tiny layers in turns, a process of its own (session.py): overhead {"device", "calls", "turns"}."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from .... import kernels
from ....kernels import dispatch
from ....weights.packed_weight import PackedWeight
from ..layers import random_weight
from .start import start, synchronise

SIDE = 256
"""Rows and columns of the layers."""
DTYPE = torch.bfloat16


def main(argv: list[str]) -> int:
    """Prints {key of overhead.ROWS: microseconds of one call}."""
    options = start(argv)
    device = options["device"]
    ways = _ways(device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(options["turns"] + 1):  # the first warms up
            for name, call in ways.items():
                synchronise(device)
                seconds[name].append(_seconds(call, options["calls"]))
    print(json.dumps({name: 1e6 * statistics.median(found[1:]) for name, found in seconds.items()}))
    return 0


def _seconds(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _empty(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


def _ways(device: str) -> dict[str, Callable[[], Any]]:
    import comfy.ops

    from ....host.layout import wrap
    from ....host.linear import make_bonsai_ops

    idle = SimpleNamespace(NAME="idle", MODES=kernels.MODES, declines=lambda call: None, multiply=_empty)
    dispatch.BACKENDS = (idle, *dispatch.BACKENDS)
    weight = random_weight("ternary", SIDE, SIDE).to(device)
    packed = make_bonsai_ops().Linear(SIDE, SIDE, bias=False, dtype=DTYPE)
    packed.load_state_dict({"weight": wrap(weight, DTYPE)})
    stock = comfy.ops.manual_cast.Linear(SIDE, SIDE, bias=False, dtype=DTYPE, device=device)
    plain = torch.nn.Linear(SIDE, SIDE, bias=False, dtype=DTYPE, device=device)
    dense = weight.dequantize(DTYPE)
    stock.load_state_dict({"weight": dense})
    x = torch.ones(1, SIDE, dtype=DTYPE, device=device)
    form = (weight.shape[0], weight.scheme, weight.codec, weight.group_size, kernels.EXACT)
    return {
        "torch_linear": lambda: plain(x),
        "comfyui_linear": lambda: stock(x),
        "layer": lambda: packed(x),
        "linear": lambda: kernels.linear(x, weight),
        "dispatch": lambda: dispatch.multiply(x, weight),
        "operator": lambda: torch.ops.bonsai.linear(
            x, weight.codes, weight.scale, weight.zero, None, None, None, *form
        ),
        "dense_product": lambda: torch.nn.functional.linear(x, dense),
        "result": lambda: _empty(x, weight, None, kernels.EXACT),
    }
