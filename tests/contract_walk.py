"""What nodes/ and bonsai_ops/host/ say of ComfyUI and what a ComfyUI says, read from source, to be compared.

The table between them is bonsai_ops/host/contract/. Types do not count: annotations and what is imported for them
alone is needed by nobody who runs the plugin.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST_PACKAGES = frozenset(
    {
        *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "comfyui_version"),
        *("folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
    }
)


@dataclass
class Said:
    """What one file of ours says.

    dotted: names of ComfyUI, also as strings. keywords: {dotted name called: keyword arguments}. strings: every string.
    attributes: every attribute that does not hang on a module. typed: (class of ComfyUI, attribute) of parameters with
    such a type. asked: attributes that hasattr, or getattr with a default, asks for. caught: errors that it catches.
    defined: functions, classes and attributes that it makes.
    """

    dotted: set[str] = field(default_factory=set)
    keywords: dict[str, set[str]] = field(default_factory=dict)
    strings: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    typed: set[tuple[str, str]] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    caught: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)

    def add(self, other: Said) -> None:
        """Takes over what another file of the same user says."""
        for name in ("dotted", "strings", "attributes", "typed", "asked", "caught", "defined"):
            getattr(self, name).update(getattr(other, name))
        for name, keywords in other.keywords.items():
            self.keywords.setdefault(name, set()).update(keywords)

    @property
    def words(self) -> set[str]:
        """Whatever may stand for a member or a word of the table."""
        return self.strings | self.attributes | self.defined | set().union(*self.keywords.values())


def read(path: Path) -> Said:
    """What the file says."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = set(_of_parameters(tree, _imported(tree)[0]))
    tree = _without_types(tree)
    modules, ours = _imported(tree)
    said, inside = Said(typed=typed), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, modules)
            if name is not None:
                said.keywords.setdefault(name, set()).update(k.arg for k in node.keywords if k.arg)
            else:
                said.keywords.setdefault("", set()).update(k.arg for k in node.keywords if k.arg)
            if ast.unparse(node.func) == "hasattr" or (ast.unparse(node.func) == "getattr" and len(node.args) == 3):
                said.asked.add(ast.unparse(node.args[1]).strip("'"))
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            said.caught.update(n.id for n in ast.walk(node.type) if isinstance(n, ast.Name))
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inside:
            inside.update(id(part) for part in _chain(node))
            name = _dotted(node, modules)
            if name is not None:
                said.dotted.add(name)
            else:
                root = _chain(node)[-1]
                if not (isinstance(root, ast.Name) and root.id in ours):
                    said.attributes.update(part.attr for part in _chain(node) if isinstance(part, ast.Attribute))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.strings.add(node.value)
            if re.fullmatch(r"\w+(\.\w+)+", node.value) and node.value.partition(".")[0] in HOST_PACKAGES:
                said.dotted.add(node.value)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            said.defined.add(node.name)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said.defined.add(node.target.id)
        if isinstance(node, ast.Assign):
            said.defined.update(t.id for t in node.targets if isinstance(t, ast.Name))
        if isinstance(node, ast.arg):
            said.defined.add(node.arg)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            said.defined.add(node.attr)
    return said


def _of_parameters(tree: ast.Module, modules: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(class of ComfyUI, attribute) of every parameter that is said to be of one."""
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        classes: dict[str, str] = {}
        for parameter in (*function.args.args, *function.args.kwonlyargs):
            for part in ast.walk(parameter.annotation) if parameter.annotation else ():
                name = _dotted(part, modules) if isinstance(part, (ast.Name, ast.Attribute)) else None
                if name is not None:
                    classes[parameter.arg] = name
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in classes:
                yield classes[node.value.id], node.attr


def _without_types(tree: ast.Module) -> ast.Module:
    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return node.orelse
            return self.generic_visit(node)

        def visit_arg(self, node: ast.arg) -> ast.AST:
            node.annotation = None
            return node

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
            node.annotation = ast.Constant(None)
            return self.generic_visit(node)

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.returns = None
            return self.generic_visit(node)

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
            node.returns = None
            return self.generic_visit(node)

    return Strip().visit(tree)


def _imported(tree: ast.Module) -> tuple[dict[str, str], set[str]]:
    """({local name: dotted name of ComfyUI}, local names of all other modules)."""
    modules: dict[str, str] = {}
    others: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                local = alias.asname or top
                if top in HOST_PACKAGES:
                    modules[local] = alias.name if alias.asname else top
                else:
                    others.add(local)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.level == 0 and node.module.partition(".")[0] in HOST_PACKAGES:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif alias.name.islower():
                    others.add(alias.asname or alias.name)
    return modules, others


def _chain(node: ast.expr) -> list[ast.expr]:
    parts = [node]
    while isinstance(parts[-1], ast.Attribute):
        parts.append(parts[-1].value)
    return parts


def _dotted(node: ast.expr, modules: dict[str, str]) -> str | None:
    *attributes, root = _chain(node)
    if not isinstance(root, ast.Name) or root.id not in modules:
        return None
    return ".".join([modules[root.id], *(part.attr for part in reversed(attributes))])


def unspelled(name: str, words: str) -> Iterator[str]:
    """Those of the words that the source of a dotted name of ComfyUI does not spell.

    "set_{}" and "_function" spell whatever begins or ends like that. The source of a class is that of its bases too,
    the source of a function that of its module.
    """
    from bonsai_ops.host import comfyui

    spelled: set[str] = set()
    patterns: set[str] = set()
    for text in _sources(comfyui.find(name)) if words else ():
        found, begun = _spelling(text)
        spelled |= found
        patterns |= begun
    for word in words.split():
        if word not in spelled and not any(re.fullmatch(pattern, word) for pattern in patterns):
            yield word


@functools.cache
def _spelling(text: str) -> tuple[set[str], set[str]]:
    """(what a source spells, patterns of what it makes names of)."""
    spelled: set[str] = set()
    patterns: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(text))):
        if isinstance(node, ast.Attribute):
            spelled.add(node.attr)
        elif isinstance(node, ast.Name):
            spelled.add(node.id)
        elif isinstance(node, (ast.arg, ast.keyword)):
            spelled.add(node.arg or "")
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            spelled.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            spelled.add(node.value)
            if re.fullmatch(r"\w*\{\}\w*", node.value) and len(node.value) > len("set_"):
                patterns.add(node.value.replace("{}", r"\w+"))
            elif re.fullmatch(r"_\w{5,}", node.value):
                patterns.add(rf"\w+{node.value}")
        elif isinstance(node, ast.JoinedStr):
            patterns.add("".join(re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in node.values))
    return spelled, patterns - {r"\w+"}


def _sources(found: Any) -> Iterator[str]:
    if inspect.isclass(found):
        for kind in found.__mro__:
            if kind.__module__.partition(".")[0] in HOST_PACKAGES:
                yield _source(kind)
    else:
        yield _source(found if inspect.ismodule(found) else inspect.getmodule(inspect.unwrap(found)))


_source = functools.cache(inspect.getsource)
"""Python parses the whole file again for each class."""
