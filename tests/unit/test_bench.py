"""The benchmarks' own arithmetic: parsers, counters, rotation over copies, files they write."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from bonsai_ops import kernels
from bonsai_ops.tools import synthetic
from bonsai_ops.tools.bench import (
    energy,
    errors,
    layers,
    machine,
    peaks,
    picture,
    plot,
    report,
    rivals,
    sdcpp,
    session,
    step,
    sweep,
    table,
    timer,
    ways,
)
from bonsai_ops.tools.bench.inside.profile import StepProfile, kind_of
from bonsai_ops.tools.bench.inside.train import needed, possible
from bonsai_ops.tools.environment import PLUGIN, inherited_environment, module_command
from bonsai_ops.weights.packed_weight import PackedWeight
from bonsai_ops.weights.read import open_transformer, read_weights

SDCPP_LOG = """\
[INFO ] stable-diffusion.cpp:305  - Version: Flux.2 klein
\r  |=====================================>            | 589/795 - 351.42MB/s\x1b[K\
\r  |==================================================| 795/795 - 350.90MB/s\x1b[K
[INFO ] model.cpp:993  - loading tensors completed, taking 9.39s (process: 0.00s, read: 9.08s, memcpy: 0.00s, convert:\
 0.24s, copy_to_backend: 0.00s)
[INFO ] stable-diffusion.cpp:3367 - generate_image 64x64
[INFO ] stable-diffusion.cpp:2814 - sampling using Euler method
[DEBUG] conditioner.hpp:1996 - computing condition graph completed, taking 124658 ms
[INFO ] stable-diffusion.cpp:3168 - get_learned_condition completed, taking 124.66s
[INFO ] stable-diffusion.cpp:3401 - generating image: 1/1 - seed 0
[DEBUG] ggml_extend.hpp:1921 - flux compute buffer size: 121.48 MB(RAM)
\r  |=========================>                        | 1/2 - 79.44s/it\x1b[K\
\r  |==================================================| 2/2 - 88.55s/it\x1b[K
[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 177.14s
[INFO ] stable-diffusion.cpp:3450 - generating 1 latent images completed, taking 177.51s
[INFO ] stable-diffusion.cpp:3188 - decoding 1 latents
[INFO ] stable-diffusion.cpp:3208 - latent 1 decoded, taking 5.26s
[INFO ] stable-diffusion.cpp:3212 - decode_first_stage completed, taking 5.26s
[INFO ] stable-diffusion.cpp:3591 - generate_image completed in 307.97s
[INFO ] main.cpp:441  - save result image 0 to 'picture.png' (success)
"""
"""Of a run of that of stable-diffusion-cpp-python 0.4.7, `-v --steps 2 --width 64 --height 64`; some lines left out."""
SDCPP_PARTS = {"load_s": 9.39, "text_encoder_s": 124.66, "steps_s": 177.14, "step_s": 88.57, "vae_s": 5.26}


@pytest.mark.parametrize("condition", ["124.66s", "124660 ms"])
def test_the_log_of_stable_diffusion_cpp_is_read(condition: str) -> None:
    assert sdcpp.parse_log(SDCPP_LOG.replace("124.66s", condition), 4) == pytest.approx(SDCPP_PARTS)


def test_a_foreign_log_is_refused() -> None:
    with pytest.raises(SystemExit, match="decode_first_stage completed"):
        sdcpp.parse_log(SDCPP_LOG.replace("decode_first_stage", "decode"), 4)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_stable_diffusion_cpp_is_run_and_timed(tmp_path: Path) -> None:
    """A program that prints the log stands in for sd-cli, which is not installed where this runs."""
    program = tmp_path / "sd-cli"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + SDCPP_LOG + "sleep 0.2\nEND\n", encoding="utf-8")
    program.chmod(0o755)
    files = [tmp_path / name for name in ("model.gguf", "llm.gguf", "vae.safetensors")]
    rival = sdcpp.Sdcpp(program, *files, arguments=("--diffusion-fa",))
    command = rival.command("a tree", (320, 240), 4, 2, tmp_path / "out.png")
    assert command[:3] == [str(program), "--diffusion-model", str(files[0])]
    assert command[-2:] == ["--diffusion-fa", "-v"]
    assert command[command.index("--width") :][:4] == ["--width", "320", "--height", "240"]
    row = picture.with_totals(sdcpp.run_sdcpp(rival, "a tree", (512, 512), 4, 2, energy.Energy([])))
    assert row["total_s"] == pytest.approx(124.66 + 177.14 + 5.26)
    assert row["loaded_per_hour"] == pytest.approx(3600 / row["total_s"])
    assert row["load_s"] == 9.39 and 0 < row["whole_s"] < 60  # its own word, and the clock's
    assert row["pictures_per_hour"] == pytest.approx(3600 / row["whole_s"])
    assert row["peak_bytes"] > 0 and row["processor_s"] is not None
    program.write_text("#!/bin/sh\necho no such model\nexit 3\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"code 3:\nno such model"):
        sdcpp.run_sdcpp(rival, "a tree", (512, 512), 4, 2, energy.Energy([]))


def _program(
    name: str, runs: list[dict | Exception], size: tuple[int, int] = (512, 512), once: bool = False
) -> picture.Program:
    """A program whose pictures took what is written; it fails when that is used up."""
    left = iter(runs)

    def run() -> dict:
        found = next(left, None)
        if found is None:
            raise SystemExit("no such model")
        if isinstance(found, Exception):
            raise found
        return {"peak_bytes": 2 * 10**9, "joules": None, "no_joules": "no counter", **found}

    return picture.Program(name, size, run, f"files of {name}", once)


def _seconds(steps: float) -> dict:
    parts = {"load_s": 3.0, "text_encoder_s": 1.0, "steps_s": steps, "step_s": [steps / 2] * 2, "vae_s": 2.0}
    return {**parts, "whole_s": steps + 10}


def test_programs_draw_in_turns_and_medians_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What was measured is kept after each picture; one that fails is left out and the rest goes on."""
    kept: list[dict] = []
    programs = [
        _program("ours", [_seconds(steps) for steps in (9.0, 3.0, 5.0)]),
        _program("sdcpp", [_seconds(steps) for steps in (13.0, 12.0, 20.0)]),
        _program("stock", [_seconds(50.0)]),
        _program("trillim", [{"whole_s": 36.0}] * 3, rivals.TRILLIM_SIZE),
    ]
    figures = picture.measure(programs, 3, lambda figures: kept.append(json.loads(json.dumps(figures))))
    assert len(kept) == 3 * 4 - 2
    assert list(kept[0]) == ["size", "steps", "runs", "ours", "spread", "ratios", "rows"]
    assert figures["ours"]["steps_s"] == 5.0 and figures["ours"]["step_s"] == [2.5, 2.5]
    assert [figures["ours"][key] for key in ("total_s", "rest_s", "whole_s")] == [8.0, 4.0, 15.0]
    assert figures["stock"]["steps_s"] == 50.0
    assert figures["trillim"]["pictures_per_hour"] == 100.0 and "total_s" not in figures["trillim"]
    printed = capsys.readouterr().out
    assert "8.00 (6.00-12.0)" in printed and "stock ComfyUI, dense files: pictures 1" in printed
    assert printed.count("stock ComfyUI, dense files is left out: no such model") == 1
    assert "one picture of 512x512" in printed and "one picture of 320x240" in printed
    file = tmp_path / "figures.json"
    picture.keep_in(file, {"commit": "0123456789"})(figures)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["machine"] == {"commit": "0123456789"} and written["picture"]["ours"]["steps_s"] == 5.0
    groups = dict(plot.picture_panel(figures).groups)
    labels = ["Bonsai Image", "stable-diffusion.cpp", "stock ComfyUI, dense files"]
    assert [bar.label for bar in groups["text encoder"]] == labels
    assert [bar.value for bar in groups["whole process"]] == [15.0, 23.0, 60.0]
    with pytest.raises(SystemExit, match="no such model"):
        picture.measure([_program("ours", [])])


def test_the_figures_can_be_reckoned_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Every picture, the least and the most, and the ratio to each rival of the same size in the same turns."""
    programs = [
        _program("ours", [_seconds(steps) for steps in (9.0, 3.0)]),
        _program("ours_a8", [_seconds(steps) for steps in (5.0, 3.0)]),
        _program("ours_fp32", [_seconds(90.0)], once=True),
        _program("sdcpp", [_seconds(21.0), _seconds(13.0)]),
        _program("stock", [_seconds(50.0), OSError("no space left")]),
        _program("ours_small", [_seconds(9.0)] * 2, rivals.TRILLIM_SIZE),
        _program("trillim", [{"whole_s": 38.0}] * 2, rivals.TRILLIM_SIZE),
    ]
    figures = picture.measure(programs, 2, facts={"steps": 2, "comfyui": "0.30.0"})
    assert [row["steps_s"] for row in figures["rows"] if row["program"] == "ours"] == [9.0, 3.0]
    assert [row["run"] for row in figures["rows"] if row["program"] == "stock"] == [1]
    assert figures["spread"]["ours"]["total_s"] == [6.0, 12.0] and figures["ours"]["total_s"] == 9.0
    ratios = figures["ratios"]
    assert ratios["ours"]["sdcpp"]["total_s"] == pytest.approx({"median": 9 / 20, "least": 6 / 16, "most": 12 / 24})
    assert ratios["ours"]["stock"]["whole_s"] == pytest.approx({"median": 16 / 60, "least": 19 / 60, "most": 19 / 60})
    assert ratios["ours_small"] == {"trillim": {"whole_s": {"median": 0.5, "least": 0.5, "most": 0.5}}}
    assert set(ratios) == {"ours", "ours_a8", "ours_small"} and ratios["ours_a8"].keys() == {"sdcpp", "stock"}
    assert (figures["stock"]["pictures"], figures["ours_fp32"]["pictures"], figures["steps"]) == (1, 1, 2)
    assert (figures["comfyui"], figures["sdcpp"]["source"]) == ("0.30.0", "files of sdcpp")
    printed = capsys.readouterr().out
    assert "one picture of 512x512, 2 steps, median of 2" in printed and "one picture of 320x240" in printed
    assert "Bonsai Image takes of the time of stable-diffusion.cpp: 0.450 (0.375-0.500) without loading" in printed
    assert "stock ComfyUI, dense files is left out: no space left" in printed
    assert [row["program"] for row in report.rows_of(figures)][:2] == ["ours", "ours_a8"]


@pytest.mark.parametrize(
    ("modes", "packs", "names"),
    [
        (["exact", "a8"], ["native", "mlx"], ["ours", "ours_a8", "ours_mlx"]),
        (["a8", "exact"], ["native", "native"], ["ours_a8", "ours"]),
        (["a8", "a8"], [], ["ours_a8"]),
    ],
)
def test_our_pictures_are_of_every_mode_and_kind_of_file(
    modes: list[str], packs: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each under the name of its mode, whatever comes first, and the tables can show it."""
    monkeypatch.setattr(picture, "files_of", lambda ours, kind: {"file": kind})
    drawn: list[str] = []

    def row(self: picture.Ours, files: dict, size: tuple, mode: str, **_: object) -> dict:
        drawn.append(mode)
        return {"peak_bytes": 2 * 10**9, "joules": None, "no_joules": "no counter", **_seconds(9.0)}

    monkeypatch.setattr(picture.Ours, "row", row)
    programs = list(picture.ours_of(picture.Ours(tmp_path, tmp_path), 512, modes, packs))
    assert [program.name for program in programs] == names
    figures = picture.measure(programs)
    assert drawn == ["a8" if name == "ours_a8" else "exact" for name in names] and set(names) <= set(figures)
    with pytest.raises(SystemExit, match="--mode a7 is unknown"):
        next(picture.ours_of(picture.Ours(tmp_path, tmp_path), 512, ["a7"], []))


def test_a_mode_that_is_not_computed_is_no_picture_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"mode": "exact", "declined": {"a8": "no instructions"}}
    monkeypatch.setattr(session, "run", lambda *_, **__: row)
    ours = picture.Ours(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match=r"mode a8 is not computed here: .*no instructions"):
        ours.row({}, (64, 64), "a8")
    assert ours.row({}, (64, 64), "exact").keys() == {*row, "whole_s", "joules", "no_joules"}


def test_errors_without_a_picture_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({state: torch.ones(4) for state in errors.STATES}, errors.kept(tmp_path, "ours"))
    assert errors.measure(tmp_path, ["ours", "ours_fp32"]) == {}
    assert "no picture in fp32" in capsys.readouterr().out


def test_the_memory_of_a_program_is_its_own() -> None:
    """What the benchmark itself held before, while it made files, is not counted."""
    if machine.own_rss() is None:
        pytest.skip("this system does not tell them apart")
    machine.reset_peak_rss()
    before = machine.peak_rss()
    held = torch.ones(400 << 20, dtype=torch.uint8)
    del held
    _, measured = sdcpp.run_alone([sys.executable, "-c", "print('done')"], energy.Energy([]))
    assert 0 < measured["peak_bytes"] < before + (200 << 20)


def test_errors_are_those_of_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --errors each program of ours keeps its states in a file of its own, and one more computes in fp32."""
    monkeypatch.setattr(picture, "files_of", lambda ours, kind: {"file": kind})
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.30.0"\n', encoding="ascii")
    asked: list[tuple] = []

    def row(self: picture.Ours, files: dict, size: tuple, mode: str, dtype: str, keep: Path | None) -> dict:
        asked.append((mode, dtype, keep is not None))
        if keep is not None:
            value = 1.5 if mode == "a8" else 1.0
            save_file({state: torch.full((4,), value) for state in errors.STATES}, keep)
        return {"peak_bytes": 2 * 10**9, "joules": None, "no_joules": "no counter", **_seconds(9.0)}

    monkeypatch.setattr(picture.Ours, "row", row)
    parser = argparse.ArgumentParser()
    for name in ("--json", "--work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--device", default="cpu")
    table.add_arguments(parser)
    for more in ([], ["--errors"]):
        given = parser.parse_args(["--picture", "--mode", "exact", "a8", "--steps", "3", *more])
        figures = rivals.measure(table.Run(given, tmp_path, tmp_path))
    assert asked[:2] == [("exact", "auto", False), ("a8", "auto", False)]
    assert asked[2:] == [("exact", "auto", True), ("a8", "auto", True), ("exact", "fp32", True)]
    assert figures["errors"] == {
        "ours": dict.fromkeys(errors.STATES, 0.0),
        "ours_a8": dict.fromkeys(errors.STATES, 0.5),
    }
    assert (figures["comfyui"], figures["prompt"], figures["steps"]) == ("0.30.0", picture.PROMPT, 3)


def _workshop(folder: Path) -> rivals.Workshop:
    return rivals.Workshop(folder / "kept", picture.Ours(folder, folder / "work"), 512)


def test_a_rival_that_cannot_be_had_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the log and no more; the next one is made all the same."""

    def fails(workshop: rivals.Workshop) -> list[picture.Program]:
        workshop.run("building it", [sys.executable, "-c", "print('no compiler'); raise SystemExit(3)"])
        return []

    def full(workshop: rivals.Workshop) -> list[picture.Program]:
        raise OSError(28, "No space left on device")

    def full_of_weights(workshop: rivals.Workshop) -> list[picture.Program]:
        save_file({"a": torch.zeros(1)}, tmp_path / "no-folder" / "a.safetensors")
        return []

    other = _program("trillim", [])
    made = {"sdcpp": fails, "stock": full, "unpack": full_of_weights, "trillim": lambda workshop: [other]}
    monkeypatch.setattr(rivals, "RIVALS", made)
    assert rivals.programs_of(_workshop(tmp_path), []) == [other]
    printed = capsys.readouterr().out
    assert "sdcpp is left out: building it failed" in printed and "no compiler" in printed
    assert "stock is left out: [Errno 28] No space left on device" in printed and "unpack is left out: " in printed
    with pytest.raises(rivals.UnavailableError, match="building it failed"):
        _workshop(tmp_path).run("building it", [tmp_path / "no-such-program"])


def test_what_is_half_made_is_no_file(tmp_path: Path) -> None:
    def half(part: Path) -> None:
        part.write_bytes(b"1")
        raise rivals.UnavailableError("the disk is full")

    file = tmp_path / "folder" / "model.gguf"
    with pytest.raises(rivals.UnavailableError):
        _workshop(tmp_path).file(file, half)
    assert not file.exists()
    assert _workshop(tmp_path).file(file, lambda part: part.write_bytes(b"12")).read_bytes() == b"12"
    assert _workshop(tmp_path).file(file, half).read_bytes() == b"12"  # it is there


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_bundle_that_trillim_did_not_finish_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script stands in for Trillim, which is not installed where this runs: it breaks once in the middle."""
    monkeypatch.setattr(rivals, "trillim_programs", lambda workshop: tmp_path)
    monkeypatch.setattr(rivals, "write_unpacked", lambda workshop, folder: None)
    monkeypatch.setattr(rivals, "files_of", lambda ours, kind: {})
    program = tmp_path / "trillim"
    program.write_text(
        "#!/bin/sh\nbundle=$HOME/.trillim/models/Local/unpacked-TRNQ\n"
        f"if [ $1 = image ]; then test -f $bundle/done; exit; fi\n"
        f"echo made >> {tmp_path}/made; mkdir -p $bundle\n"
        f"[ -f {tmp_path}/again ] || {{ touch {tmp_path}/again; exit 1; }}\ntouch $bundle/done\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    with pytest.raises(rivals.UnavailableError, match="having Trillim quantize failed"):
        rivals.trillim(_workshop(tmp_path))
    for _ in range(2):
        small, rival = rivals.trillim(_workshop(tmp_path))
    assert (small.name, rival.name) == ("ours_small", "trillim") and rival.run()["whole_s"] > 0
    assert (tmp_path / "made").read_text(encoding="utf-8").splitlines() == ["made", "made"]


def test_sources_are_those_that_the_package_carries(tmp_path: Path) -> None:
    archive, folder = tmp_path / "package.tar.gz", tmp_path / "sources"
    for name, carried in (("package", "vendor/stable-diffusion.cpp"), ("other", "vendor/llama.cpp")):
        source = tmp_path / name / carried
        source.mkdir(parents=True)
        (source / "CMakeLists.txt").write_text("project(x)\n", encoding="utf-8")
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(tmp_path / name, name)
        if name == "package":
            rivals.unpack_sources(archive, folder)
            assert (folder / "CMakeLists.txt").is_file() and not (tmp_path / "part-sources").exists()
    with pytest.raises(rivals.UnavailableError, match=r"no vendor/stable-diffusion\.cpp"):
        rivals.unpack_sources(archive, tmp_path / "none")


def test_an_unpacked_file_has_the_values_of_the_packed_one(tmp_path: Path) -> None:
    packed, dense = tmp_path / "mlx.safetensors", tmp_path / "dense.safetensors"
    synthetic.write_mlx(packed, "ternary", synthetic.TINY)
    rivals.unpacked(packed, "transformer", dense)
    expected = read_weights(open_transformer(packed))
    found = read_weights(open_transformer(dense, mapped=False))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        values = weight.dequantize(torch.bfloat16) if isinstance(weight, PackedWeight) else weight
        dense_values = found[name]
        same = dense_values.dequantize(torch.bfloat16) if isinstance(dense_values, PackedWeight) else dense_values
        assert torch.equal(same, values), name


OWN_PAGES = """
import sys, time
import numpy, torch
from bonsai_ops.tools.bench import peaks

found = peaks.ProcessPeaks(every=1e-3)
before = found.own_peak()
numpy.memmap(sys.argv[1], mode="r").sum(dtype=numpy.int64)
time.sleep(0.1)
of_a_file = found.own_peak() - before
held = torch.ones(64 << 20, dtype=torch.uint8)
end = time.monotonic() + 30
while found.own_peak() - before < len(held) and time.monotonic() < end:
    time.sleep(1e-3)
del held
print(of_a_file, found.own_peak() - before)
"""


def test_own_pages_are_counted_apart(tmp_path: Path) -> None:
    """In a process of its own: this one may give back what other tests held, and 64 MiB more are no peak then."""
    if machine.own_rss() is None:
        pytest.skip("this system does not tell them apart")
    (tmp_path / "mapped").write_bytes(bytes(64 << 20))
    command = [sys.executable, "-c", OWN_PAGES, str(tmp_path / "mapped")]
    of_a_file, own = map(int, subprocess.check_output(command, cwd=PLUGIN, text=True, timeout=120).split())
    assert of_a_file < (16 << 20) and (64 << 20) <= own < (96 << 20)


@pytest.mark.parametrize("made", [peaks.ProcessPeaks, lambda: peaks.DevicePeaks(lambda: 0, SimpleNamespace())])
def test_nothing_looks_on_when_the_peaks_are_gone(made: Callable[[], peaks.Peaks]) -> None:
    """A thread that went on would open files and use a processor as long as the process lives."""
    if machine.own_rss() is None and made is peaks.ProcessPeaks:
        pytest.skip("this system does not tell: no thread is begun")
    before = set(threading.enumerate())
    found = made()
    (thread,) = set(threading.enumerate()) - before
    thread.join(0.05)
    assert thread.is_alive()
    del found
    thread.join(10)
    assert not thread.is_alive()


def _package(powercap: Path, number: str, name: str, microjoules: int) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 262_143_000_000)):
        (folder / file).write_text(f"{text}\n", encoding="ascii")
    return folder / "energy_uj"


def test_rapl_counts_packages_and_survives_a_wraparound(tmp_path: Path) -> None:
    first = _package(tmp_path, "0", "package-0", 262_140_000_000)
    second = _package(tmp_path, "1", "package-1", 5_000_000)
    _package(tmp_path, "0:0", "core", 7)
    _package(tmp_path, "2", "psys", 7)
    found = energy.find_energy("cpu", tmp_path)
    assert [counter.name for counter in found.counters] == ["package-0", "package-1"]
    before = found.read()
    first.write_text("2000000\n", encoding="ascii")
    second.write_text("6000000\n", encoding="ascii")
    assert found.between(before, found.read()) == pytest.approx(3 + 2 + 1)
    assert found.why_not is None


def test_no_counter_gives_one_line_why(tmp_path: Path) -> None:
    found = energy.find_energy("cpu", tmp_path)
    assert found.between(found.read(), found.read()) is None
    assert found.why_not and "\n" not in found.why_not


class Mark:
    """A CUDA event on a clock that the timed calls move on; milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Mark.now

    def elapsed_time(self, end: Mark) -> float:
        return end.at - self.at


def test_cuda_timer_rotates_over_copies_larger_than_l2() -> None:
    cuda = SimpleNamespace(Event=Mark, synchronize=lambda: None)
    measured = timer.CudaTimer(cuda, l2_bytes=50 << 20, repeats=4)
    assert measured.copies(9 << 20) == 12
    assert measured.copies(1 << 30) == 2
    used: list[int] = []

    def call(copy: int) -> None:
        used.append(copy)
        Mark.now += 3.0

    calls = [lambda copy=copy: call(copy) for copy in range(3)]
    assert timer.time_in_turns({"way": calls}, measured, rounds=2) == {"way": pytest.approx([3e-3, 3e-3])}
    assert used == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]


def test_peaks_of_a_device_are_this_processes_own() -> None:
    """What others take in a pause is theirs; torch's allocator is a second figure."""
    held, told = [700], []
    cuda = SimpleNamespace(max_memory_allocated=lambda: 5, reset_peak_memory_stats=lambda: None)

    def used() -> int:
        told.append(held[0])
        return told[-1]

    found = peaks.DevicePeaks(used, cuda, every=1e-4)
    held[0] = 1000
    assert (found.peak(), found.torch_peak()) == (300, 5)
    found.pause()
    held[0] = 9000
    assert found.peak() == 300
    found.resume()
    held[0] = 9500
    assert found.peak() == 800
    held[0] = 9100
    found.reset()
    assert found.peak() == 400
    held[0] = 9900  # the peak is seen between two calls too; at the second look the first is over
    end = time.monotonic() + 30
    while told.count(9900) < 2 and time.monotonic() < end:
        time.sleep(1e-3)
    held[0] = 9100
    assert found.peak() == 1200


def test_weights_are_made_where_they_are_asked_for() -> None:
    """The seed of a device; packed and dense weights of the same names and shapes as a file's."""
    devices: list[object] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if function in (torch.randn, torch.rand, torch.randint):
                devices.append((given.get("device"), given["generator"].device.type))
            return function(*args, **given)

    with Watch():
        synthetic.dense_weights(synthetic.TINY, device="cpu")
        synthetic.random_weight("trit5", 8, 128, "cpu")
        layers.activations(2, 128, "cpu")
    assert devices and all(torch.device(device).type == "cpu" == where for device, where in devices)


@pytest.mark.parametrize(("codec", "levels"), [("nibble", 16), ("byte", 256)])
def test_random_bytes_are_affine_codes(codec: str, levels: int) -> None:
    weight = synthetic.random_weight(codec, 83, 256, group_size=64)
    values = weight.dequantize(torch.float32)
    assert values.shape == (83, 256) and 0.3 < values.std() * 16 < 0.9 and abs(values.mean()) < 0.01
    assert len((values[:1, :64] / weight.scale[:1, :1].float()).round().unique()) <= levels


@pytest.mark.parametrize("codec", ["trit5", "crumb", "bit"])
def test_random_bytes_are_codes(codec: str) -> None:
    values = synthetic.random_weight(codec, 83, 256).dequantize(torch.float32).sign()
    assert values.shape == (83, 256)
    assert set(values.unique().tolist()) == ({-1.0, 1.0} if codec == "bit" else {-1.0, 0.0, 1.0})


def test_the_commit_is_that_of_the_plugin(tmp_path: Path) -> None:
    """Not of a repository around an unpacked archive; the same sources have the same name."""
    (tmp_path / "plugin" / "bonsai_ops").mkdir(parents=True)
    file = tmp_path / "plugin" / "bonsai_ops" / "a.py"
    file.write_bytes(b"x = 1\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=False)
    name = machine.revision(tmp_path / "plugin")
    file.write_bytes(b"x = 1\r\n")
    assert name.startswith("sources ") and machine.revision(tmp_path / "plugin") == name
    file.write_bytes(b"x = 2\n")
    assert machine.revision(tmp_path / "plugin") != name


def test_children_keep_the_packages_of_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of BONSAI_PACKAGES first, then those of PYTHONPATH; whatever folders the interpreter starts with."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which_one.py").write_text(f"NAME = '{name}'\n", encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "second"))
    code = "import runpy, sys, which_one; print(which_one.NAME)"
    found = []
    for packages in (None, tmp_path / "first"):
        if packages:
            monkeypatch.setenv("BONSAI_PACKAGES", str(packages))
        else:
            monkeypatch.delenv("BONSAI_PACKAGES", raising=False)
        command = [sys.executable, "-c", code]
        found.append(subprocess.check_output(command, env=inherited_environment(), text=True).strip())
    assert found == ["second", "first"]
    command = [*module_command("bonsai_ops.convert"), "--help"]
    command[1:1] = ["-I"]  # neither the working folder nor PYTHONPATH, as in the Windows portable build
    assert "usage" in subprocess.check_output(command, cwd=tmp_path, text=True)


def test_a_slow_moment_changes_no_ratio() -> None:
    assert timer.speed_ratio([1.0, 5.0, 1.0], [2.0, 10.0, 8.0]) == 2.0
    assert timer.spread([1.0, 1.2, 1.1]) == pytest.approx(0.2 / 1.1)


def test_a_busy_machine_is_timed_by_what_it_computes() -> None:
    """Time that passes while others have the processor counts for the wall alone."""
    calls = [lambda: time.sleep(0.2)]
    assert timer.make_timer("cpu").seconds(calls, 0) > 0.19
    assert timer.make_timer("cpu", "processor").seconds(calls, 0) < 0.1


def test_one_sentence_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        timer.make_timer("cuda")


def test_scratch_is_measured() -> None:
    def call() -> torch.Tensor:
        result = torch.empty(3_000_000, dtype=torch.uint8)
        torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        return result.add_(second[0])

    result, scratch = timer.run_with_scratch(call, "cpu")
    assert result.nbytes == 3_000_000
    assert 2_000_000 <= scratch < 2_001_000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return layers.measure(8, rounds=1, shapes=(layers.Shape(512, 640, 1, 1),))


def test_layers_rows(rows: list[dict]) -> None:
    assert {"m", "k", "n", "planes_vs_bf16", "trit5_vs_bf16", "a8_vs_bf16", "scratch_bytes"} <= set(rows[0])
    exact = [rows[0][f"{way}_error"] for way in ("trit5", "planes", "bit", "nibble", "byte")]
    assert max(exact) < 4e-3  # bf16 results
    assert rows[0]["nibble_bytes"] * 8 == 4.5 * 512 * 640 and rows[0]["byte_bytes"] * 8 == 8.25 * 512 * 640
    assert rows[0]["scratch_bytes"] == max(rows[0][f"{way}_scratch_bytes"] or 0 for way in layers.OURS)
    assert rows[0]["trit5_bytes"] < rows[0]["planes_bytes"] < rows[0]["bf16_bytes"] / 7
    assert rows[0]["gemlite_vs_bf16"] is None


def test_an_unknown_mode_is_a_mistake_not_a_gap() -> None:
    weight = layers.random_weight("ternary", 256, 256)
    with pytest.raises(ValueError, match="unknown"):
        layers.offers(torch.zeros(1, 256), weight, "a7")
    assert layers.offers(torch.zeros(1, 256), weight, kernels.EXACT) is None


def test_a_sweep_is_relative_to_one_picture_of_1536(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of all pictures of a batch count, and each group of the drawing tells how many there were."""
    monkeypatch.setattr(sweep, "SHAPES", (layers.Shape(256, 256, 20, 20),))
    rows = sweep.measure(rounds=1, cases=((2, 1536), (1, 4), (1, 1536)))
    assert [(row["batch"], row["m"]) for row in rows] == [(2, 1536), (1, 4), (1, 1536)]
    assert all(rows[2][f"{way.name}_relative"] == 1.0 for way in ways.LAYER_WAYS if f"{way.name}_s" in rows[2])
    assert rows[0]["bf16_us_per_token"] == pytest.approx(1e6 * rows[0]["bf16_s"] / 3072)
    assert rows[0]["trit5_vs_bf16"] == pytest.approx(rows[0]["bf16_s"] / rows[0]["trit5_s"])
    assert [head for head, _ in plot.sweep_panel(rows).groups] == ["2 times 1536 tokens", "4 tokens", "1536 tokens"]


STEP = {
    "size": 512,
    "ours_s": 30.0,
    "dense_bf16_s": 29.0,
    "dense_bf16_parts_s": 28.0,
    "stock_s": 73.0,
    "ours_bytes": 1,
    "dense_bf16_bytes": 2,
    "dense_bf16_parts_bytes": 2,
    "stock_bytes": 3,
}


def test_csv_columns_are_the_json_keys(rows: list[dict], tmp_path: Path) -> None:
    assert report.write_csv(tmp_path / "one.csv", {"layers": rows}) == [tmp_path / "one.csv"]
    with (tmp_path / "one.csv").open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert list(read[0]) == list(json.loads(json.dumps(rows))[0])
    assert float(read[0]["trit5_vs_bf16"]) == rows[0]["trit5_vs_bf16"]
    files = report.write_csv(tmp_path / "all.csv", {"layers": rows, "step": STEP, "machine": {"threads": 2}})
    assert [file.name for file in files] == ["all-layers.csv", "all-step.csv"]
    assert files[1].read_text(encoding="utf-8").splitlines()[0] == ",".join(STEP)


def test_plot_is_a_png(rows: list[dict], tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    parts = {"text_encoder_s": 1.0, "steps_s": 4.0, "vae_s": 2.0, "total_s": 7.0}
    figures = {"machine": {"threads": 2}, "layers": rows, "step": STEP, "picture": {"size": 512, "ours": parts}}
    size = plot.draw(file, figures)
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert image.size == size
        assert image.width == plot.WIDTH
        colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {ways.OURS, ways.OURS_2, ways.RIVAL} <= colours
    assert plot.draw(file, {"machine": {}}) is None


def test_profile_says_who_asked(tmp_path: Path) -> None:
    file = tmp_path / "host_code.py"
    file.write_text("import torch\n\n\ndef apply_mod(x):\n    return (x * 2).to(torch.bfloat16)\n", encoding="ascii")
    spec = importlib.util.spec_from_file_location("host_code", file)
    host_code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host_code)
    profile = StepProfile("cpu", {"ComfyUI": str(tmp_path)})
    with profile:
        host_code.apply_mod(torch.zeros(8))
        torch.zeros(8).add_(1)
    found = {(row["op"], row["kind"], row["cause"]): row for row in profile.rows()}
    assert found["aten.mul.Tensor", "modulation", "ComfyUI"]["place"] == "host_code.py:5 apply_mod"
    assert ("aten._to_copy", "modulation", "ComfyUI") in found
    assert ("aten.add_.Tensor", "residual and other elementwise", "other") in found


@pytest.mark.parametrize(
    ("op", "functions", "kind"),
    [
        ("bonsai.linear", [], "packed linear"),
        ("aten._scaled_dot_product_flash_attention_for_cpu", ["attention_pytorch"], "attention"),
        ("aten.mul.Tensor", ["SiLUActivation.forward"], "SwiGLU"),
        ("aten.linear", ["PackedLinear.forward"], "dense linear"),
        ("aten._to_copy", ["QKNorm.forward"], "cast"),
    ],
)
def test_kinds(op: str, functions: list[str], kind: str) -> None:
    assert kind_of(op, functions) == kind


def test_a_benchmark_is_listed_once() -> None:
    names = [benchmark.name for benchmark in table.BENCHMARKS]
    assert len(set(names)) == len(names) and set(table.USUAL) <= set(names)
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for benchmark in table.BENCHMARKS:
        arguments = parser.parse_args([f"--{benchmark.name}"])
        assert table.chosen(arguments) == [benchmark]
        assert f"--{benchmark.name} {benchmark.help}" in text
        assert set(benchmark.options) <= set(table.OPTIONS)
    assert {name for benchmark in table.BENCHMARKS for name in benchmark.options} == set(table.OPTIONS)
    assert [benchmark.name for benchmark in table.chosen(parser.parse_args([]))] == list(table.USUAL)
    assert "--rank RANK lora, train, recover: rank of the LoRA, or of the residual" in text


def test_the_command_line_reaches_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layers, "measure", lambda *given: [{"given": given}])
    monkeypatch.setattr(step, "measure", lambda *given: {"given": given})
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    table.add_arguments(parser)
    given = parser.parse_args(["--layers", "--tokens", "7", "--step", "--mode", "a8", "exact", "--layout", "fast"])
    found = [benchmark.measure(table.Run(given, tmp_path, tmp_path)) for benchmark in table.chosen(given)]
    assert found == [[{"given": (7, "cpu", 5)}], {"given": (tmp_path, tmp_path, 512, ["a8", "exact"], "fast", "cpu")}]


def test_a_training_is_as_long_as_its_time_and_memory_allow(tmp_path: Path) -> None:
    """Steps within the seconds that are given, none if one takes longer; memory grows with the square of the size."""
    assert [possible(budget, 10.0) for budget in (39.0, 41.0, 81.0, 1e6)] == [0, 1, 2, 3]
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    small, large = (needed(str(file), size, "cpu") for size in (512, 1024))
    assert 1e9 < small < 3e9 < large < 12e9 and needed(str(file), 512, "cuda") < small


def test_an_unknown_mode_of_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--mode a7 is unknown, expected some of exact"):
        step.measure(tmp_path, tmp_path, 64, ["a7"])


def test_every_way_of_a_step_is_drawn_in_its_own_name(tmp_path: Path) -> None:
    figures = {"size": 64} | {f"{w.name}_{key}": 1.0 for w in ways.STEP_WAYS for key in ("s", "bytes")}
    labels = [bar.label for _, bars in plot.step_panel(figures).groups for bar in bars]
    assert labels == [way.label for way in ways.STEP_WAYS] and len(set(labels)) == len(labels)
    assert "Bonsai Image, int8 activations" in labels


ENDED = """
import subprocess, sys
from types import SimpleNamespace
from bonsai_ops import bench
from bonsai_ops.tools.bench import table

def measure(run):
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        try:
            child.wait()
        finally:
            child.kill()

one = SimpleNamespace(alone=False, in_host=False, name="one", at_the_top=False, measure=measure)
table.chosen = lambda arguments: [one]
bench.main(["--threads", "1"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_what_is_measured_ends_with_the_benchmark() -> None:
    """A child that goes on would take the processors from whatever is measured next."""
    with subprocess.Popen([sys.executable, "-c", ENDED], stdout=subprocess.PIPE, text=True, cwd=PLUGIN) as run:
        child = next(int(line) for line in run.stdout if line.strip().isdigit())
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
