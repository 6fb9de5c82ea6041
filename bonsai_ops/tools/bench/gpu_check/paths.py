"""Everything around the kernels: streams, graphs, compile, other schemes, rows, the reference on the GPU."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from .... import kernels
from ....kernels import eager
from ....weights import codec as codecs
from ....weights.packed_weight import PackedWeight
from ...synthetic import random_weight
from .check import Check, relative

SCHEMES = (
    ("affine", "nibble", 64),
    ("affine", "crumb", 128),
    ("affine", "byte", 64),
    ("zero_point", "nibble", 64),
)
"""(scheme, codec, columns a scale covers)."""


def run(check: Check, _: str) -> None:
    """Notes how far each path is from float64, or that it is the same as on the CPU."""
    weight = random_weight("trit5", 648, 256, check.device)
    x = torch.randn(40, 256, device=check.device, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with check.guarded(f"eager {dtype}"):
            truth = x.to(dtype).double() @ weight.dequantize(dtype).double().t()
            error = relative(eager.multiply(x.to(dtype), weight), truth)
            check.note(f"eager {str(dtype)[6:]} error", error, show=error > 5e-3)
    for scheme, codec, group in SCHEMES:
        with check.guarded(f"{scheme} {codec}"):
            _same_as_on_the_cpu(check, scheme, codec, group)
    if not check.on_gpu:
        check.note("not measured", "streams, graphs and compile need a GPU")
        return
    truth = x.double() @ weight.dequantize(torch.bfloat16).double().t()
    with check.guarded("other stream"):
        _other_stream(check, x, weight, truth)
    for name, forced in {"cuda graph": None, "cuda graph eager": "eager"}.items():
        with check.guarded(name), kernels.use_backend(forced):
            _graph(check, name, x, weight, truth)
    with check.guarded("compile"):
        _compiled(check, x, weight, truth)
    with check.guarded("gradient"):
        z = x.float().requires_grad_()
        kernels.linear(z, weight).sum().backward()
        check.note("gradient error", relative(z.grad, weight.dequantize().double().sum(0).expand(40, -1)), show=False)
    with check.guarded("offset"):
        whole = torch.empty(weight.codes.numel() + 64, dtype=torch.uint8, device=check.device)
        moved = whole[1 : 1 + weight.codes.numel()].view(weight.codes.shape).copy_(weight.codes)
        y = kernels.linear(x, replace(weight, codes=moved))
        check.note("misaligned codes error", relative(y, truth), show=False)
    check.note("done", True)


def _same_as_on_the_cpu(check: Check, scheme: str, codec: str, group: int) -> None:
    codes = torch.randint(0, codecs.get_codec(codec).radix, (200, 512), dtype=torch.uint8)
    scale = (torch.rand(200, 512 // group) + 0.1).bfloat16()
    zero = (torch.rand(200, 512 // group) - 0.5).bfloat16()
    weight = PackedWeight(codecs.encode(codec, codes), scale, (200, 512), scheme, codec, group, zero)
    there = weight.to(check.device)
    same = torch.equal(there.dequantize(torch.bfloat16).cpu(), weight.dequantize(torch.bfloat16))
    index = torch.tensor([0, 7, 199, 100])
    rows = torch.equal(there.select_rows(index.to(check.device)).cpu(), weight.select_rows(index))
    y = kernels.linear(torch.ones(3, 512, device=check.device), there)
    error = relative(y.cpu(), torch.ones(3, 512).double() @ weight.dequantize().double().t())
    check.note(f"{scheme} {codec} values, rows, error", [same, rows, error], show=not (same and rows and error < 1e-4))


def _other_stream(check: Check, x: torch.Tensor, weight: PackedWeight, truth: torch.Tensor) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        big = torch.randn(8192, 8192, device=check.device)
        for _ in range(10):
            big = big @ big * 1e-4
        y = kernels.linear((x.float() + 0 * big[0, 0].nan_to_num()).bfloat16(), weight)
    side.synchronize()
    check.note("other stream error", relative(y, truth), show=False)


def _graph(check: Check, name: str, x: torch.Tensor, weight: PackedWeight, truth: torch.Tensor) -> None:
    """Captures a product, replays it on other numbers."""
    given = x.clone()
    kernels.linear(given, weight)
    check.synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = kernels.linear(given, weight)
    given.copy_(x * 2)
    graph.replay()
    check.synchronise()
    check.note(f"{name} error", relative(y, 2 * truth))


def _compiled(check: Check, x: torch.Tensor, weight: PackedWeight, truth: torch.Tensor) -> None:
    begun = time.perf_counter()
    silu = torch.nn.functional.silu
    function = torch.compile(lambda a: silu(kernels.linear(a, weight)) + 1, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        y = function(x)
        twice = function(torch.cat([x, x]))
    seconds = round(time.perf_counter() - begun, 1)
    check.note("compile error, shape, seconds", [relative(y, silu(truth) + 1), tuple(twice.shape), seconds])
