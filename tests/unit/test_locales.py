"""The translations in locales: complete, really translated, with every identifier as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
FILES = ("main.json", "nodeDefs.json")
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "ru", "fr", "es", "de", "pt-BR", "tr", "ar", "fa")
"""Beside English. The page of ComfyUI 1.47 has all of them but German."""
NAMES = {"Bonsai", "Bonsai Image", "CLIP", "VAE", "CFG", "CSV"}
"""Proper names and abbreviations, the same in every language."""
SAME_WORD = {"de": {"Latent", "Scheduler", "Seed", "Text"}, "tr": {"Model"}, "zh": {"Latent"}}
"""{language: words that it shares with English, but for capitals}."""
SYNTAX = set("{}|@")
"""Characters that the page's translations read as syntax."""
IDENTIFIER = re.compile(
    r"[\w*-]*\.(?:safetensors|pt)\b"  # files
    r"|[\w-]+(?:/[\w-]+)+"  # folders and repositories
    r"|\b\w+_\w+(?:\.\*)?"  # inputs, option values and layers
    r"|\b(?:bf16|fp16|fp32|a8|4bit|8bit|gemlite|unpacked|flux2|KSampler|CLIPLoader)\b"
    r"|(?:(?<=^)|(?<=[.;] ))[a-z]+(?=: )"  # option values that a tooltip explains
)

each_language = pytest.mark.parametrize("language", LANGUAGES)
each_file = pytest.mark.parametrize("name", FILES)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of everything in a JSON value that is not an object."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}/{key}")
    else:
        yield path, value


def texts(language: str, name: str) -> dict[str, str]:
    return dict(leaves(json.loads((LOCALES / language / name).read_text(encoding="utf-8"))))


def test_languages() -> None:
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}
    for folder in LOCALES.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@each_file
@pytest.mark.parametrize("language", ("en", *LANGUAGES))
def test_files_are_plain_text(language: str, name: str) -> None:
    text = (LOCALES / language / name).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2) + "\n"


@each_file
@each_language
def test_keys_are_those_of_english(language: str, name: str) -> None:
    found = texts(language, name)
    assert list(found) == list(texts("en", name))
    assert [p for p, text in found.items() if text != text.strip() or not text or SYNTAX & set(text)] == []


@each_file
@each_language
def test_no_text_is_a_copy_of_english(language: str, name: str) -> None:
    english, found = texts("en", name), texts(language, name)
    copies = {text for path, text in found.items() if text.casefold() == english[path].casefold()}
    assert copies <= NAMES | SAME_WORD.get(language, set())


@each_language
def test_identifiers_stay(language: str) -> None:
    english, found = texts("en", "nodeDefs.json"), texts(language, "nodeDefs.json")
    told = {p: text for p, text in english.items() if not p.endswith("/name")}
    lost = {(p, word) for p, text in told.items() for word in IDENTIFIER.findall(text) if word not in found[p]}
    assert sorted(lost) == []


@each_language
def test_nodes_are_told_apart(language: str) -> None:
    titles = [text for path, text in texts(language, "nodeDefs.json").items() if path.endswith("/display_name")]
    assert sorted(set(titles)) == sorted(titles)
