"""Which processors count as fast in bf16: by torch on x86, by made-up files of Linux on ARM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bonsai_ops.kernels import machine

X86 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
NEOVERSE_V1 = (
    "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd evtstrm sve svei8mm svebf16 i8mm bf16 dgh rng\n"
)
NEOVERSE_N1 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimddp\n"
INTEL = "processor\t: 0\nmodel name\t: bf16\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [(NEOVERSE_V1, True), (NEOVERSE_N1, False), (INTEL, False), ("", False)],
    ids=["V1", "N1", "x86", "none"],
)
def test_bf16_of_arm(cpuinfo: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the features that Linux lists, and only if torch has oneDNN; the checks for x86 say no there."""
    for name in X86:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo, encoding="ascii")
    assert machine.cpu_has_fast_bf16(tmp_path) is (fast and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: not fast)
    assert machine.cpu_has_fast_bf16(tmp_path) is False


@pytest.mark.parametrize("name", X86)
def test_bf16_of_x86(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in X86:
        monkeypatch.setattr(torch.cpu, each, lambda found=each == name: found, raising=False)
    assert machine.cpu_has_fast_bf16(tmp_path) is True


def test_a_torch_without_those_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in X86:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert machine.cpu_has_fast_bf16(tmp_path) is False
