"""One codec and mode of the Triton kernels against float64, their results poisoned with NaN before."""

from __future__ import annotations

import contextlib
import time
import traceback

import torch

from .... import kernels
from ....kernels.triton import assembler, backend, configs
from ....kernels.triton.configs import ROUNDED, Config
from ...synthetic import random_weight
from .check import Check, relative

SMALL = ((1, 1, 128), (3, 7, 256), (5, 83, 384), (67, 648, 128))
REAL = (
    (130, 1030, 256),
    (17, 9216, 3072),
    (513, 3072, 9216),
    (1536, 27648, 3072),
    (4611, 3072, 12288),
    (20000, 1024, 256),
)
"""(tokens, rows, columns)."""
OVER_2_31 = (100003, 27648, 128)
"""More than 2^31 results."""
OVER_2_31_BYTES = 20 << 30
"""Free memory with which that is tried: it takes about 9 GB, and two processes do at once."""
TALL = 5000
"""More tokens than these are compared at both ends alone, and not run as a GeForce card's kernel."""
DTYPES = (torch.float16, torch.bfloat16)


def run(check: Check, part: str) -> None:
    """part: CODEC:MODE."""
    codec, _, mode = part.partition(":")
    if not check.on_gpu and not backend.interpreting():
        check.note("not measured", "on a CPU the kernels need TRITON_INTERPRET=1")
        return
    worst: dict[str, float] = {}
    bad: list[list] = []
    for family, chosen in _chosen(check, codec, mode).items():
        for shape in _shapes(check, codec, mode):
            if family == "geforce" and shape[0] > TALL:
                continue
            for dtype in DTYPES:
                if mode == "fp16_accumulate" and dtype != torch.float16:
                    continue
                kind = f"{family} {str(dtype)[6:]}"
                try:
                    error, faults = _compare(check, kind, codec, mode, chosen, shape, dtype)
                    worst[kind] = max(worst.get(kind, 0), error)
                    if faults or not error < _limit(check, mode, dtype):
                        bad.append([f"{kind} {shape}", error, *faults])
                except torch.OutOfMemoryError:
                    check.note(f"{kind} {shape} not measured", "the GPU's memory is too small")
                    torch.cuda.empty_cache()
                except Exception as error:  # one shape that fails must not hide the others
                    traceback.print_exc()
                    bad.append([f"{kind} {shape}", f"{type(error).__name__}: {str(error)[:200]}"])
                    if "illegal" in str(error) or "misaligned" in str(error):
                        check.note("bad", bad)
                        raise
            check.note("worst_error", worst, show=False)
    check.note("worst_error", {kind: round(error, 6) for kind, error in worst.items()})
    check.note("bad", bad)
    if check.on_gpu:
        with check.guarded("offered"):
            _through_dispatch(check, codec, mode)


def _chosen(check: Check, codec: str, mode: str) -> dict[str, Config]:
    """{name: configuration} of the kernels that this device can run in a mode, plane_kernel in both tiles too."""
    found = {}
    for name, target in _families(check, mode).items():
        with contextlib.suppress(ValueError):  # it has none
            found[name] = backend.config(target, codec, mode)
        if name == "own" and mode == "exact" and check.on_gpu:
            found |= dict(zip(("wide", "narrow"), configs.PLANE_TILES.get(configs.family(target), ()), strict=False))
    return found


def _families(check: Check, mode: str) -> dict[str, int | str]:
    """{name: target} of the kernels that this device can run: its own and, by the driver, those of a GeForce card."""
    if not check.on_gpu:
        return {"own": 86 if mode == "fp16_accumulate" else 90}
    own = {"own": backend._target(torch.device(check.device, 0))}
    if mode == "a8_fp8" and mode not in configs.modes(own["own"]):
        return {}
    return own if mode in ROUNDED else {**own, "geforce": 86}


def _shapes(check: Check, codec: str, mode: str) -> tuple[tuple[int, int, int], ...]:
    if not check.on_gpu:
        return SMALL
    free, _ = torch.cuda.mem_get_info()
    largest = (codec, mode) in (("trit5", "exact"), ("crumb", "a8")) and free > OVER_2_31_BYTES
    return (*SMALL, *REAL, *((OVER_2_31,) if largest else ()))


def _limit(check: Check, mode: str, dtype: torch.dtype) -> float:
    """The largest relative error that is right."""
    exact = {torch.float16: 6e-4, torch.bfloat16: 4e-3 if check.on_gpu else 2**-7}[dtype]
    return {"exact": exact, "fp16_accumulate": 2e-3, "a8": 0.03, "a8_fp8": 0.04}[mode]


def _compare(
    check: Check, kind: str, codec: str, mode: str, chosen: Config, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[float, list[str]]:
    """(relative error, what was not written or written beside the result) of one launch."""
    tokens, rows, columns = shape
    scale_dtype = (torch.bfloat16, torch.float32)[rows % 2]
    weight = random_weight(codec, rows, columns, check.device, scale_dtype)
    x = torch.randn(tokens, columns, device=check.device).to(dtype)
    whole = torch.full((tokens + 2, rows + 32), float("nan"), dtype=dtype, device=check.device)
    out = whole[1:-1, 16:-16]
    begun = time.perf_counter()
    with assembler.of(chosen) if check.on_gpu else contextlib.nullcontext():
        backend.launch(x, weight, None, out, chosen, mode)
    check.synchronise()
    if shape == SMALL[0]:
        check.note(f"{kind} first_launch_s", round(time.perf_counter() - begun, 2))
    ends = torch.cat([torch.arange(0, 300), torch.arange(tokens - 300, tokens)]) if tokens > TALL else slice(None)
    values = weight.dequantize(dtype if mode not in ROUNDED else torch.float32)
    error = relative(out[ends], x[ends].double() @ values.double().t())
    faults = ["results left out"] if bool(out.isnan().any()) else []
    out.fill_(float("nan"))
    if not bool(whole.isnan().all()):
        faults.append("written beside the result")
    return error, faults


def _through_dispatch(check: Check, codec: str, mode: str) -> None:
    """What users get: a ragged stride, a misaligned start, a bias."""
    for dtype in DTYPES:
        name = str(dtype)[6:]
        weight = random_weight(codec, 648, 256, check.device)
        choice = kernels.resolve(kernels.call_of(weight.codes.device, dtype, weight, mode))
        check.note(f"offered {name}", [choice.backend.NAME, choice.mode, choice.declined], show=False)
        x = torch.randn(3, 5, 300, device=check.device).to(dtype)[:, :, 7:263]
        y = kernels.linear(x, weight, torch.ones(648, device=check.device, dtype=dtype), mode=mode)
        check.note(
            f"dispatch {name} error", relative(y, x.double() @ weight.dequantize(torch.float32).double().t() + 1)
        )
    check.note("unavailable", backend.unavailable())
