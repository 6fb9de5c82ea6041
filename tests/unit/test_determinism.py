"""What python -m tests.determinism takes for a fault; the command itself draws."""

from __future__ import annotations

from pathlib import Path

import determinism
import pytest
from determinism import MEASURED, PROMISED, table

from bonsai_ops.tools.environment import Environment

TOLD = dict.fromkeys((*PROMISED, *MEASURED), True)


@pytest.mark.parametrize(("other", "code"), [(None, 0), *((w, 1) for w in PROMISED), *((w, 0) for w in MEASURED)])
def test_only_what_is_promised_is_a_fault(
    other: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"ternary": dict(TOLD), "1-bit": TOLD | ({other: False} if other else {})}
    monkeypatch.setattr(determinism, "ensure_or_exit", lambda tests: Environment(Path("python"), Path("comfyui")))
    monkeypatch.setattr(determinism, "compared", lambda *arguments: found)
    assert determinism.main([]) == code
    assert capsys.readouterr().out.count("| other |") == (other is not None)


def test_the_table_names_what_draws_and_how() -> None:
    lines = table({"ternary, fp32, cpu": TOLD | {"two threads": False}}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["", *PROMISED, *MEASURED]
    assert lines[2] == "| ternary, fp32, cpu | same | same | other | same | same |"
