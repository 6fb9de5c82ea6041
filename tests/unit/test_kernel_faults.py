"""Whatever breaks in one kernel leaves every other kernel, mode and device in use: each fault in each kernel.

All kernels take what is on the CPU here, each a scheme of its own; those of GPUs are stood for by torch, behind the
lines that compare, explain and raise. A fault comes where a kernel is built and started. How Triton, NVRTC and the
driver are missed before that, test_triton.py and test_unpack_nvrtc.py look at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from random_weights import random_weight

from bonsai_ops import kernels
from bonsai_ops.kernels import BackendError, cpu, dispatch, eager, machine, triton
from bonsai_ops.kernels.call import ERRORS
from bonsai_ops.kernels.triton import assembler, by_plane, configs, probe
from bonsai_ops.kernels.triton import backend as launches
from bonsai_ops.kernels.unpack import by_nvrtc, by_triton
from bonsai_ops.weights.packed_weight import PackedWeight

ILLEGAL = "CUDA error: an illegal memory access was encountered"
WEIGHTS = {
    by_plane.NAME: ("ternary", "trit5"),
    triton.NAME: ("ternary", "crumb"),
    cpu.NAME: ("binary", "bit"),
    by_triton.NAME: ("affine", "nibble"),
    by_nvrtc.NAME: ("zero_point", "nibble"),
}
"""{backend: what it alone takes here}"""
MODULES = (by_plane, triton, cpu, by_triton, by_nvrtc)
KERNELS = [(module, mode) for module in MODULES for mode in module.MODES]
OF_A_KERNEL = {
    "import": ImportError("cannot import name 'language'"),
    "library": OSError("libnvrtc.so.13: cannot open shared object file: No such file or directory"),
    "compile": subprocess.CalledProcessError(1, "ptxas"),
    "source": RuntimeError('kernel.cu(7): error: identifier "half" is undefined'),
    "launch": RuntimeError("Triton Error [CUDA]: invalid argument"),
    "resources": RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    "values": None,
}
OF_THE_DEVICE = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "memory of Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "context": RuntimeError(ILLEGAL),
    "context of a driver": RuntimeError("CUDA error in cuLaunchKernel: unspecified launch failure (719)"),
}


def cells(faults: dict[str, Exception | None]) -> list[Any]:
    """Every fault in every kernel. Values of the CPU's own path are torch's, nothing compares them at run time."""
    return [
        pytest.param(module, mode, fault, id=f"{module.NAME}-{mode}-{name}")
        for module, mode in KERNELS
        for name, fault in faults.items()
        if fault is not None or module is not cpu
    ]


class Kernels:
    """All of them at work. used: (backend, mode) of each product that came about. victim, fault: what breaks now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[tuple[str, str]] = []
        self.victim: tuple[ModuleType, str] | None = None
        self.fault: Exception | None = None
        monkeypatch.setattr(dispatch, "BACKENDS", (*map(self.taking, MODULES), eager))
        monkeypatch.setattr(machine, "cpu_has_fast_int8", lambda: True)
        monkeypatch.setattr(launches, "launch", self.launch)
        monkeypatch.setattr(assembler, "of", lambda chosen: contextlib.nullcontext())
        monkeypatch.setattr(probe, "SIZE", probe.SMALL)
        for module in (by_triton, by_nvrtc):
            monkeypatch.setattr(module, "write", self.writing(module))
        for name, mode in (("_exact", "exact"), ("_a8", "a8")):
            monkeypatch.setattr(cpu, name, self.computing(getattr(cpu, name), mode))

    def taking(self, module: ModuleType) -> SimpleNamespace:
        def declines(call: kernels.Call) -> str | None:
            return None if (call.scheme, call.codec) == WEIGHTS[module.NAME] else "another's"

        def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, mode: str) -> torch.Tensor:
            y = module.multiply(x, weight, bias, mode)
            self.used.append((module.NAME, mode))
            return y

        return SimpleNamespace(NAME=module.NAME, MODES=module.MODES, declines=declines, multiply=multiply)

    def breaks(self, module: ModuleType, mode: str) -> bool:
        """Whether it is this kernel that breaks; raises where the fault is an error."""
        if (module, mode) != self.victim:
            return False
        if self.fault is not None:
            raise self.fault
        return True

    def launch(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        chosen: configs.Config,
        mode: str,
    ) -> None:
        wrong = self.breaks(by_plane if chosen.plane else triton, mode)
        out.copy_(eager.multiply(x, weight, bias)).mul_(1.1 if wrong else 1)

    def writing(self, module: ModuleType) -> Callable:
        def write(weight: PackedWeight, first: int, last: int, out: torch.Tensor) -> None:
            wrong = self.breaks(module, "exact")
            out.copy_(weight.dequantize(out.dtype)[first:last])
            out[-1, -1] += 1 if wrong else 0

        return write

    def computing(self, real: Callable, mode: str) -> Callable:
        def compute(*arguments: Any) -> None:
            self.breaks(cpu, mode)
            real(*arguments)

        return compute

    def multiply(self, module: ModuleType, mode: str) -> list[tuple[str, str]]:
        """Who multiplied what is this kernel's; the product is right."""
        weight, x = self.operands(module)
        self.used.clear()
        found, truth = kernels.linear(x, weight, mode=mode), eager.multiply(x, weight)
        assert (found - truth).norm() <= ERRORS.get(mode, 1e-6) * truth.norm()
        return list(self.used)

    def operands(self, module: ModuleType) -> tuple[PackedWeight, torch.Tensor]:
        weight = random_weight(*WEIGHTS[module.NAME], 40, 256)
        return weight, torch.randn(3, 256, generator=torch.Generator().manual_seed(0))

    def all_but(self, *without: tuple[ModuleType, str]) -> None:
        """Every other kernel is used for what is its own."""
        for module, mode in KERNELS:
            if (module, mode) not in without:
                assert self.multiply(module, mode) == [(module.NAME, mode)]


def forget() -> None:
    for module in (launches, by_triton, by_nvrtc):
        module.forget_verified()
    kernels.forget_failures()


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    if launches.unavailable() is not None:
        pytest.skip(str(launches.unavailable()))
    forget()
    yield Kernels(monkeypatch)
    forget()


def test_all_are_at_work(working: Kernels) -> None:
    working.all_but()


@pytest.mark.parametrize("late", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize(("module", "mode", "fault"), cells(OF_A_KERNEL))
def test_a_broken_kernel_leaves_the_others(
    module: ModuleType, mode: str, fault: Exception | None, late: bool, working: Kernels, caplog: Any
) -> None:
    """It is out for its device and mode, once and for all, said in one line with the cure; all others go on.

    A kernel that was compared is not compared again, so wrong values are noticed at first only.
    """
    if late:
        working.all_but()
        if fault is None:
            forget()
    working.victim, working.fault = (module, mode), fault
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            instead = working.multiply(module, mode)
            assert (module.NAME, mode) not in instead and len(instead) <= 1
            working.all_but((module, mode))
    assert len(caplog.records) == 1 and f"backend {module.NAME} failed on cpu in mode {mode}" in caplog.text
    weight, x = working.operands(module)
    call = kernels.call_of(x.device, x.dtype, weight, mode)
    declined = " ".join(kernels.resolve(call).declined.values())
    assert "failed on cpu" in declined and (module is cpu or "to use it, " in declined)
    elsewhere = kernels.resolve(dataclasses.replace(call, device=torch.device("cuda", 1)))
    assert (elsewhere.backend.NAME, elsewhere.mode) == (module.NAME, mode)


@pytest.mark.parametrize("late", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize(("module", "mode", "fault"), cells(OF_THE_DEVICE))
def test_an_error_of_the_device_is_no_kernels(
    module: ModuleType, mode: str, fault: Exception, late: bool, working: Kernels, caplog: Any
) -> None:
    """Memory that ran out is raised as it is, a lost context with the cure; the next call uses the kernel again."""
    if late:
        working.all_but()
    working.victim, working.fault = (module, mode), fault
    for _ in range(2):
        with pytest.raises(RuntimeError) as found:
            working.multiply(module, mode)
        assert not isinstance(found.value, BackendError)
        if "memory" in str(fault) and "illegal" not in str(fault):
            assert found.value is fault
            continue
        assert isinstance(found.value, kernels.LostDeviceError) and found.value.__cause__ is fault
        said = str(found.value)
        assert "cpu stopped working" in said and str(fault) in said and "until ComfyUI is restarted: restart it" in said
        assert module.NAME not in said.replace("cpu stopped", "") and "\n" not in said
    working.victim = None
    working.all_but()
    assert not caplog.records


@pytest.mark.parametrize("name", ["reference", "gradient"])
def test_a_lost_device_is_named_by_whoever_meets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference too, which multiplies fp16 on a CPU, and the product of a gradient."""
    weight, x = random_weight("affine", "nibble", 40, 256), torch.ones(3, 256, dtype=torch.float16)
    function = "multiply" if name == "reference" else "multiply_transposed"

    def lost(*_arguments: Any) -> torch.Tensor:
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(eager, function, lost)
    with pytest.raises(kernels.LostDeviceError, match="restart it"):
        if name == "reference":
            kernels.linear(x, weight)
        else:
            dispatch.multiply_transposed(torch.ones(3, 40, dtype=torch.float16), weight)
