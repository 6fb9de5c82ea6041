"""The walls of the house: which folder may import which, who may name ComfyUI, and how large a room may be.

docs/architecture.md says what each wing is for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "bonsai_ops"
MAY_IMPORT = {
    "weights": set(),
    "kernels": {"weights"},
    "quantize": {"weights"},
    "host": {"weights", "kernels", "quantize"},
    "tools": {"weights", "kernels", "quantize", "host"},
    "commands": {"weights", "kernels", "quantize", "host", "tools"},
    "nodes": {"host"},
    "entry": {"nodes", "host"},
}
"""Wing -> the wings it may import from, besides its own. commands: the files that one types; entry: __init__.py."""
WINGS = {"weights", "kernels", "quantize", "host", "tools"}
COMMANDS = {"demo", "convert", "bench"}
DATA = {"models"}
COMFYUI = {
    *("comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfy_kitchen", "comfy_aimdo"),
    *("execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
}
"""Top-level names of ComfyUI and of its library of kernels."""
NAMES_COMFYUI = (
    "bonsai_ops/host/",
    "nodes/",
    "bonsai_ops/tools/bench/inside/",
    "bonsai_ops/tools/bench/gpu_check/",
)
"""The folders in which a file may import them."""
NETWORK = {
    *("socket", "socketserver", "ssl", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "xmlrpc", "asyncio"),
    *("requests", "httpx", "aiohttp", "urllib3", "websockets", "websocket", "huggingface_hub", "webbrowser"),
}
"""What could open a connection."""
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
LONG_FUNCTIONS = {
    "bonsai_ops/kernels/triton/half.py:weight_first_kernel": "a kernel is one function: pointers, strides, one loop",
    "bonsai_ops/kernels/triton/int8.py:a8_kernel": "a kernel is one function: pointers, strides, one loop",
    "bonsai_ops/kernels/unpack/kernel.py:unpack_kernel": "a kernel is one function: pointers, tables, planes",
    "nodes/patch_linear.py:define_schema": "a schema: every input of the node and its tooltip",
}
"""{"file:function": why it is longer than MOST_LINES_OF_A_FUNCTION}"""

Imports = Mapping[str, set[str]]


def files() -> list[Path]:
    """The plugin's Python files."""
    folders = (REPOSITORY / PACKAGE, REPOSITORY / "nodes")
    return [REPOSITORY / "__init__.py", *sorted(file for folder in folders for file in folder.rglob("*.py"))]


def name_of(file: Path) -> str:
    """The file from the repository, such as "bonsai_ops/host/linear.py"."""
    return file.relative_to(REPOSITORY).as_posix()


def wing(file: str) -> str | None:
    """The wing of a file; None for bonsai_ops/__init__.py, the version, which is for everyone."""
    first, *rest = file.removesuffix(".py").split("/")
    if first != PACKAGE:
        return first if rest else "entry"
    return None if rest == ["__init__"] else rest[0] if rest[0] in WINGS else "commands"


def imports(source: str, package: list[str], types: bool = True) -> Iterator[list[str]]:
    """The parts of every imported name, ours counted from the repository.

    package: the folders of the file; types: also imports that only a type checker sees.
    """
    tree = ast.parse(source)
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and not types and "TYPE_CHECKING" in ast.unparse(node.test):
            left_out |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield from ([*module, alias.name] for alias in node.names)


def ours(parts: list[str], known: set[str]) -> str | None:
    """The file of an imported name: of a module, or of the module that has the name."""
    for end in (len(parts), len(parts) - 1):
        path = "/".join(parts[:end])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if end and file in known:
                return file
    return None


def graph(types: bool) -> Imports:
    """{file: the files of ours that it imports}, anywhere in it."""
    known = {name_of(file) for file in files()}
    found = {}
    for file in files():
        name = name_of(file)
        names = imports(file.read_text(encoding="utf-8"), name.split("/")[:-1], types)
        found[name] = {other for parts in names if (other := ours(parts, known))} - {name}
    return found


def climbs(found: Imports) -> list[str]:
    """Every import that goes where its wing may not."""
    return [
        f"{file} ({own}) imports {other}"
        for file, others in found.items()
        for other in sorted(others)
        if (own := wing(file)) and wing(other) not in (None, own, *MAY_IMPORT[own])
    ]


def circles(found: Imports) -> list[list[str]]:
    """The groups of files that reach one another by imports."""
    reached: dict[str, set[str]] = {}
    for start in found:
        waiting, seen = [start], set()
        while waiting:
            for other in found.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        reached[start] = seen
    groups = {frozenset(o for o in reached[f] if f in reached[o]) for f in found if f in reached[f]}
    return sorted(sorted(group) for group in groups)


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """("file:function", its lines) for every function, decorators aside."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{name_of(file)}:{node.name}", node.end_lineno - node.lineno + 1


def test_imports_keep_to_the_plan() -> None:
    assert climbs(graph(types=True)) == []


def test_only_the_host_names_comfyui() -> None:
    found = {}
    for file in files():
        name = name_of(file)
        roots = {parts[0] for parts in imports(file.read_text(encoding="utf-8"), name.split("/")[:-1]) if parts}
        if roots & COMFYUI and not name.startswith(NAMES_COMFYUI) and wing(name) != "entry":
            found[name] = roots & COMFYUI
    assert found == {}


def test_only_the_workshop_knows_the_network() -> None:
    """What ComfyUI runs, and the commands themselves, connect to nothing."""
    found = {}
    for file in files():
        name = name_of(file)
        roots = {parts[0] for parts in imports(file.read_text(encoding="utf-8"), name.split("/")[:-1]) if parts}
        if roots & NETWORK and wing(name) != "tools":
            found[name] = roots & NETWORK
    assert found == {}


def test_no_files_import_one_another() -> None:
    """An import that only a type checker sees makes no circle; one inside of a function does."""
    assert circles(graph(types=False)) == []


def test_the_package_shows_its_wings_and_commands() -> None:
    present = {path.stem for path in (REPOSITORY / PACKAGE).iterdir() if path.name != "__pycache__"}
    assert present == {"__init__", *WINGS, *COMMANDS, *DATA}


def test_no_file_is_long() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_long_without_a_reason() -> None:
    long = {n: lines for file in files() for n, lines in functions(file) if lines > MOST_LINES_OF_A_FUNCTION}
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(long), "no longer long: take it from the list"


@pytest.mark.parametrize(
    ("importer", "source", "file"),
    [
        ("bonsai_ops/weights/read.py", "from ..kernels import dispatch", "bonsai_ops/kernels/dispatch.py"),
        ("bonsai_ops/weights/formats/mlx.py", "from ...host import linear", "bonsai_ops/host/linear.py"),
        ("bonsai_ops/kernels/cpu.py", "def f():\n    from ..host.loader import load", "bonsai_ops/host/loader.py"),
        ("bonsai_ops/quantize/layer.py", "import bonsai_ops.kernels.cpu", "bonsai_ops/kernels/cpu.py"),
        ("bonsai_ops/host/save.py", "from bonsai_ops.tools import server", "bonsai_ops/tools/server.py"),
        ("nodes/inputs.py", "from ..bonsai_ops.tools import server", "bonsai_ops/tools/server.py"),
        ("__init__.py", "from .bonsai_ops.kernels import dispatch", "bonsai_ops/kernels/dispatch.py"),
    ],
)
def test_a_climb_is_found(importer: str, source: str, file: str) -> None:
    """As this test reads imports, however they are spelled."""
    (parts,) = imports(source, importer.split("/")[:-1])
    assert ours(parts, {file}) == file
    assert len(climbs({importer: {file}})) == 1


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_an_import_for_types_makes_no_circle() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import A"
    assert ["p", "a", "A"] in list(imports(source, ["p"]))
    assert ["p", "a", "A"] not in list(imports(source, ["p"], types=False))
