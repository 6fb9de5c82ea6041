"""The help pages in other languages: complete, really translated, with every identifier and number as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HELP, LOCALES = REPOSITORY / "web" / "docs", REPOSITORY / "locales"
LANGUAGES = ("ja", "zh")
"""Beside English, which the page shows to all others: it asks for NODE/LANGUAGE.md, then for NODE.md."""
NODES = sorted(path.stem for path in HELP.glob("*.md"))
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)]+)\)")
NUMBER = re.compile(r"\d[\d.,]*(?:e-\d+)?")
NAMED = re.compile("(.+?)(?:\uff08(.+)\uff09)?")
"""An input or output: its id, and in full-width brackets the name that the node shows."""
MESSAGE = re.compile(r"- \*\*(.+?)\*\*: .+")
"""A point, for the page's column cuts what stands at the right of a long word in a table."""

each_page = pytest.mark.parametrize(("node", "language"), [(n, lang) for n in NODES for lang in LANGUAGES])


def english(node: str) -> str:
    return (HELP / f"{node}.md").read_text(encoding="utf-8")


def translated(node: str, language: str) -> str:
    return (HELP / node / f"{language}.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table's rows, heading and rule left out."""
    found = [block for block in text.split("\n\n") if block.startswith("| ")]
    return [[line.strip("| ").split(" | ") for line in block.splitlines()[2:]] for block in found]


def messages(text: str) -> list[str]:
    """Those of the last section, which has nothing but messages and cures."""
    lines = text.rpartition("\n## ")[2].strip().split("\n")[2:]
    found = [MESSAGE.fullmatch(line) for line in lines]
    assert lines and all(found), lines
    return [message[1] for message in found]


def shapes(text: str) -> list[str]:
    """The lines by kind: headings by their level, rows, points, plain ones."""
    kind = re.compile(r"#+ |\| |- |!\[|```|.")
    return [kind.match(line)[0] if line.startswith(("#", "|", "- ", "![", "```")) else "." for line in text.split("\n")]


def sentences(text: str) -> Iterator[str]:
    """Cells and lines of words."""
    for line in CODE.sub("", text).split("\n"):
        for cell in line.strip("| ").split(" | "):
            if len(re.findall(r"[A-Za-z]+", cell)) > 3:
                yield cell


def test_every_node_has_its_pages() -> None:
    nodes = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert sorted(nodes) == NODES
    for node in NODES:
        assert sorted(path.name for path in (HELP / node).iterdir()) == [f"{language}.md" for language in LANGUAGES]


@each_page
def test_headings_rows_and_points_are_those_of_english(node: str, language: str) -> None:
    found = translated(node, language)
    assert shapes(found) == shapes(english(node))
    name = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]["display_name"]
    assert found.startswith(f"# {name}\n")


@each_page
def test_inputs_and_messages_are_named_as_the_screen_shows_them(node: str, language: str) -> None:
    """The ids of inputs with their names in this language; messages are English on the screen."""
    texts = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    assert messages(translated(node, language)) == messages(english(node))
    original, found = tables(english(node)), tables(translated(node, language))
    kinds = [("inputs", 0), ("outputs", 1)] if "outputs" in texts else [("inputs", 0)]
    for kind, place in kinds:
        names = [entry["name"] for entry in texts[kind].values()]
        for row, expected in zip(found[place], original[place], strict=True):
            shown, name = NAMED.fullmatch(row[0]).groups()
            assert shown == expected[0] and (name or shown).casefold() in map(str.casefold, names), row


@each_page
def test_code_links_and_numbers_stay(node: str, language: str) -> None:
    original, found = english(node), translated(node, language)
    assert sorted({*CODE.findall(found)}) == sorted({*CODE.findall(original)})
    assert LINK.findall(found) == LINK.findall(original)
    assert {n.rstrip(".,") for n in NUMBER.findall(original)} <= {n.rstrip(".,") for n in NUMBER.findall(found)}


@each_page
def test_no_sentence_is_a_copy_of_english(node: str, language: str) -> None:
    assert not {*sentences(translated(node, language))} & {*sentences(english(node))}
