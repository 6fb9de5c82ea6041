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

from bonsai_ops.kernels import BackendError
from bonsai_ops.kernels.triton import assembler, configs
from bonsai_ops.tools.bench import static, static_loop, static_unpack
from bonsai_ops.tools.bench.disassembly import compile_kernel, disassembled
from bonsai_ops.weights.packed_weight import SCHEMES

pytestmark = pytest.mark.slow

FEW_PLANES = [("trit5", "bf16", 0), ("bit", "fp16", 0), ("crumb", "bf16", 1)]
"""Of static.planes; the report compiles all of them."""


@pytest.mark.parametrize("target", static.TARGETS, ids=static.label)
def test_every_kernel_passes_its_gates(target: int | str) -> None:
    rows = [static.measure(target, *kernel) for kernel in static.shipped(target)]
    few = [kernel for kernel in FEW_PLANES if kernel in list(static.planes(target))]
    assert bool(few) == (target in (90, 100))
    rows += [static.measure_plane(target, *kernel) for kernel in few]
    assert {row.name: row.failures() for row in rows if row.failures()} == {}


@pytest.mark.parametrize("target", static.TARGETS, ids=static.label)
def test_int8_kernels_are_shipped_for_planes(target: int | str) -> None:
    assert [row[:2] for row in static.shipped(target) if row[1] == "a8"] == [("crumb", "a8"), ("bit", "a8")]
    fp8 = {row[0] for row in static.shipped(target) if row[1] == "a8_fp8"}
    assert fp8 == ({"crumb", "bit"} if target in (89, 90, 100, 120) else set())


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
    keys |= {"products", "in_flight", "barriers", "distance", "ahead", "overwritten"}
    assert rows and all(set(row) == keys for row in rows)
    assert {row["name"] for row in rows} >= {
        "ternary_trit5_exact_fp16",
        "ternary_trit5_fp16_accumulate_fp16",
        "ternary_2bit_exact_fp16",
        "binary_1bit_exact_bf16",
    }
    assert {row["name"] for row in rows if row["mode"] == "a8"} == {"ternary_2bit_a8_bf16", "binary_1bit_a8_bf16"}
    assert "misses a gate" not in capsys.readouterr().out


WAITED = {"in_flight": 1, "barriers": 2, "distance": 100, "ahead": 2.0}


def test_a_spilling_kernel_fails() -> None:
    row = static.Row("ternary_trit5_exact_fp16", "exact", "sm_86", 3, 120_000, 255, [], 9.0, **WAITED)
    assert len(row.failures()) == 4
    row = static.Row("ternary_trit5_exact_bf16", "exact", "sm_90", 0, 200_000, 255, ["HGMMA"], 1.6, **WAITED)
    assert not row.failures()


def test_a_kernel_that_waits_fails() -> None:
    """What the sums of instructions do not show: each figure alone."""
    name, mma = "ternary_trit5_plane_wide_bf16", ["HGMMA"]
    good = static.Row(name, "plane", "sm_90", 0, 155_648, 213, mma, 1.77, products=4, **WAITED)
    assert not good.failures()
    worse = {"in_flight": 0, "barriers": 11, "distance": 7, "ahead": 0.0, "products": 20, "overwritten": 1}
    for name, value in worse.items():
        assert len(dataclasses.replace(good, **{name: value}).failures()) == 1, name
    assert not dataclasses.replace(good, name="ternary_trit5_plane_narrow_bf16", ovh_per_hmma=3.4).failures()
    assert dataclasses.replace(good, ovh_per_hmma=3.4).failures()


HOPPER = """
DEPBAR.LE SB0, 0x4
BAR.SYNC.DEFER_BLOCKING 0x0
LDG.E.U16 R158, desc[UR16][R152.64]
LDS.U16 R160, [R14+UR8+0x20000]
@P0 IMAD R161, R7, UR14, RZ
HMUL2.BF16_V2 R162, R160, R158.H0_H0
HGMMA.64x256x16.F32.BF16 R24, R160, gdesc[UR4], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
HGMMA.64x256x16.F32.BF16 R24, R164, gdesc[UR4], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
LDGSTS.E.BYPASS.128 [R189], desc[UR16][R190.64], !P0
LDGDEPBAR
LDGSTS.E.64 [R167+0x20000], desc[UR16][R160.64], !P0
LDGDEPBAR
""".strip().splitlines()


def test_what_a_loop_waits_for() -> None:
    """By hand: the second product may run on into the next iteration, so nothing there may write R164 .. R167."""
    assert static_loop.look_at(HOPPER) == static_loop.Loop(1, 1, 2, 2.0, 0)
    for line, count in (
        ("MOV R166, R3", 1),
        ("IMAD.WIDE R166, R3, 0x2, R8", 2),
        ("LDS.128 R164, [R9]", 4),
        ("STS.128 [R9], R164", 0),
        ("MOV R160, R164", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 0),
    ):
        assert static_loop.look_at([line, *HOPPER]).overwritten == count, line
    waiting = [line.replace("gsb0, 0x1", "gsb0, 0x0") for line in ("LDS.128 R164, [R9]", *HOPPER)]
    assert (static_loop.look_at(waiting).in_flight, static_loop.look_at(waiting).overwritten) == (0, 0)
    amd = ["global_load_b128 v[34:37], v[2:3], off", "s_barrier", "v_add_f32 v1, v2, v3", "v_mul_f32 v4, v36, v1"]
    assert static_loop.look_at(amd) == static_loop.Loop(None, 1, 2, None, 0)


def test_the_ptxas_that_is_not_taken_overwrites_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why assembler.py chooses: the same PTX, by the one that Triton takes for Hopper."""
    import triton

    from bonsai_ops.kernels.triton import plane

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if tuple(map(int, triton.knobs.nvidia.ptxas.version.split("."))) >= assembler.LEAST_PTXAS:
        pytest.skip("this Triton takes a ptxas that can be trusted")
    config = configs.PLANE_TILES["sm_90"][0]
    types = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16"}
    aligned = {*types, "N", "K", "stride_xm", "stride_ym"}
    types |= dict.fromkeys(("M", "N", "K", "n8", "stride_xm", "stride_ym"), "i32")
    constants = configs.constants(config, "trit5", "exact", bias=False)
    compiled = compile_kernel(plane.plane_kernel, types, constants, aligned, 90, num_warps=8, num_stages=4)
    assert assembler.maker(compiled.asm["cubin"]) < assembler.LEAST_PTXAS
    loops = disassembled(compiled, 90)[2]
    assert max(static_loop.look_at(loop).overwritten for loop in loops) > 0
    with pytest.raises(BackendError, match="old ptxas"):
        assembler.check(compiled, config)


def test_each_codec_and_mode_has_its_limit() -> None:
    def missed(name: str, target: str, overhead: float) -> bool:
        mode = name.split("_", 2)[2].rsplit("_", 1)[0]
        return bool(static.Row(name, mode, target, 0, 0, 128, ["MMA"], overhead, **WAITED).failures())

    assert [missed("ternary_2bit_a8_bf16", target, 2.2) for target in ("sm_80", "sm_90", "gfx942")] == [1, 1, 0]
    assert [missed("binary_1bit_a8_bf16", target, 2.1) for target in ("sm_80", "sm_90")] == [0, 0]
    assert [missed("binary_1bit_a8_fp8_bf16", target, 2.4) for target in ("sm_89", "sm_90")] == [0, 1]
    assert [missed("ternary_2bit_exact_fp16", target, 1.5) for target in ("sm_80", "sm_90")] == [0, 1]
    assert [missed("ternary_2bit_exact_fp16", "sm_80", 4.0), missed("ternary_trit5_exact_fp16", "sm_80", 4.0)] == [1, 0]
