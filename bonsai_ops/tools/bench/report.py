"""What the benchmarks share: tables on the screen and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .table import BENCHMARKS


def show_table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int = 0, *, headed: bool = True) -> None:
    """Prints rows right-aligned under their heads; floats with three digits, very small ones as 1.2e-05, None as -.

    width: least width of a column, and headed=False to leave the heads out, for a table whose rows come one by one.
    """
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(width, *(len(text) for text in column)) for column in zip(head, *texts, strict=True)]
    for row in (head, *texts)[0 if headed else 1 :]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)), flush=True)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 5e-3 else f"{value:.3f}"
    return str(value)


def rows_of(table: object) -> list[dict]:
    """A table of the figures as rows with the same columns: a list of rows, the rows of a mapping, or it as one row.

    Nested values are spread out: {"parts": {"vae_s": 1}} becomes the column parts.vae_s.
    """
    if isinstance(table, Mapping):
        table = table.get("rows", [table])
    rows = [_flat(row) for row in table]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _flat(row: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def write_csv(file: Path, figures: Mapping[str, object]) -> list[Path]:
    """Writes the tables that `figures` holds; returns the files.

    One table goes into `file`, several into NAME-<table>.csv beside it; the columns are the keys of the JSON.
    """
    chosen = [name for name in (b.name for b in BENCHMARKS if b.csv) if figures.get(name)]
    files = []
    for name in chosen:
        target = file if len(chosen) == 1 else file.with_name(f"{file.stem}-{name}{file.suffix or '.csv'}")
        rows = rows_of(figures[name])
        with target.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        files.append(target)
    return files
