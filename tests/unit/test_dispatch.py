"""Choosing a backend, saying why others declined, surviving one that breaks; each backend against the reference."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch

from bonsai_ops import codec, dispatch
from bonsai_ops.backends import cpu, eager
from bonsai_ops.packed_weight import PackedWeight
from bonsai_ops.precision import cpu_has_fast_bf16

SCHEMES = {"binary": ("bit", 2), "ternary": ("trit5", 3)}
SHAPES = [(1, 128), (8, 256), (130, 384), (384, 512), (1000, 1024)]


def random_weight(scheme: str, rows: int, columns: int, group_size: int = 128) -> PackedWeight:
    name, radix = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, radix, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, columns // group_size, generator=generator) + 0.5).bfloat16()
    return PackedWeight(codec.encode(name, codes), scale, (rows, columns), scheme, name, group_size)


@pytest.fixture
def forget_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_broken", dispatch._Broken())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_cpu_backend_against_float64(scheme: str, group_size: int, shape: tuple[int, int], tokens: int) -> None:
    """bf16 products within 1/2 ulp of bf16 (2^-8 relative to the row) of float64; the weights themselves are exact."""
    weight = random_weight(scheme, *shape, group_size)
    x = torch.randn(2, tokens, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).bfloat16()
    truth = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    found = cpu.linear(x, weight, bias)
    assert found.shape == truth.shape
    assert found.dtype == torch.bfloat16
    assert float((found.double() - truth).abs().max() / truth.abs().max()) < 2**-7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_backend_decodes_every_byte(scheme: str) -> None:
    """The bit patterns give the reference's value for all 256 bytes in every plane."""
    fields = codec.get_codec(SCHEMES[scheme][0]).fields
    packed = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    rows = 8 * fields
    weight = PackedWeight(packed, torch.ones(rows, 2).bfloat16(), (rows, 256), scheme, SCHEMES[scheme][0], 128)
    assert torch.equal(cpu.linear(torch.eye(256).bfloat16(), weight).t().float(), weight.dequantize(torch.float32))


def test_cpu_backend_does_not_touch_rows_beyond_the_weight() -> None:
    """With a number of rows that is no multiple of the planes, every output column is written once and none twice."""
    weight = random_weight("ternary", 41, 128)
    x = torch.randn(3, 128).bfloat16()
    assert torch.allclose(cpu.linear(x, weight).float(), eager.linear(x, weight).float(), rtol=2**-7, atol=2**-5)


def test_choice_and_reasons() -> None:
    """fp32 goes to the reference with the reason; bf16 to the CPU's own path where the CPU can."""
    weight = random_weight("ternary", 128, 256)
    device = torch.device("cpu")
    backend, declined = dispatch.choose(dispatch.call_of(device, torch.float32, weight))
    assert backend.name == "eager"
    assert "float32" in declined["cpu"]
    backend, declined = dispatch.choose(dispatch.call_of(device, torch.bfloat16, weight))
    if cpu_has_fast_bf16():
        assert backend.name == "cpu"
    else:
        assert "AVX-512 BF16" in declined["cpu"]
    affine = dispatch.Call(device, torch.bfloat16, 128, 256, "affine", "crumb", 128)
    assert "second table" in dispatch.why_not(affine)["cpu"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 7.5"),
        ({"device": torch.device("mps")}, "the weight is on mps"),
        ({"device": torch.device("xpu")}, "the weight is on xpu"),
        ({"columns": 96, "group_size": 96}, "groups of 128"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
    ],
    ids=["sm_75", "mps", "xpu", "columns", "fp32"],
)
def test_why_not_triton(changes: dict, reason: str) -> None:
    """The reference takes what the fused kernels decline, and the reason is said."""
    pytest.importorskip("triton", reason="Triton is not installed")
    call = dispatch.Call(torch.device("cuda", 0), torch.bfloat16, 128, 256, "ternary", "trit5", 128, (8, 6))
    assert dispatch.choose(call)[0].name == "triton"
    backend, declined = dispatch.choose(dataclasses.replace(call, **changes))
    assert backend.name == "eager"
    assert reason in declined["triton"]


def test_forcing_a_backend() -> None:
    weight = random_weight("binary", 128, 256)
    call = dispatch.call_of(torch.device("cpu"), torch.bfloat16, weight)
    with dispatch.use_backend("eager"):
        backend, declined = dispatch.choose(call)
        assert backend.name == "eager"
        assert declined["cpu"] == "eager is asked for"
    with pytest.raises(ValueError, match="backend 'fast' is unknown, expected one of"), dispatch.use_backend("fast"):
        pass


def test_environment_override() -> None:
    """BONSAI_BACKEND=eager holds for a process; a wrong name is refused."""
    program = (
        "import torch; from bonsai_ops import dispatch; "
        "call = dispatch.Call(torch.device('cpu'), torch.bfloat16, 128, 128, 'binary', 'bit', 128); "
        "print(dispatch.choose(call)[0].name)"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        import os

        variables = {**os.environ, dispatch.OVERRIDE: value}
        return subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
        )

    assert run("eager").stdout.strip() == "eager"
    wrong = run("quick")
    assert wrong.returncode != 0
    assert "backend 'quick' is unknown" in wrong.stderr


def test_broken_backend_costs_speed_not_the_picture(
    forget_broken: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises at its first launch is left out from then on, said once, and the result is the reference's."""
    launches = []

    def breaks(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
        launches.append(x)
        raise FileNotFoundError("no compiler here")

    broken = dispatch.Backend("fused", lambda call: None, breaks)
    monkeypatch.setattr(dispatch, "BACKENDS", (broken, *dispatch.BACKENDS))
    weight, x = random_weight("ternary", 128, 256), torch.randn(4, 256)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(dispatch.linear(x, weight), eager.linear(x, weight))
    assert len(launches) == 1
    assert [r.getMessage() for r in caplog.records if "fused" in r.getMessage()] == [
        "Bonsai: backend fused failed on cpu: no compiler here; going on without it, slower"
    ]
    assert "no compiler here" in dispatch.why_not(dispatch.call_of(x.device, x.dtype, weight))["fused"]
