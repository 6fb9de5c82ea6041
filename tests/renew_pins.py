"""Newer versions of what the tests install: python -m tests.renew_pins.

Prints the newest version of each package of `TEST_REQUIREMENTS`, and lines with hashes for
`TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES` of bonsai_ops/tools/environment/pins.py. Nothing is changed or installed; pip
asks the configured package index and downloads the latter into a folder that is deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bonsai_ops.tools.environment import ensure_or_exit
from bonsai_ops.tools.environment.pins import TEST_REQUIREMENTS, TEST_REQUIREMENTS_WITHOUT_DEPENDENCIES


def parts_of(requirement: str) -> tuple[str, str, str]:
    """(name with extras, version, marker or "") of a pinned requirement."""
    name, version, marker = re.fullmatch(r"([\w.\[\]-]+)==([\w.]+)(?:; (.*?))?(?: --hash=\S+)*", requirement).groups()
    return name, version, marker or ""


def main(argv: Sequence[str]) -> int:
    """Prints; returns the exit code."""
    argparse.ArgumentParser(prog="python -m tests.renew_pins", description=__doc__.split("\n")[0]).parse_args(argv)
    python = str(ensure_or_exit(tests=True).python)
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
    return 0


def _pip(python: str, *arguments: str) -> str:
    line = [python, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
