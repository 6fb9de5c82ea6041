"""The kit for the first minutes on a GPU, run on a CPU: its driver and its cheapest stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bonsai_ops.tools.bench.gpu_check import project, stages, unpack
from bonsai_ops.tools.bench.gpu_check.check import Check, Settings, packed, relative

REPOSITORY = Path(__file__).resolve().parents[2]


def _run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bonsai_ops.tools.bench.gpu_check", "--device", "cpu", "--out", tmp_path / "out"]
    command += ["--work", tmp_path / "work", *arguments]
    return subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)


def test_a_stage_writes_its_figures_down(tmp_path: Path) -> None:
    done = _run(tmp_path, "--stages", "env,speed")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["env"]["ended"] == results["speed"]["ended"] == "ok"
    assert results["env"]["torch"] == torch.__version__
    assert "GPU" in results["env"]["not measured"]
    assert {"bf16", "trit5", "crumb", "bit"} <= set(results["speed"]["m16 step_ms"])
    assert "> torch: " in done.stdout
    assert "===== speed: ok" in (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")


def test_a_stage_that_fails_ends_no_other(tmp_path: Path) -> None:
    done = _run(tmp_path, "--stages", "compile,env", "--comfyui", str(tmp_path))
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["compile"]["ended"] == "exit 1" and results["env"]["ended"] == "ok"
    assert done.returncode == 1 and "No module named 'comfy'" in done.stdout


def test_a_stage_without_time_is_left_out(tmp_path: Path) -> None:
    done = _run(tmp_path, "--stages", "env", "--budget", "5")
    assert done.returncode == 0 and "env: left out, 5 s left" in done.stdout


def test_every_process_has_its_module() -> None:
    folder = Path(unpack.__file__).parent
    for process in stages.PROCESSES.values():
        text = (folder / f"{process.module}.py").read_text(encoding="utf-8")
        assert "\ndef run(check: Check, " in text, process.name
    assert set(stages.USUAL) <= set(stages.STAGES)


def test_what_fails_inside_a_stage_is_a_figure(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, REPOSITORY, "cpu")
    check = Check("kernels:paths", settings)
    with check.guarded("product"):
        raise RuntimeError("an illegal memory access")
    check.note("after", 1)
    assert settings.read("kernels:paths") == {"product FAILED": "RuntimeError: an illegal memory access", "after": 1}


@pytest.mark.parametrize("codec", ["trit5", "crumb", "bit"])
def test_random_bytes_are_codes(codec: str) -> None:
    weight = packed(83, 256, codec, "cpu")
    values = weight.dequantize(torch.float32).sign()
    assert values.shape == (83, 256)
    assert set(values.unique().tolist()) == ({-1.0, 1.0} if codec == "bit" else {-1.0, 0.0, 1.0})
    assert relative(values, values) == 0


def test_missing_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no site\.tar\.xz and no comfyui\.tar\.xz"):
        unpack.main([str(tmp_path)])


def test_an_archive_has_no_tests_to_run(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, tmp_path / "archive", "cpu")
    project.run(Check("tests", settings), "tests")
    assert "clone the repository" in settings.read("tests")["not measured"]
