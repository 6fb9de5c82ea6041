"""What stages found -> docs/results, the curves, the tables of docs/benchmarks.md and docs/report-to-comfyui.md.

A table stands between two comments, <!-- NAME --> and <!-- end of NAME -->; of each there is one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bonsai_ops.tools.environment import PLUGIN

from . import curve, fidelity, gradients, modes, node, other
from .rows import read

DOCS = PLUGIN / "docs"


def show(work: Path, docs: Path = DOCS) -> None:
    """Takes over what the work folder has, and shows what docs/results then holds."""
    tables: dict[str, tuple[str, Callable[[Mapping], Iterator[str]]]] = {
        "fidelity": (fidelity.FILE, fidelity.table),
        "other": (other.FILE, other.table),
        "modes": (modes.FILE, modes.table),
        "node": (node.FILE, node.table),
        "gradients": (gradients.FILE, gradients.table),
    }
    for name, (file, table) in tables.items():
        kept = docs / "results" / file
        if (work / file).is_file():
            shutil.copyfile(work / file, kept)
        if kept.is_file():
            rows = read(kept)
            text = docs / ("report-to-comfyui.md" if name == "gradients" else "benchmarks.md")
            text.write_text(filled(text.read_text(encoding="utf-8"), name, "\n".join(table(rows))), encoding="utf-8")
            if name == "fidelity":
                curve.draw(docs / fidelity.PICTURE, {name: row for name, row in rows.items() if row["velocity"]})
            elif name == "other":
                curve.draw(docs / other.PICTURE, rows, "a small random Z-Image")


def filled(text: str, name: str, table: str) -> str:
    """The text with this table between its two comments. Raises ValueError if they are not there once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    new, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{table}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected one {begin.strip()} with its end, found {count}")
    return new
