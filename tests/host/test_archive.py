"""The archive as comfy-cli packs it for the registry: checked by its own rules, unpacked into a ComfyUI, and run.

comfy-cli lies in a folder of its own beside the environment; it is fetched here, and what needs it is left out where it
cannot be had.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from released import RELEASED

from bonsai_ops.tools.environment import NEWEST, PLUGIN_NAME, SetupError, comfyui_path, environment_path
from bonsai_ops.tools.environment.locks import locked
from bonsai_ops.tools.environment.pins import ARCHIVE_PACKAGES, ARCHIVE_REQUIREMENTS
from bonsai_ops.tools.environment.processes import clean_environment
from bonsai_ops.tools.environment.steps import folder_step
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import to_api

pytestmark = [pytest.mark.host, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 16_000_000
"""Of the archive."""


class Comfy:
    """Runs the tool, with a home of its own and no word to anybody."""

    def __init__(self, packages: Path, home: Path) -> None:
        variables = {"PYTHONPATH": str(packages), "HOME": str(home), "USERPROFILE": str(home)}
        self.environment = clean_environment({**variables, "DO_NOT_TRACK": "1", "PYTHONIOENCODING": "utf-8"})

    def __call__(self, folder: Path, *arguments: str) -> tuple[str, str]:
        """What `comfy ARGUMENTS` says in a folder, and what on standard error. Fails if it fails."""
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    packages = environment_path() / "comfy-cli"
    step = folder_step("comfy-cli", packages, locked("archive", (*ARCHIVE_PACKAGES, *ARCHIVE_REQUIREMENTS))[0])
    if not step.is_done():
        try:
            step.run(lambda: None)
        except SetupError as error:
            pytest.skip(f"no comfy-cli here: {error}")
    return Comfy(packages, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git has of the repository, or is about to have."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("comfy-cli packs what git has: this is no clone, or git is missing")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def clone(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of those files as they are."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def archive(comfy: Comfy, clone: Path) -> Path:
    comfy(clone, "node", "pack")
    return clone / "node.zip"


@pytest.fixture(scope="module")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI into which the archive was unpacked."""
    base = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(base / "custom_nodes" / PLUGIN_NAME)
    with ComfyServer(Path(sys.executable), comfyui_path(NEWEST), base) as started:
        yield started


def test_the_registry_takes_it(comfy: Comfy, clone: Path) -> None:
    said = "\n".join(comfy(clone, "node", "validate"))
    assert "All validation checks passed" in said and not re.search("warn|error", said, re.IGNORECASE), said


def test_the_archive_is_what_is_published(archive: Path, tracked: list[str]) -> None:
    """Small, with nothing that .comfyignore lists and everything else."""
    ignored = [line.strip("/") for line in (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").split()]
    dots = tuple(line.rstrip("*") for line in ignored if line.endswith("*"))
    kept = {n for n in tracked if not n.startswith(dots) and not any(n == i or n.startswith(f"{i}/") for i in ignored)}
    with zipfile.ZipFile(archive) as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == kept
    assert archive.stat().st_size < MOST_BYTES


def test_the_unpacked_archive_draws(comfy: Comfy, server: ComfyServer, tmp_path: Path) -> None:
    """All nodes are there, and `comfy run` draws the first run with the model that the archive brings."""
    for name in RELEASED:
        assert server.object_info(name)[name]["python_module"] == f"custom_nodes.{PLUGIN_NAME}"
    unpacked = server.base_directory / "custom_nodes" / PLUGIN_NAME
    first, *_ = sorted((unpacked / "workflows").glob("*.json"))
    saved = json.loads(first.read_text(encoding="utf-8"))
    file = tmp_path / "bonsai_first_run_api.json"
    file.write_text(json.dumps(to_api(saved, server.object_info())), encoding="utf-8")
    where = ("--host", "127.0.0.1", "--port", str(server.port))
    said, _ = comfy(tmp_path, "--json", "run", "--workflow", file.name, *where, "--wait")
    answer = json.loads(said.strip().splitlines()[-1])
    assert answer["ok"] and answer["data"]["status"] == "completed", said
    (entry,) = server.get("/history").values()
    (picture,) = server.images(entry)
    assert picture.is_file() and picture.name in answer["data"]["outputs"][0]
    assert not re.search(r"(?i)traceback|\[error\]", server.log.read_text(encoding="utf-8", errors="replace"))
