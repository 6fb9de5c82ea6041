"""Newer versions of what the tests install: python -m tests.renew_pins [--locks].

Prints the newest version of each package of `TEST_REQUIREMENTS`, and lines with hashes for
`TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES` of bonsai_ops/tools/environment/pins.py. With --locks: writes tests/locks/, the
hashes of every package that the tests add to ComfyUI's own, as the pins of that file and this environment have them;
what that lacks of the pins is installed into it first. pip asks the configured package index.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bonsai_ops.tools.environment import (
    PLUGIN,
    clean_environment,
    ensure_or_exit,
    environment_path,
    newest_packages_path,
    run_attached,
)
from bonsai_ops.tools.environment.comfyui_download import comfyui_requirements
from bonsai_ops.tools.environment.locks import FOLDER, PYTHONS
from bonsai_ops.tools.environment.pins import (
    ARCHIVE_PACKAGES,
    ARCHIVE_REQUIREMENTS,
    MANAGER_REQUIREMENTS,
    NEWEST_PACKAGES,
    TEST_REQUIREMENTS,
    TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES,
    TORCH_REQUIREMENTS,
    TORCHAUDIO_REQUIREMENTS,
)

HEAD = "# Linux on x86-64, Python {} to {}. Written by python -m tests.renew_pins --locks: do not change by hand.\n"
GLIBCS = (17, 28, 36, 45)
"""Minor versions of the C library: pip takes the newest build that the system can run."""
Packages = dict[str, tuple[str, set[str]]]
"""{normalized name: (version, sha256 of its files)}"""


def parts_of(requirement: str) -> tuple[str, str, str]:
    """(name with extras, version, marker or "") of a pinned requirement."""
    name, version, marker = re.fullmatch(r"([\w.\[\]-]+)==([\w.]+)(?:; (.*?))?(?: --hash=\S+)*", requirement).groups()
    return name, version, marker or ""


def main(argv: Sequence[str]) -> int:
    """Prints, or writes the locks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.renew_pins", description=__doc__.split("\n")[0])
    parser.add_argument("--locks", action="store_true", help="write tests/locks/ for the pins as they are")
    arguments = parser.parse_args(argv)
    python = ensure_or_exit(tests=True).python
    if not arguments.locks:
        _print_newer(str(python))
        return 0
    if Path(sys.prefix) != python.parent.parent:  # what asks for what is read from the environment itself
        return run_attached([str(python), "-m", "tests.renew_pins", *argv], clean_environment(), cwd=PLUGIN)
    _pip(sys.executable, "install", "--quiet", *TEST_REQUIREMENTS)  # a new pin brings what it asks for
    _write_locks()
    return 0


def _print_newer(python: str) -> None:
    for requirement in TEST_REQUIREMENTS:
        name, version, _ = parts_of(requirement)
        said = _pip(python, "index", "versions", name.partition("[")[0])
        print(f"{name}: {version} is pinned, {said.split('(', 1)[-1].split(')')[0]} is the newest")
    for requirement in TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES:
        name, _, marker = parts_of(requirement)
        with tempfile.TemporaryDirectory() as folder:
            _pip(python, "download", "--quiet", "--no-deps", "--dest", folder, name)
            (file,) = Path(folder).iterdir()
            digest, version = hashlib.sha256(file.read_bytes()).hexdigest(), file.name.split("-")[1]
        marker = f"; {marker}" if marker else ""
        print(f"{name}=={version.removesuffix('.tar.gz')}{marker} --hash=sha256:{digest}")


def _write_locks() -> None:
    comfyui = {name for python in PYTHONS for name in asked_for(_own_of_comfyui(), python)}
    tools = {python: _without(asked_for(TEST_REQUIREMENTS, python), comfyui) for python in PYTHONS}
    newer = _held(newest_packages_path(), NEWEST_PACKAGES, MANAGER_REQUIREMENTS)
    archive = _held(environment_path() / "comfy-cli", ARCHIVE_PACKAGES, ARCHIVE_REQUIREMENTS)
    FOLDER.mkdir(exist_ok=True)
    head = HEAD.format(*(".".join(map(str, python)) for python in (PYTHONS[0], PYTHONS[-1])))
    for name, wanted in (("tools", tools), ("newer", newer), ("archive", archive)):
        lines = lock_lines({python: _looked_up(python, list(lines.values())) for python, lines in wanted.items()})
        (FOLDER / f"{name}.txt").write_text(head + "\n".join((*lines, "")), "ascii", newline="\n")
        print(f"{FOLDER / name}.txt: {len(lines)} packages")


def _own_of_comfyui() -> list[str]:
    return [*TORCH_REQUIREMENTS, *TORCHAUDIO_REQUIREMENTS, *comfyui_requirements()]


def _held(folder: Path, pinned: Iterable[str], names: Iterable[str]) -> dict[tuple[int, int], dict[str, str]]:
    """{Python version: {normalized name: requirement}} of a folder; what has no pin is taken as it is there now."""
    held = {_normal(found.name): found.version for found in importlib.metadata.distributions(path=[str(folder)])}
    lines = (*pinned, *(f"{name}=={held[_normal(name)]}" for name in names))
    return {python: {_normal(line.partition("==")[0]): line for line in lines} for python in PYTHONS}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _without(lines: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: line for name, line in lines.items() if name not in set(names)}


def asked_for(requirements: Iterable[str], python: tuple[int, int]) -> dict[str, str]:
    """{normalized name: "name==version"} of all that requirements ask for on Linux with a Python version.

    Versions are those of this environment. What only another Python needs is not in it: that is "name" alone.
    """
    from packaging.requirements import Requirement

    dotted = ".".join(map(str, python))
    found: dict[str, str] = {}
    open_ones = [(Requirement(line), "") for line in requirements]
    while open_ones:
        wanted, extra = open_ones.pop()
        place = {"extra": extra, "python_version": dotted, "python_full_version": f"{dotted}.0"}
        if wanted.marker is not None and not wanted.marker.evaluate(place):
            continue
        name = _normal(wanted.name)
        try:
            held = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = str(wanted.name)
            continue
        asked = [Requirement(line) for line in held.requires or []]
        if name not in found:
            found[name] = f"{wanted.name}=={held.version}"
            open_ones += [(line, "") for line in asked]
        open_ones += [(line, e) for line in asked for e in wanted.extras if "extra" in str(line.marker or "")]
    return found


def _looked_up(python: tuple[int, int], lines: Sequence[str]) -> Packages:
    """The files that pip takes by different ages of the C library; each package must be there at one of them."""
    found: Packages = {}
    for glibc in GLIBCS:
        try:
            told = [_resolved(python, glibc, lines)]
        except LookupError:  # some need a newer one
            told = []
            for line in lines:
                with contextlib.suppress(LookupError):
                    told.append(_resolved(python, glibc, [line]))
        for name, version, digest in (one for packages in told for one in packages):
            held = found.setdefault(name, (version, set()))
            if held[0] != version:
                raise SystemExit(f"{name}: {held[0]} and {version} are taken by different C libraries; pin one.")
            held[1].add(digest)
    missing = {_normal(line.partition("==")[0]) for line in lines} - set(found)
    if missing:
        raise SystemExit(f"The index has no file of {', '.join(sorted(missing))} for Python {python}.")
    return found


def _resolved(python: tuple[int, int], glibc: int, lines: Iterable[str]) -> list[tuple[str, str, str]]:
    """[(name, version, sha256 of the file that pip takes)]. Raises LookupError if a package has none."""
    old = {17: "manylinux2014_x86_64", 12: "manylinux2010_x86_64", 5: "manylinux1_x86_64"}
    platforms = [p for n in range(glibc, 4, -1) for p in (f"manylinux_2_{n}_x86_64", old.get(n)) if p]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        line = ["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
        line += ["--python-version", ".".join(map(str, python)), "--target", folder, "--report", str(report)]
        line += [part for platform in (*platforms, "linux_x86_64") for part in ("--platform", platform)]
        _pip(sys.executable, *line, *lines)
        packages = json.loads(report.read_text("utf-8"))["install"]
    return [
        (
            _normal(one["metadata"]["name"]),
            one["metadata"]["version"],
            one["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for one in packages
    ]


def lock_lines(looked_up: Mapping[tuple[int, int], Packages]) -> list[str]:
    """Lines for pip, a package each: the files of all Python versions, and a marker where some do not need it."""
    lines = []
    for name in sorted({name for packages in looked_up.values() for name in packages}):
        users = {python: packages[name] for python, packages in looked_up.items() if name in packages}
        versions = {version for version, _ in users.values()}
        if len(versions) > 1:
            raise SystemExit(f"{name}: no version for all Pythons, but {', '.join(sorted(versions))}.")
        marker = ""
        if len(users) < len(looked_up):
            marker = "; " + " or ".join(f'python_version == "{major}.{minor}"' for major, minor in users)
        hashes = sorted({digest for _, digests in users.values() for digest in digests})
        lines.append(" ".join((f"{name}=={versions.pop()}{marker}", *(f"--hash=sha256:{digest}" for digest in hashes))))
    return lines


def _pip(python: str, *arguments: str) -> str:
    line = [python, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        kind = LookupError if "No matching distribution" in done.stderr else SystemExit
        raise kind(done.stderr[-2000:])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
