"""What is told of torch's threads, from made-up trees of Linux's files and on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bonsai_ops.kernels import threads
from bonsai_ops.kernels.threads import Processors, find_processors, misfit

REPOSITORY = Path(__file__).resolve().parents[2]
Tree = Callable[[Mapping[str, str]], Path]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*threads.ASKED, *threads.BINDING):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A function from {file below the root: text} to the root."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="ascii")
        return tmp_path

    return write


def cores(siblings: list[str], **values: list[int]) -> dict[str, str]:
    """The files of processors 0, 1 ..: who shares a core with each, and values such as cpu_capacity."""
    top = "sys/devices/system/cpu/cpu"
    files = {f"{top}{i}/topology/thread_siblings_list": f"{text}\n" for i, text in enumerate(siblings)}
    for name, each in values.items():
        files |= {f"{top}{i}/{name.replace('__', '/')}": f"{value}\n" for i, value in enumerate(each)}
    return files


def test_cores_are_counted_once_and_only_those_that_may_be_used(tree: Tree) -> None:
    """Four cores with two threads each."""
    root = tree(cores(["0,4", "1,5", "2,6", "3,7"] * 2))
    assert find_processors(root, range(8)) == Processors(8, 4)
    assert find_processors(root, {0, 4, 5}) == Processors(3, 2)
    assert find_processors(root, {0, 9}) == Processors(2)


def test_nothing_is_known_of_an_empty_tree(tmp_path: Path) -> None:
    assert find_processors(tmp_path, range(2)) == Processors(2)
    assert misfit(1, Processors()) is None and misfit(64, Processors()) is None


@pytest.mark.parametrize(
    ("groups", "files", "time"),
    [
        ("0::/", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "800000 100000"}, 1.5),
        ("0::/../../a", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "nonsense"}, None),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
            4.0,
        ),
        ("2:cpu:/docker/x\n0::/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:cpuset:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, None),
        ("no groups", {"cpu.max": "100000 0"}, None),
    ],
)
def test_time_that_control_groups_allow(groups: str, files: Mapping[str, str], time: float | None, tree: Tree) -> None:
    """The least of a group and those around it, version 1 and 2."""
    root = tree({"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})
    assert find_processors(root, range(8)).time == time


@pytest.mark.parametrize(
    ("values", "speeds"),
    [
        ({"cpu_capacity": [1024, 300, 1024, 300]}, (1024, 1024, 300, 300)),
        ({"cpu_capacity": [1024] * 4}, ()),
        ({"cpu_capacity": [1024, 300]}, ()),
        ({"cpu_capacity": [1024] * 4, "cpufreq__cpuinfo_max_freq": [3, 5, 5, 3]}, (5, 5, 3, 3)),
    ],
)
def test_speeds_of_unlike_cores(values: Mapping[str, list[int]], speeds: tuple[int, ...], tree: Tree) -> None:
    root = tree(cores(["0", "1", "2", "3"], **values))
    assert find_processors(root, range(4)).speeds == speeds


UNLIKE = (1024, 800, 800, 800, 300, 300, 300, 300)


@pytest.mark.parametrize(
    ("number", "found", "why", "cure"),
    [
        (32, Processors(64, 32, 2.0), "allowed the time of 2 processors", 2),
        (32, Processors(64, 32, 1.0), "allowed the time of 1 processor:", 1),
        (32, Processors(64, 32, 1.5), "allowed the time of 1.5 processors", 2),
        (2, Processors(64, 32, 1.5), None, 0),
        (8, Processors(time=4.0), "allowed the time of 4 processors", 4),
        (8, Processors(4), "may run on 4 processors", 4),
        (9, Processors(8, 4), "may run on 8 processors", 4),
        (8, Processors(8, 4), None, 0),
        (4, Processors(8, 4), None, 0),
        (1, Processors(8, 4), "there are 4 cores: ", 4),
        (1, Processors(8, 4, 1.0), None, 0),
        (1, Processors(2, 1), None, 0),
        (1, Processors(8), None, 0),
        (8, Processors(8, 8, None, UNLIKE), "slow cores", 4),
        (4, Processors(8, 8, None, UNLIKE), None, 0),
        (8, Processors(8, 8, None, (1024,) * 4 + (540,) * 4), None, 0),
        (4, Processors(8, 8, 4.0, UNLIKE), None, 0),
    ],
)
def test_what_speaks_against_a_number(number: int, found: Processors, why: str | None, cure: int) -> None:
    told = misfit(number, found)
    assert told is None if why is None else why in told and told.endswith(f"start ComfyUI with OMP_NUM_THREADS={cure}")


def test_the_variable_that_is_obeyed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL_NUM_THREADS is stronger where both are set."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (
        misfit(1, Processors(8, 4))
        == "there are 4 cores and OMP_NUM_THREADS is 1: start ComfyUI with OMP_NUM_THREADS=4"
    )
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert "MKL_NUM_THREADS is 1: start ComfyUI with MKL_NUM_THREADS=4" in misfit(1, Processors(8, 4))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system tells no affinity")
def test_a_thread_that_openmp_bound_is_not_taken_for_the_process() -> None:
    """With OMP_PROC_BIND this thread may run on one processor, all of torch's threads together on more."""
    code = (
        "import torch, os; from bonsai_ops.kernels import threads;"
        "torch.ones(9, 9) @ torch.ones(9, 9); print(threads.find_processors().processors, threads.threads_told()[1])"
    )
    said = {}
    for bound in ("", "true"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"OMP_PROC_BIND": bound}
        child = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        said[bound] = child.stdout.split()
    assert said[""] == [str(len(os.sched_getaffinity(0))), "None"] and said["true"] == ["None", "None"]
