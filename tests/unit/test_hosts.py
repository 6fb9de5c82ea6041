"""The table of hosts: which tests it names, and what it makes of pytest's reports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hosts.parts import PARTS, REST, REST_TESTS
from hosts.report import Column, Outcome, document, outcomes_of

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("import", "load", "sample", "LoRA", "offload", "save", "patch", "browser")
CASES = (
    ("tests.host.test_a", "test_one[0.30.0]", ""),
    ("tests.host.test_a", "test_one_more", ""),
    ("tests.host.model.test_b", "test_two", '<failure message="AssertionError: 1 == 2&#10;more">x</failure>'),
    ("tests.host.model.test_b", "test_three[a-b.c]", '<skipped message="Skipped: no such node"/>'),
    ("tests.host.model.test_b", "test_four", '<error message="fixture failed">x</error>'),
    ("", "tests.host.model.test_c", '<error message="collection failure">x</error>'),
)
REPORT = "".join(f'<testcase classname="{where}" name="{name}">{end}</testcase>' for where, name, end in CASES)
REPORT = f'<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>{REPORT}</testsuite></testsuites>'


def test_the_parts_are_those_of_the_table() -> None:
    """The first column begins with the contract: every name of ComfyUI that is leant on."""
    assert tuple(PARTS) == KINDS and "::test_every_name_is_there" in PARTS[KINDS[0]][0]
    assert REST not in PARTS


@pytest.mark.parametrize("part", [*PARTS, REST])
def test_every_named_test_exists(part: str) -> None:
    tests = REST_TESTS if part == REST else PARTS[part]
    assert len(tests) == len(set(tests)) > 0
    for test in tests:
        file, _, function = test.partition("::")
        path = REPOSITORY / file
        assert path.exists(), test
        if function:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert function.partition("[")[0] in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, test


def test_no_test_is_of_two_parts() -> None:
    named = [test for tests in PARTS.values() for test in tests]
    assert [a for a in named for b in named if a != b and (a.startswith((f"{b}::", f"{b}[")))] == []
    assert len(named) == len(set(named))


def test_a_report_is_read() -> None:
    model = "tests/host/model"
    parts = {
        "import": ["tests/host/test_a.py::test_one[0.30.0]", f"{model}/test_c.py::test_x"],
        "load": ["tests/host/test_a.py::test_one_more", f"{model}/test_b.py::test_two"],
        "the rest": [model],
    }
    found = outcomes_of(REPORT, parts)
    assert found["import"] == Outcome(1, {}, {f"{model}/test_c.py": "collection failure"})
    assert found["load"] == Outcome(1, {}, {f"{model}/test_b.py::test_two": "AssertionError: 1 == 2"})
    assert found["the rest"] == Outcome(
        0,
        {f"{model}/test_b.py::test_three[a-b.c]": "no such node"},
        {f"{model}/test_b.py::test_four": "fixture failed"},
    )
    assert [str(outcome) for outcome in found.values()] == [
        "**1 failed, 1 passed**",
        "**1 failed, 1 passed**",
        "**1 failed, 1 skipped**",
    ]


def test_a_test_of_no_part_is_named() -> None:
    with pytest.raises(ValueError, match=r"test_a\.py::test_one_more is of no part"):
        outcomes_of(REPORT, {"import": ["tests/host/test_a.py::test_one", "tests/host/model"]})


def test_the_document() -> None:
    good = Column(
        "0.1", {"ComfyUI": "0.1", "kitchen": "2"}, {"load": Outcome(3), "save": Outcome(0, {"a": "why"})}, 4.4
    )
    bad = Column("0.2+", {"ComfyUI": "0.2", "kitchen": "3"}, {"load": Outcome(), "save": Outcome()}, 1.6, "it died")
    assert good.good and not bad.good
    lines = document([good, bad], ["load", "save"], "1 May 2026").splitlines()
    assert lines[2].startswith("1 May 2026, Python ")
    tables = [line for line in lines if line.startswith("|")]
    assert tables == [
        "| host | ComfyUI | kitchen |",
        "| --- | --- | --- |",
        "| 0.1 | 0.1 | 2 |",
        "| 0.2+ | 0.2 | 3 |",
        "| host | load | save | seconds |",
        "| --- | --- | --- | --- |",
        "| 0.1 | 3 passed | 1 skipped | 4 |",
        "| 0.2+ | **nothing run** | **nothing run** | 2 |",
    ]
    assert "- skipped, 1: why" in lines and "it died" in lines
