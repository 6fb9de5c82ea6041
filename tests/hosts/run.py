"""Runs the tests of some parts on one host, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bonsai_ops.tools.environment import PLUGIN, clean_environment, comfyui_version, home

from .report import Column, Outcome, outcomes_of

PACKAGES = {
    "comfy-kitchen": "comfy-kitchen",
    "comfy-aimdo": "comfy-aimdo",
    "frontend": "comfyui-frontend-package",
    "manager": "comfyui-manager",
    "torch": "torch",
}
"""{column of the report: distribution}."""
VERSIONS_OF = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""
TAIL = 30
"""Lines of the output of a run that came to nothing."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder, and a folder of packages that come before those of the environment."""

    name: str
    comfyui: Path
    packages: Path | None = None

    def versions(self, python: Path) -> dict[str, str]:
        """{column: version} of ComfyUI and PACKAGES."""
        modules = {"PYTHONPATH": str(self.packages)} if self.packages else {}
        command = [str(python), "-c", VERSIONS_OF, *PACKAGES.values()]
        done = subprocess.run(
            command, env=clean_environment(modules), capture_output=True, encoding="utf-8", check=True
        )
        found = json.loads(done.stdout)
        return {"ComfyUI": comfyui_version(self.comfyui), **{column: found[name] for column, name in PACKAGES.items()}}

    def run(self, parts: Mapping[str, Sequence[str]], python: Path) -> Column:
        """What became of the tests of each part."""
        named = {part: [self._filled(test) for test in tests] for part, tests in parts.items()}
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bonsai-hosts-") as temporary:
            report = Path(temporary) / "report.xml"
            command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
            command += [f"--junitxml={report}", f"--basetemp={Path(temporary) / 'tests'}"]
            command += dict.fromkeys(test for tests in named.values() for test in tests)
            done = subprocess.run(
                command,
                cwd=PLUGIN,
                env=self._variables(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            outcomes = outcomes_of(report.read_text("utf-8") if report.is_file() else "<testsuites/>", named)
        seconds = time.monotonic() - started
        explained = done.returncode == 0 or (done.returncode == 1 and _any_failed(outcomes))
        error = "" if explained else "\n".join(done.stdout.splitlines()[-TAIL:])
        return Column(self.name, self.versions(python), outcomes, seconds, error)

    def _filled(self, test: str) -> str:
        version, folder = comfyui_version(self.comfyui), self.comfyui.name
        return test.replace("{version}", version).replace("{folder}", folder)

    def _variables(self) -> dict[str, str]:
        kept = {name: value for name, value in clean_environment().items() if name != "BONSAI_PACKAGES"}
        kept |= {"BONSAI_PACKAGES": str(self.packages)} if self.packages else {}
        kept |= {"BONSAI_HOME": str(home()), "BONSAI_COMFYUI": str(self.comfyui)}
        return {**kept, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _any_failed(outcomes: Mapping[str, Outcome]) -> bool:
    return any(outcome.failed for outcome in outcomes.values())
