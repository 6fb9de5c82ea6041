"""The kernels for sm_80 .. sm_89 (mma.sync) as PTX of sm_86, which the driver translates for this GPU. Needs CuPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ....kernels.triton import backend, configs
from ...synthetic import random_weight
from .. import disassembly, static
from .check import Check, relative

TARGET = 86
SHAPES = ((67, 640, 256), (1536, 9216, 3072))
"""(tokens, rows, columns); the last is timed."""
WRONG = 4e-2
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
COUNTS = ("M", "N", "K", "n8", "stride_xm", "stride_ym")
FREE_SHARED = 48 << 10
"""Bytes of shared memory that a kernel gets without asking."""


def run(check: Check, _: str) -> None:
    """Notes error and speed of every kernel that a GeForce card of sm_86 runs."""
    if not check.on_gpu:
        check.note("not measured", "PTX needs an NVIDIA GPU")
        return
    for codec, mode, dtype in static.shipped(TARGET):
        with check.guarded(f"{codec} {mode} {dtype}"):
            kernel = _Kernel.build(check, codec, mode, dtype)
            error, speed = 0.0, 0.0
            for shape in SHAPES:
                found, call = _product(check, kernel, shape)
                error = max(error, found)
                speed = 2 * shape[0] * shape[1] * shape[2] / check.seconds(call) / 1e12
            shown = [f"{error:.1e}", f"{speed:.0f} TFLOP/s"]
            check.note(f"sm_86 {codec} {mode} {dtype}", shown, show=not error < WRONG)
    check.note("done", True)


@dataclass(frozen=True)
class _Kernel:
    """A kernel as CuPy starts it. names: its run-time arguments; parameters: how many the PTX has."""

    codec: str
    mode: str
    dtype: str
    config: configs.Config
    function: Any
    names: list[str]
    parameters: int
    shared: int

    @classmethod
    def build(cls, check: Check, codec: str, mode: str, dtype: str) -> _Kernel:
        """Compiles with Triton, loads the PTX with CuPy."""
        import cupy

        from ....kernels.triton import half, int8

        config = configs.CONFIGS["registers", codec, mode]
        words = config.weight_first and config.asm and mode != "a8"
        types = {
            "codes_ptr": "*i16" if words else "*u8",
            "scale_ptr": "*bf16",
            "tokens_ptr": "*fp32",
            "y_ptr": f"*{dtype}",
        }
        if mode == "a8":
            kernel, types = int8.a8_kernel, types | {"q_ptr": "*i8", "bias_ptr": f"*{dtype}"}
        else:
            kernel, types = half.weight_first_kernel, types | {"x_ptr": f"*{dtype}"}
        aligned = {*types, "N", "K", "stride_xm", "stride_ym"}
        types |= {name: "i32" for name in COUNTS if name in kernel.arg_names}
        constants = configs.constants(config, codec, mode, bias=False)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        made = disassembly.compile_kernel(kernel, types, constants, aligned, TARGET, **options)
        file = check.settings.work / f"{codec}_{mode}_{dtype}.ptx"
        file.write_text(made.asm["ptx"], encoding="ascii")
        function = cupy.RawModule(path=str(file)).get_function(made.metadata.name)
        if made.metadata.shared > FREE_SHARED:
            function.max_dynamic_shared_size_bytes = made.metadata.shared
        parameters = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0].count(".param")
        names = [name for name in kernel.arg_names if name in types]
        return cls(codec, mode, dtype, config, function, names, parameters, made.metadata.shared)


def _product(check: Check, kernel: _Kernel, shape: tuple[int, int, int]) -> tuple[float, Any]:
    """(relative error against float64, a call that multiplies again)."""
    import cupy
    import numpy as np

    tokens, rows, columns = shape
    kind, config = TORCH[kernel.dtype], kernel.config
    weight = random_weight(kernel.codec, rows, columns, check.device)
    x = torch.randn(tokens, columns, device=check.device).to(kind)
    out = torch.full((tokens, rows), float("nan"), dtype=kind, device=check.device)
    given: dict[str, Any] = {"codes_ptr": weight.codes, "scale_ptr": weight.scale, "x_ptr": x}
    given |= dict.fromkeys(("y_ptr", "tokens_ptr", "bias_ptr"), out)
    given |= dict(zip(COUNTS, (tokens, rows, columns, weight.codes.shape[0] // 8, columns, rows), strict=True))
    if kernel.mode == "a8":
        given["q_ptr"], given["tokens_ptr"] = backend.quantize(x, config)
    if kernel.mode == "fp16_accumulate":
        given["x_ptr"], given["tokens_ptr"] = backend._bounded(x, config.block_k)
    values = [given[name] for name in kernel.names]
    arguments = [np.uintp(v.data_ptr()) if isinstance(v, torch.Tensor) else np.int32(v) for v in values]
    arguments += [np.uintp(0)] * (kernel.parameters - len(arguments))
    tiles = -(-tokens // config.block_m) * -(-weight.codes.shape[0] // config.block_n) * config.parts

    def call() -> None:
        given.keys()  # keeps the tensors, which the arguments only point to
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        kernel.function((tiles,), (32 * config.warps,), tuple(arguments), shared_mem=kernel.shared, stream=stream)

    check.synchronise()
    call()
    check.synchronise()
    values = weight.dequantize(kind if kernel.mode != "a8" else torch.float32)
    return relative(out, x.double() @ values.double().t()), call
