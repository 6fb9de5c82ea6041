"""The published archive works alone: what .comfyignore leaves out is not used by what it leaves in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_OUT = [line.strip("/") for line in (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").split()]
FOLDERS = ("machines", "tests", "training")
MODULE = re.compile(rf"({'|'.join((*FOLDERS, 'peers'))})(\..*|$)")
PATH = re.compile(rf"(^|.*[\s/\\])({'|'.join(FOLDERS)})[/\\].*", re.DOTALL)
DOES_WITHOUT = {
    "/gpu_check/project.py": "runs the tests where they are, says where they are not",
    "/environment/locks.py": "takes packages of the tests by version where no lock is",
}
"""{end of a file's name: what it does with a folder that is left out}."""


def published() -> list[Path]:
    """The Python files of the archive."""
    folders = [path for path in REPOSITORY.iterdir() if path.name not in LEFT_OUT and not path.name.startswith(".")]
    return sorted(file for path in folders for file in ([path] if path.suffix == ".py" else path.rglob("*.py")))


def uses(source: str) -> Iterator[str]:
    """What a file imports or reads of FOLDERS: module names, and texts that are paths. Docstrings may name them."""
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if MODULE.fullmatch(name.name))
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [name.name for name in node.names]
            yield from (name for name in names if MODULE.fullmatch(name))
        elif isinstance(node, ast.Call):
            yield from (text for text in map(_text, node.args) if MODULE.fullmatch(text) and _opens(node.func))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            yield from (text for text in (_text(node.left), _text(node.right)) if text in FOLDERS)
        elif isinstance(node, ast.Constant) and id(node) not in texts and PATH.fullmatch(_text(node)):
            yield node.value


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _opens(function: ast.expr) -> bool:
    """Whether a call takes a module or a path: Path(..), joinpath(..), import_module(..) and their like."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("Path", "join", "joinpath", "import_module", "__import__", "run_module", "find_spec")


def test_no_file_uses_what_is_left_out() -> None:
    assert set(FOLDERS) <= set(LEFT_OUT)
    files = published()
    assert {"__init__.py", "dispatch.py", "inputs.py", "static.py"} <= {file.name for file in files}
    assert not [file for file in files if set(file.relative_to(REPOSITORY).parts) & set(FOLDERS)]
    found = {str(file): list(uses(file.read_text(encoding="utf-8"))) for file in files}
    kept = {file: names for file, names in found.items() if names and not file.endswith(tuple(DOES_WITHOUT))}
    assert kept == {}


@pytest.mark.parametrize(
    "source",
    [
        "import tests.peers",
        "def f():\n    from training.judge import judge",
        "from ..tests import guards",
        "from .. import tests",
        "from peers.gemlite_import import import_gemlite",
        "import_module('training.judge')",
        "helper = Path(__file__).parents[2] / 'tests' / 'peers' / 'gemlite_import.py'",
        "open(f'{root}/tests/tiny_files.py')",
        "os.path.join(root, 'training')",
        "from machines.over_ray import Painter",
    ],
)
def test_a_use_is_found(source: str) -> None:
    assert list(uses(source))


@pytest.mark.parametrize("source", ["'''See tests/peers.'''", "step('tests', 'python -m tests')", "import pytests"])
def test_a_word_is_no_use(source: str) -> None:
    assert not list(uses(source))


def test_the_page_for_maintainers_names_what_is_there() -> None:
    """Every file and folder in docs/architecture.md, counted from the repository or from bonsai_ops."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)[:`]", page))
    assert {"bonsai_ops/weights/", "host/loader.py", "tests/unit/test_walls.py"} <= named
    roots = (REPOSITORY, REPOSITORY / "bonsai_ops", REPOSITORY / "bonsai_ops" / "host")
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


def test_what_the_page_shows_is_published() -> None:
    """Templates, blueprints, texts and help, none of which Python code names."""
    for folder in ("workflows", "subgraphs", "locales", "web"):
        assert any((REPOSITORY / folder).iterdir()) and folder not in LEFT_OUT


def test_the_registry_shows_icon_and_banner() -> None:
    """Square and 21 : 9, small; at the address of this repository, where a file of it is."""
    project = pytest.importorskip("tomllib").loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    address = f"{project['project']['urls']['Repository']}/raw/main/"
    shapes = {"Icon": (400, 400), "Banner": (1260, 540)}
    for name, size in shapes.items():
        url = project["tool"]["comfy"][name]
        assert url.startswith(address)
        file = REPOSITORY / url.removeprefix(address)
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.size == size
        assert file.stat().st_size < 300_000
        assert url.removeprefix(address) in LEFT_OUT
    for word in ("Patch to BitLinear", "LoRA", "training", "CPU"):
        assert word in project["project"]["description"]
