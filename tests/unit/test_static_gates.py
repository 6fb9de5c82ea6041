"""Every shipped kernel, compiled for every target without a GPU: no spills, tensor cores, few other steps.

The gates are in bonsai_ops/tools/bench/static.py (Row.failures); what is counted is explained there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bonsai_ops.tools.bench import static, static_unpack
from bonsai_ops.weights.packed_weight import SCHEMES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", static.TARGETS, ids=static.label)
def test_every_kernel_passes_its_gates(target: int | str) -> None:
    rows = list(static.report((target,), gemlite=False))
    assert len(rows) == len(list(static.shipped(target)))
    assert {row.name: row.failures() for row in rows if row.failures()} == {}


@pytest.mark.parametrize("target", static.TARGETS, ids=static.label)
def test_int8_kernels_are_shipped_for_planes(target: int | str) -> None:
    assert [row[:2] for row in static.shipped(target) if row[1] == "a8"] == [("crumb", "a8"), ("bit", "a8")]


@pytest.mark.skipif(sys.platform != "linux", reason="gemlite is installed on Linux only")
@pytest.mark.parametrize("target", [86, 90])
def test_fewer_instructions_than_gemlite(target: int) -> None:
    peer = static.gemlite_overhead(target, 2, "fp16")
    assert peer is not None, "gemlite is missing: run the tests with `python -m tests`"
    assert static.measure(target, "trit5", "exact", "fp16").ovh_per_hmma < peer


@pytest.mark.parametrize("target", [75, 86, 90, "gfx942"], ids=static.label)
def test_unpacking_passes_its_gates(target: int | str) -> None:
    """No spills and no shared memory, stores of 16 bytes, few instructions, hardly more bytes than the values have.

    Compiled by Triton and, for NVIDIA GPUs, by NVRTC.
    """
    rows = static_unpack.show((target,))
    assert {(row.name, row.compiler): row.failures() for row in rows if row.failures()} == {}
    compilers = {"triton"} if isinstance(target, str) or torch.version.cuda is None else {"triton", "nvrtc"}
    assert {row.compiler for row in rows} == compilers


def test_a_kernel_that_unpacks_badly_fails() -> None:
    good = static_unpack.Row("unpack_trit5_bf16", "triton", "sm_86", 0, 0, 56, 6.0, ["STG.E.128"], 2.216)
    assert not good.failures()
    bad = {"spills": 2, "smem": 4096, "steps": 7.4, "stores": ["STG.E.64"], "bytes": 3.0}
    assert len(dataclasses.replace(good, **bad).failures()) == 5


def test_bytes_a_weight() -> None:
    """Codes, tables of two bytes and values of two: at most 3 for every scheme but that of whole bytes."""
    moved = {
        (scheme.name, codec): static_unpack.moved(scheme.name, codec, 128)
        for scheme in SCHEMES.values()
        for codec in scheme.codecs
    }
    assert moved["ternary", "trit5"] == 2.216 and moved["binary", "bit"] == 2.141 and moved["affine", "nibble"] == 2.531
    assert all(found <= (3.04 if codec == "byte" else 2.6) for (_, codec), found in moved.items())


def test_report_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "static.json"
    assert static.run_static(file, (86,)) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert {row["target"] for row in figures["unpack"]} == {"sm_75", "sm_86"}
    rows = figures["kernels"]
    keys = {"name", "mode", "target", "spills", "smem", "registers", "mma", "ovh_per_hmma", "gemlite_ovh_per_hmma"}
    assert rows and all(set(row) == keys for row in rows)
    assert {row["name"] for row in rows} >= {
        "ternary_trit5_exact_fp16",
        "ternary_trit5_fp16_accumulate_fp16",
        "ternary_2bit_exact_fp16",
        "binary_1bit_exact_bf16",
    }
    assert {row["name"] for row in rows if row["mode"] == "a8"} == {"ternary_2bit_a8_bf16", "binary_1bit_a8_bf16"}
    assert "misses a gate" not in capsys.readouterr().out


def test_a_spilling_kernel_fails() -> None:
    row = static.Row("ternary_trit5_exact_fp16", "exact", "sm_86", 3, 120_000, 255, [], 9.0)
    assert len(row.failures()) == 4
    assert not static.Row("ternary_trit5_exact_bf16", "exact", "sm_90", 0, 200_000, 255, ["HGMMA"], 1.6).failures()


def test_each_codec_and_mode_has_its_limit() -> None:
    def missed(name: str, target: str, overhead: float) -> bool:
        mode = name.split("_", 2)[2].rsplit("_", 1)[0]
        return bool(static.Row(name, mode, target, 0, 0, 128, ["MMA"], overhead).failures())

    assert [missed("ternary_2bit_a8_bf16", target, 2.2) for target in ("sm_80", "sm_90", "gfx942")] == [1, 1, 0]
    assert [missed("binary_1bit_a8_bf16", target, 2.1) for target in ("sm_80", "sm_90")] == [0, 0]
    assert [missed("ternary_2bit_exact_fp16", target, 1.5) for target in ("sm_80", "sm_90")] == [0, 1]
    assert [missed("ternary_2bit_exact_fp16", "sm_80", 4.0), missed("ternary_trit5_exact_fp16", "sm_80", 4.0)] == [1, 0]
