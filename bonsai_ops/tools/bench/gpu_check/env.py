"""The machine: facts, bandwidths, what its products reach, and what the host spends on a layer."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from .... import kernels
from ....kernels import dispatch
from ....kernels.triton import backend
from ...synthetic import random_weight
from .. import machine
from .check import Check

PACKAGES = ("triton", "transformers", "numpy", "comfy-kitchen", "comfy-aimdo")
CPU_FLAGS = ("amx_tile", "avx512_bf16", "avx512_vnni")
SMI = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,pcie.link.gen.current,"
    "pcie.link.width.current"
)
SIDE = 8192
FLOP = 2 * SIDE**3


def run(check: Check, _: str) -> None:
    """Notes all of it."""
    _software(check)
    if not check.on_gpu:
        check.note("not measured", "bandwidths, products and host microseconds need a GPU")
        return
    _gpu(check)
    with check.guarded("copies"):
        _copies(check)
    _products(check)
    with torch.inference_mode():
        _host(check)


def _software(check: Check) -> None:
    check.note("python", platform.python_version())
    check.note("torch", torch.__version__)
    check.note("cpus", os.cpu_count())
    with check.guarded("cpuinfo"):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
        check.note("cpu", names[0])
        check.note("cpu_flags", [flag for flag in CPU_FLAGS if flag in text], show=False)
    for name in PACKAGES:
        with check.guarded(name):
            check.note(name, version(name), show=False)


def _gpu(check: Check) -> None:
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    check.note("gpu", [found.name, capability, found.multi_processor_count, found.total_memory, found.L2_cache_size])
    with check.guarded("smi"):
        command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
        check.note("smi", subprocess.run(command, capture_output=True, text=True).stdout.strip())
    check.note("bench_machine", machine.describe(None, "cuda"), show=False)
    check.note("clock", machine.gpu_clock())


def _copies(check: Check) -> None:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    check.note("d2d_gb_s", 2 * a.nbytes / check.seconds(lambda: b.copy_(a)) / 1e9)
    host = torch.empty(256 << 20, dtype=torch.uint8).random_()
    part = a[: host.numel()]
    check.note("h2d_pageable_gb_s", host.nbytes / check.seconds(lambda: part.copy_(host)) / 1e9)
    pinned = host.pin_memory()
    check.note("h2d_pinned_gb_s", host.nbytes / check.seconds(lambda: part.copy_(pinned, non_blocking=True)) / 1e9)
    small = torch.empty(1 << 20, dtype=torch.uint8)
    check.note("h2d_1mb_pageable_us", 1e6 * check.seconds(lambda: small.cuda(), 9))


def _products(check: Check) -> None:
    x, w = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    check.note("bf16_tflops", FLOP / check.seconds(lambda: torch.mm(x, w.t()), 9) / 1e12)
    with check.guarded("int8"):
        xi, wi = (torch.randint(-127, 127, (SIDE, SIDE), device="cuda", dtype=torch.int8) for _ in range(2))
        check.note("int8_tops", FLOP / check.seconds(lambda: torch._int_mm(xi, wi.t()), 9) / 1e12)
    xf, wf = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    rows, columns = torch.ones(SIDE, 1, device="cuda"), torch.ones(1, SIDE, device="cuda")
    for name, scales in {"tensor": (one, one), "row": (rows, columns)}.items():
        with check.guarded(f"fp8 {name}"):
            seconds = check.seconds(
                lambda scales=scales: torch._scaled_mm(xf, wf.t(), *scales, out_dtype=torch.bfloat16), 9
            )
            check.note(f"fp8_{name}_tflops", FLOP / seconds / 1e12)
    with check.guarded("fp8 groups of 128"):
        # both operands with an fp32 scale a row and 128 columns: ternary weights exactly, no pass over the result
        kind = F.ScalingType.BlockWise1x128
        a, b = (torch.ones(SIDE // 128, SIDE, device="cuda").t() for _ in range(2))
        seconds = check.seconds(lambda: F.scaled_mm(xf, wf.t(), a, kind, b.t(), kind, output_dtype=torch.bfloat16), 9)
        check.note("fp8_group_tflops", FLOP / seconds / 1e12)


def _host(check: Check) -> None:
    """Microseconds that each floor of the plugin takes for a product of one token, beside torch's own."""
    weight = random_weight("trit5", 256, 256, "cuda")
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    dense, out = weight.dequantize(torch.bfloat16), torch.empty(1, 256, device="cuda", dtype=torch.bfloat16)
    chosen = backend.config(backend._target(x.device), "trit5")
    call = kernels.call_of(x.device, x.dtype, weight)
    calls = {
        "dense_linear": lambda: F.linear(x, dense),
        "linear": lambda: kernels.linear(x, weight),
        "dispatch": lambda: dispatch.multiply(x, weight),
        "triton_multiply": lambda: backend.multiply(x, weight),
        "launch": lambda: backend.launch(x, weight, None, out, chosen, "exact"),
        "resolve": lambda: kernels.resolve(call),
        "call_of": lambda: kernels.call_of(x.device, x.dtype, weight),
    }
    for name, function in calls.items():
        check.note(f"host_us_{name}", check.host_microseconds(function))
    choice = kernels.resolve(call)
    check.note("backend", [choice.backend.NAME, choice.declined])
