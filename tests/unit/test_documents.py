"""The pages for readers name what is there: links, pictures, commands, options, nodes; and README is short."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs/architecture.md", "docs/benchmarks.md", "docs/machines.md", "docs/scripting.md", "docs/trust.md"),
)
ROOT = {
    *("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("bonsai_ops", "nodes", "locales", "web", "workflows", "subgraphs", "docs", "machines", "tests", "training"),
}
"""What the root may hold beside hidden files: one who opens the repository reads this list first."""
NOT_OURS = {".pytest_cache", "__pycache__", "venv", "build", "dist", "node_modules"}
SOURCE_ONLY = "\n## In the source repository only\n"
"""README's heading of what does not work from the published archive."""
LINK = re.compile(r"\]\(([^)\s#]+)\)")
COMMAND = re.compile(r"python -m ((?:bonsai_ops|machines|tests|training)[\w.]*)((?: +[^`|\n]+)?)")
MOST_LINES = 200

each_page = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    """Paths of the relative ones: pictures and pages."""
    return [unquote(link) for link in LINK.findall(text) if "://" not in link]


@functools.cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, f"there is no {module}: {done.stderr}"
    return done.stdout


def left_out(path: str) -> bool:
    """Whether .comfyignore keeps a file of the repository out of the published archive."""
    lines = [line.strip("/") for line in text_of(".comfyignore").split()]
    return any(path == line or path.startswith(f"{line}/") for line in lines)


@each_page
def test_links_lead_somewhere(page: str) -> None:
    folder = (REPOSITORY / page).parent
    assert [link for link in links(text_of(page)) if not (folder / link).exists()] == []


@each_page
def test_commands_and_their_options_exist(page: str) -> None:
    """Of `python -m tests` only the command: its options are pytest's."""
    for module, rest in COMMAND.findall(text_of(page)):
        known = re.findall(r"--[\w-]+", help_of(module))
        asked = [] if module == "tests" else re.findall(r"(?<=\s)--[\w-]+", rest)
        assert [f"{module} {option}" for option in asked if option not in known] == []


def test_every_benchmark_has_its_row() -> None:
    shown = help_of("bonsai_ops.bench")
    part = shown[shown.index("\nbenchmarks:") : shown.index("\nwhat they read:")]
    listed = re.findall(r"^  (--[\w-]+)", part, re.MULTILINE)
    rows = set(re.findall(r"^\| `(--[\w-]+)` \|", text_of("docs/benchmarks.md"), re.MULTILINE))
    assert rows == set(listed)


def test_readme_is_short_and_works_from_the_archive() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) < MOST_LINES
    assert readme.index("![") < readme.index("## First picture") < readme.index("## Install")
    before, after = readme.split(SOURCE_ONLY)
    assert [link for link in links(before) if left_out(link)] == []
    assert not re.search(r"python -m (machines|tests|training)", before)
    assert [link for link in links(after) if left_out(link)], "nothing there is left out of the archive"


def test_readme_names_every_node() -> None:
    names = json.loads(text_of("locales/en/nodeDefs.json"))
    readme = text_of("README.md")
    assert [node["display_name"] for node in names.values() if f"| {node['display_name']} |" not in readme] == []


def test_the_root_is_tidy() -> None:
    present = {path.name for path in REPOSITORY.iterdir() if not path.name.startswith(".")} - NOT_OURS
    assert {name for name in present - ROOT if not name.endswith(".egg-info")} == set()
    assert present >= ROOT


def test_a_link_into_the_left_out_is_found() -> None:
    assert left_out("tests/unit/test_documents.py") and left_out("docs/hosts.md") and left_out("CONTRIBUTING.md")
    assert not left_out("docs/benchmarks.md") and not left_out("testsuite.md")
    assert links("![a](b%20b.jpg) [c](d.md) [e](https://f/g) [h](#i)") == ["b b.jpg", "d.md"]
