"""From pytest's reports to the Markdown of docs/hosts.md."""

from __future__ import annotations

import platform
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What became of one part on one host. skipped: {test: reason}; failed: {test: first line of the error}."""

    passed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {"failed": len(self.failed), "passed": self.passed, "skipped": len(self.skipped)}
        text = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"**{text}**" if self.failed else text or "**nothing run**"


@dataclass(frozen=True)
class Column:
    """What is known of one host after its run. error: the end of the output if that does not say it all."""

    host: str
    versions: Mapping[str, str]
    outcomes: Mapping[str, Outcome]
    seconds: float
    error: str = ""

    @property
    def good(self) -> bool:
        return not self.error and not any(outcome.failed for outcome in self.outcomes.values())


def outcomes_of(report: str, parts: Mapping[str, Sequence[str]]) -> dict[str, Outcome]:
    """{part: what became of its tests} after pytest's report in JUnit's XML.

    parts: {part: arguments of pytest}; a test counts in the first that has it. Raises ValueError for one that none has.
    """
    outcomes = {part: Outcome() for part in parts}
    for case in ET.fromstring(report).iter("testcase"):
        test = _id_of(case)
        part = next(
            (part for part, known in parts.items() if any(_belongs(test, argument) for argument in known)), None
        )
        if part is None:
            raise ValueError(f"{test} is of no part")
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skipped = case.find("skipped")
        if bad is not None:
            outcomes[part].failed[test] = _first_line(bad)
        elif skipped is not None:
            outcomes[part].skipped[test] = _first_line(skipped).removeprefix("Skipped: ")
        else:
            outcomes[part].passed += 1
    return outcomes


def _id_of(case: ET.Element) -> str:
    """pytest's id of a test; the path of a file that could not be collected."""
    module, name = case.get("classname", ""), case.get("name", "")
    return f"{module.replace('.', '/')}.py::{name}" if module else f"{name.replace('.', '/')}.py"


def _belongs(test: str, argument: str) -> bool:
    inside = (f"{argument}[", f"{argument}::", f"{argument}/")
    return test == argument or test.startswith(inside) or argument.startswith(f"{test}::")


def _first_line(element: ET.Element) -> str:
    return (element.get("message") or element.text or "").strip().partition("\n")[0]


def document(columns: Sequence[Column], parts: Sequence[str], day: str) -> str:
    """The whole Markdown. parts: the columns of the table; day: when it was made."""
    versions = list(dict.fromkeys(name for column in columns for name in column.versions))
    lines = [
        "# Hosts",
        "",
        f"{day}, Python {platform.python_version()} on the processor of {platform.system()} {platform.machine()}. "
        "Made by `python -m tests.hosts`; `tests/hosts/parts.py` says what a part is. A + has newer packages than its "
        "ComfyUI asks for.",
        "",
        *_table(["host", *versions], ([c.host, *(c.versions.get(name, "") for name in versions)] for c in columns)),
        "",
        *_table(
            ["host", *parts, "seconds"],
            ([c.host, *(str(c.outcomes[part]) for part in parts), f"{c.seconds:.0f}"] for c in columns),
        ),
    ]
    for column in columns:
        lines += _remarks(column)
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _remarks(column: Column) -> list[str]:
    """What failed, and why tests were skipped."""
    outcomes = column.outcomes.values()
    lines = [f"- failed: {test}: {why}" for outcome in outcomes for test, why in outcome.failed.items()]
    reasons = Counter(why for outcome in outcomes for why in outcome.skipped.values())
    lines += [f"- skipped, {count}: {why}" for why, count in reasons.items()]
    lines += ["", "```", column.error, "```"] if column.error else []
    return ["", f"{column.host}:", "", *lines] if lines else []
