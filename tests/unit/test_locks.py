"""What the tests install is taken by hash where the locks hold, by version elsewhere. Real pip, no network."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from pathlib import Path

import pytest
from renew_pins import lock_lines, parts_of

from bonsai_ops.tools import environment
from bonsai_ops.tools.environment import locks, pins, steps

LINE = re.compile(r"([a-z0-9-]+)==([\w.]+)(; python_version [^-]+)?( --hash=sha256:[0-9a-f]{64})+")
WANTED = {"tools": pins.TEST_REQUIREMENTS, "newer": (*pins.NEWEST_PACKAGES, *pins.MANAGER_REQUIREMENTS)}
WANTED["archive"] = (*pins.ARCHIVE_PACKAGES, *pins.ARCHIVE_REQUIREMENTS)


def on(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, libc: str, python: tuple[int, ...]) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.36" if libc else ""))
    monkeypatch.setattr(sys, "version_info", python)


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("python", locks.PYTHONS)
def test_a_lock_holds_every_pin_and_nothing_without_a_hash(
    name: str, python: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "linux", "x86_64", "glibc", (*python, 1))
    lines, options = locks.locked(name, WANTED[name])
    assert options == ("--no-deps",) and all(LINE.fullmatch(line) for line in lines), lines
    held = {LINE.fullmatch(line)[1]: LINE.fullmatch(line)[2] for line in lines}
    for requirement in WANTED[name]:
        if "==" not in requirement:
            assert re.sub(r"[-_.]+", "-", requirement).lower() in held
            continue
        pinned, version, marker = parts_of(requirement)
        if "darwin" not in marker and '< "3.11"' not in marker:
            assert held[pinned.partition("[")[0]] == version, f"{requirement}: python -m tests.renew_pins --locks"


@pytest.mark.parametrize(
    "place",
    [
        ("darwin", "x86_64", "", (3, 11, 1)),
        ("win32", "x86_64", "", (3, 11, 1)),
        ("linux", "aarch64", "glibc", (3, 11, 1)),
        ("linux", "x86_64", "", (3, 11, 1)),  # musl
        ("linux", "x86_64", "glibc", (3, 10, 9)),
        ("linux", "x86_64", "glibc", (3, 14, 0)),
    ],
)
def test_elsewhere_versions_are_pinned(
    place: tuple[str, str, str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, *place)
    assert locks.locked("tools", ("a==1",)) == (("a==1",), ())


def test_the_archive_has_no_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, "linux", "x86_64", "glibc", (3, 11, 1))
    monkeypatch.setattr(locks, "FOLDER", tmp_path)
    assert locks.locked("tools", ("a==1",)) == (("a==1",), ())


@pytest.mark.parametrize("kind", ["step", "folder"])
def test_another_file_than_the_locked_one_is_not_installed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONSAI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(steps, "interpreter", lambda env: Path(sys.executable))
    with zipfile.ZipFile(tmp_path / "bonsai_x-1-py3-none-any.whl", "w") as wheel:
        for file, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: bonsai-x\nVersion: 1\n"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
        ):
            wheel.writestr(f"bonsai_x-1.dist-info/{file}", text)
    environment.environment_path().mkdir(parents=True)
    line, folder = f"bonsai-x==1 --hash=sha256:{'0' * 64}", environment.newest_packages_path()
    step = (
        steps.pip_step("x", "x", lambda: [line], "--no-deps", "--target", str(folder))
        if kind == "step"
        else steps.folder_step("x", folder, [line])
    )
    with pytest.raises(environment.SetupError, match="a download is not the expected file"):
        steps.perform(step, "x")
    assert not step.is_done() and not folder.exists()


def test_a_line_has_the_files_of_all_pythons_and_says_which_need_it() -> None:
    both, one = {"a": ("1", {"f"}), "b": ("2", {"c", "d"})}, {"a": ("1", {"e"})}
    assert lock_lines({(3, 11): both, (3, 12): one}) == [
        "a==1 --hash=sha256:e --hash=sha256:f",
        'b==2; python_version == "3.11" --hash=sha256:c --hash=sha256:d',
    ]
    with pytest.raises(SystemExit, match=r"a: no version for all Pythons, but 1, 2"):
        lock_lines({(3, 11): both, (3, 12): {"a": ("2", {"e"})}})
