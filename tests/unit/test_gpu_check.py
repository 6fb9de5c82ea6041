"""The check of a GPU, run on a CPU: its command, its cheapest stages, what a second run does, and its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bonsai_ops.bench import main
from bonsai_ops.tools.bench import table
from bonsai_ops.tools.bench.gpu_check import drive, goals, project, results, stages, summary, unpack
from bonsai_ops.tools.bench.gpu_check.check import Check, Settings
from bonsai_ops.tools.environment import PLUGIN, find_comfyui_or_exit

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder_like_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is taken for a ComfyUI until something of it is imported."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "main.py").write_text("", encoding="utf-8")
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.0"\n', encoding="utf-8")
    return folder


def _arguments(folder: Path, comfyui: Path, *arguments: str) -> list[str]:
    folders = {"--comfyui": comfyui, "--out": folder / "out", "--work": folder / "work"}
    given = [str(part) for pair in folders.items() for part in pair]
    return ["--gpu-check", "--device", "cpu", *given, *arguments]


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, folder_like_comfyui: Path) -> tuple[Path, str]:
    """(folder, printed) of a run of two stages, by the command that a user types."""
    folder = tmp_path_factory.mktemp("first")
    command = [sys.executable, "-m", "bonsai_ops.bench"]
    command += _arguments(folder, folder_like_comfyui, "--stages", "env,speed")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_stage_writes_its_figures_down(first: tuple[Path, str]) -> None:
    folder, printed = first
    found = _read(folder)
    assert found["env"]["ended"] == found["speed"]["ended"] == "ok"
    assert found["env"]["torch"] == found["run"]["torch"] == torch.__version__
    assert found["run"]["comfyui"] == "0.30.0" and found["run"]["commit"]
    assert "GPU" in found["env"]["not measured"]
    assert {"bf16", "trit5", "crumb", "bit"} <= set(found["speed"]["m16 step_ms"])
    assert "> torch: " in printed
    assert "===== speed: ok" in (folder / "out" / "log.txt").read_text(encoding="utf-8")
    page = (folder / "out" / "summary.md").read_text(encoding="utf-8")
    assert "dry run on a CPU" in page and "| trit5 |" in page and "not measured" in page


def test_a_second_run_goes_on(
    first: tuple[Path, str], folder_like_comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it finds done it leaves out; a stage that was not, here one that fails without a ComfyUI, ends no other."""
    folder, _ = first
    before = _read(folder)
    assert main(_arguments(folder, folder_like_comfyui, "--stages", "compile,env,speed")) == 1
    printed, found = capsys.readouterr().out, _read(folder)
    assert "env: done before" in printed and "speed: done before" in printed
    assert "No module named 'comfy'" in printed and found["compile"]["ended"] == "exit 1"
    assert all(found[name] == figures for name, figures in before.items() if name != "run")
    assert "- compile: exit 1" in (folder / "out" / "summary.md").read_text(encoding="utf-8")
    assert main(_arguments(folder, folder_like_comfyui, "--stages", "compile,env", "--again", "--budget", "5")) == 0
    printed = capsys.readouterr().out
    assert "compile: left out, 5 s left" in printed and "env: left out, 5 s left" in printed


def test_figures_of_two_commits_are_not_mixed(tmp_path: Path) -> None:
    file, facts = tmp_path / "results.json", {"commit": "a", "device": "cuda", "gpu": "H100", "torch": "2.11"}
    results.Results(file, facts, False).add({"env": {"ended": "ok"}})
    assert results.Results(file, {**facts, "date": "later"}, False).has("env")
    with pytest.raises(SystemExit, match=r"results.json holds figures of commit a, not b: .* --again"):
        results.Results(file, {**facts, "commit": "b"}, False)
    assert not results.Results(file, {**facts, "commit": "b"}, True).has("env")
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not what a GPU check writes"):
        results.Results(file, facts, True)


def test_what_is_asked_wrongly_is_named(tmp_path: Path, folder_like_comfyui: Path) -> None:
    with pytest.raises(SystemExit, match="--stages dynamics is unknown, expected some of env,kernels"):
        main(_arguments(tmp_path, folder_like_comfyui, "--stages", "env,dynamics"))
    with pytest.raises(SystemExit, match=r"holds no ComfyUI \(no main.py\)"):
        main(_arguments(tmp_path, tmp_path))
    with pytest.raises(SystemExit, match="name a folder for them with --out"):
        main(["--gpu-check", "--comfyui", str(folder_like_comfyui)])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU that torch can use"):
            main([*_arguments(tmp_path, folder_like_comfyui), "--device", "cuda"])
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_python_without_torch_takes_comfyuis_own(tmp_path: Path, folder_like_comfyui: Path) -> None:
    """As a user's first Python does: nothing is prepared, nothing fetched."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
        "import subprocess; subprocess.Popen = lambda command, **_: sys.exit(' '.join(map(str, command))); "
        "from bonsai_ops.bench import main; main()"
    )
    own = folder_like_comfyui / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    given = ["--gpu-check", "--comfyui", str(folder_like_comfyui), "--out", str(tmp_path), "--stages", "env"]
    variables = {**os.environ, "BONSAI_HOME": str(tmp_path / "home")}
    probe = program.replace(
        "import subprocess;",
        "from bonsai_ops.tools.environment import own_comfyui as o; "
        "o._has_torch = lambda python: True; import subprocess;",
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *given], cwd=REPOSITORY, env=variables, capture_output=True, text=True
    )
    assert f"This Python has no torch: using {own}" in done.stderr
    assert done.stderr.strip().endswith(f"bonsai_ops.bench {' '.join(given)}")
    assert not (tmp_path / "home").exists()


def test_the_plugins_own_comfyui_is_found(
    tmp_path: Path, folder_like_comfyui: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONSAI_HOME", str(tmp_path))
    monkeypatch.delenv("BONSAI_COMFYUI", raising=False)
    monkeypatch.setenv("PWD", str(tmp_path))
    if not (PLUGIN.parents[1] / "main.py").is_file():
        with pytest.raises(SystemExit, match="lies in no ComfyUI's custom_nodes"):
            find_comfyui_or_exit()
        assert find_comfyui_or_exit(others=(folder_like_comfyui,)) == folder_like_comfyui
        monkeypatch.setenv("PWD", str(folder_like_comfyui / "custom_nodes" / "bonsai-image"))
        assert find_comfyui_or_exit() == folder_like_comfyui
    monkeypatch.setenv("BONSAI_COMFYUI", str(folder_like_comfyui))
    assert find_comfyui_or_exit() == folder_like_comfyui
    with pytest.raises(SystemExit, match="holds no ComfyUI"):
        find_comfyui_or_exit(tmp_path)


def test_every_process_has_its_module() -> None:
    folder = Path(unpack.__file__).parent
    for process in stages.PROCESSES.values():
        text = (folder / f"{process.module}.py").read_text(encoding="utf-8")
        assert "\ndef run(check: Check, " in text, process.name
    assert set(stages.USUAL) <= set(stages.STAGES)
    assert next(b for b in table.BENCHMARKS if b.name == "gpu-check").alone


def test_a_small_gpu_has_fewer_processes_at_once(tmp_path: Path) -> None:
    assert [drive._at_once({"gpu_memory": gb * 2**30}) for gb in (4, 8, 24, 80)] == [1, 1, 4, 14]
    assert drive._at_once({}) > 20


def test_what_fails_inside_a_stage_is_a_figure(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, REPOSITORY, "cpu")
    check = Check("kernels:paths", settings)
    with check.guarded("product"):
        raise RuntimeError("an illegal memory access")
    check.note("after", 1)
    assert settings.read("kernels:paths") == {"product FAILED": "RuntimeError: an illegal memory access", "after": 1}
    assert Settings.parse(json.loads(settings.text())) == settings


def _step(seconds: float, **more: float) -> dict[str, float]:
    return {"step_s": seconds, "first_s": 3.0, "device_peak_mb": 2100, "torch_peak_mb": 400, **more}


RUN = {
    "run": {"gpu": "NVIDIA H100", "driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc", "device": "cuda"},
    "kernels:trit5:exact": {"ended": "ok", "bad": []},
    "kernels:bit:a8": {"ended": "ok", "bad": [["own float16 (1, 1, 128)", 0.5]]},
    "speed": {"ended": "ok", "m1536 step_ms": {"bf16": 10.0, "trit5": 12.5}, "m64 step_ms": {"bf16": 2.0, "trit5": 1}},
    "seedling": {"ended": "ok", "psnr auto against fp32 on the CPU": {"text on": 0.01, "one or128x128": 41.5}},
    "dynamic": {
        "ended": "timed out",
        "ours 512": _step(0.1),
        "ours 1024": _step(0.4),
        "ours a8 512": _step(0.07),
        "dense 512": _step(0.097, device_peak_mb=9000),
        "dense 1024": _step(0.38),
        "lora 512": _step(0.105),
        "lora streamed == resident": 0.0,
    },
    "classic": {"ended": "ok", "ours 512": _step(0.1), "lora 512": _step(0.12), "classic == dynamic": 2e-6},
}


def test_the_goals_are_judged_by_the_figures() -> None:
    found = {o.text: (o.found, o.reached) for o in goals.outcomes(RUN)}
    assert found == {
        "kernels against float64, wrong cases": ("1", False),
        "exact, 1536 tokens, speed of dense bf16": ("0.97", True),
        "exact, 4608 tokens, speed of dense bf16": ("0.95", False),
        "int8 or fp8, 1536 tokens, speed of dense bf16": ("1.39", True),
        "int8 or fp8, 4608 tokens, speed of dense bf16": ("not measured", None),
        "first step after loading, compilation in it, s": ("3.0", True),
        "peak of the device's memory in a step at 512x512, GB": ("2.10", True),
        "a step with a LoRA of rank 16, of one without": ("1.20", False),
        "resident, offloaded and dynamic, distance": ("2.0e-06", False),
        "the seedling's pictures against the CPU's, dB": ("41.5", True),
    }
    assert {o.reached for o in goals.outcomes({})} == {None}


def test_the_page_shows_what_is_lost_too() -> None:
    page = summary.page(RUN)
    for words in ("NVIDIA H100", "driver 580", "triton 3.6", "commit abc"):
        assert words in page
    assert "| trit5 | 1.00 (2.00x) | 12.50 (0.80x) |" in page
    assert "| way | 64 tokens | 1536 tokens |" in page
    assert "| dynamic | ours | 1024 | 0.4000 | 0.95x | 3.0 | 2100 | 400 |" in page
    assert "- dynamic: timed out" in page and "- kernels:bit:a8: wrong: own float16 (1, 1, 128) 0.5" in page
    assert page.count("| FAIL |") == 4 and page.count("| pass |") == 5
    assert len(page.splitlines()) < 80


def test_missing_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no site\.tar\.xz and no comfyui\.tar\.xz"):
        unpack.main([str(tmp_path)])


def test_an_archive_has_no_tests_to_run(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, tmp_path / "archive", "cpu")
    project.run(Check("tests", settings), "tests")
    assert "clone the repository" in settings.read("tests")["not measured"]
