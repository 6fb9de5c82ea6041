"""The rows of fidelity.py or other.py as a picture: error of the velocity against bits a weight, smaller is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 1000, 620, 2
LEFT, RIGHT, TOP, BOTTOM = 90, 40, 70, 80
INK, PALE, LINE, PAPER = (33, 37, 41), (108, 117, 125), (222, 226, 230), (255, 255, 255)
BLUE, ORANGE, GREY = (33, 102, 172), (214, 96, 24), (90, 98, 104)
TITLE = "Error of the velocity against {}, by bits a weight"
NOTE = "bits a weight with scales and 16-bit residuals, a larger part of these small layers than of a 4B model's"


@dataclass(frozen=True)
class Series:
    """points: (bits, error, label). filled: the mark; dashed: the line between them."""

    name: str
    colour: tuple[int, int, int]
    points: Sequence[tuple[float, float, str]]
    filled: bool = True
    dashed: bool = False


def draw(file: Path, rows: Mapping[str, Mapping], dense: str = "the dense seedling") -> None:
    """Writes a PNG of the rows that there are, {name of a way: its figures}; none if there is nothing to show.

    dense: what the error is against.
    """
    series = [part for part in _series(rows) if part.points]
    if series:
        _Chart(series, TITLE.format(dense)).image().save(file, format="PNG", optimize=True)


def _series(rows: Mapping[str, Mapping]) -> Iterator[Series]:
    for recipe, colour in (("ternary", BLUE), ("binary", ORANGE)):
        plain = [(f"{recipe}, rounded", "rounded"), (f"{recipe}, calibrated", "calibrated")]
        yield Series(f"{recipe}, no residual", colour, _found(rows, plain), filled=False)
        for kind, endings in (("residual by SVD", [""]), ("recovered", [", recovered", ", recovered, seed 0"])):
            names = [
                (f"{recipe}, calibrated, rank {rank}{ending}", f"{rank}")
                for rank in (8, 16, 32, 64)
                for ending in endings
            ]
            filled = kind == "recovered"
            yield Series(f"{recipe}, {kind} (rank)", colour, _found(rows, names), filled, not filled)
    mixes = [(f"mix {bits}, calibrated", f"mix {bits}") for bits in (2.5, 3, 3.5)]
    yield Series(
        "4 and 8 bits, mixtures",
        GREY,
        _found(rows, [*mixes, ("4bit, calibrated", "4bit"), ("8bit, calibrated", "8bit")]),
    )


def _found(rows: Mapping[str, Mapping], names: Sequence[tuple[str, str]]) -> list[tuple[float, float, str]]:
    return [(rows[name]["bits"], rows[name]["velocity"], label) for name, label in names if name in rows]


class _Chart:
    """Bits linear, errors logarithmic."""

    def __init__(self, series: Sequence[Series], title: str) -> None:
        self.series, self.title = series, title
        points = [point for part in series for point in part.points]
        self.bits = (0.0, math.ceil(max(bits for bits, _, _ in points)) + 0.5)
        errors = [error for _, error, _ in points]
        self.errors = (math.log10(min(errors)) - 0.1, math.log10(max(errors)) + 0.1)
        self.paper = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self.canvas = ImageDraw.Draw(self.paper)

    def image(self) -> Image.Image:
        self._axes()
        for part in self.series:
            self._line(part)
        for number, part in enumerate(self.series):
            for bits, error, label in part.points:
                x, y = self._place(bits, error)
                self._mark(x, y, part)
                left = label == "rounded"  # which may lie on top of the next one
                self._text(x - 8 if left else x + 8, y - 8, label, 13, PALE, "rm" if left else "lm")
            y = TOP + 8 + 20 * number
            self._mark(WIDTH - RIGHT - 250, y, part)
            self._text(WIDTH - RIGHT - 236, y, part.name, 14, INK, "lm")
        return self.paper.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    def _place(self, bits: float, error: float) -> tuple[float, float]:
        low, high = self.errors
        x = LEFT + (bits - self.bits[0]) / (self.bits[1] - self.bits[0]) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (math.log10(error) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def _axes(self) -> None:
        self._text(LEFT, 32, self.title, 20, INK, "lm")
        for bits in range(math.ceil(self.bits[0]), math.floor(self.bits[1]) + 1):
            x, _ = self._place(bits, 1)
            self._stroke([(x, TOP), (x, HEIGHT - BOTTOM)], LINE)
            self._text(x, HEIGHT - BOTTOM + 18, str(bits), 14, PALE, "mm")
        for power in range(-4, 2):
            for step in (1, 2, 5):
                error = step * 10.0**power
                if self.errors[0] <= math.log10(error) <= self.errors[1]:
                    _, y = self._place(0, error)
                    self._stroke([(LEFT, y), (WIDTH - RIGHT, y)], LINE)
                    self._text(LEFT - 12, y, f"{error:g}", 14, PALE, "rm")
        self._text(LEFT, HEIGHT - 30, NOTE, 14, PALE, "lm")

    def _line(self, part: Series) -> None:
        places = [self._place(bits, error) for bits, error, _ in part.points]
        for (x, y), (to_x, to_y) in itertools.pairwise(places):
            pieces = max(1, round(math.hypot(to_x - x, to_y - y) / 6)) if part.dashed else 1
            for i in range(0, pieces, 2):
                ends = [(x + (to_x - x) * k / pieces, y + (to_y - y) * k / pieces) for k in (i, min(i + 1, pieces))]
                self._stroke(ends, part.colour, 2)

    def _mark(self, x: float, y: float, part: Series) -> None:
        box = [SCALE * value for value in (x - 5, y - 5, x + 5, y + 5)]
        self.canvas.ellipse(box, fill=part.colour if part.filled else PAPER, outline=part.colour, width=2 * SCALE)

    def _stroke(self, places: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int = 1) -> None:
        self.canvas.line([(SCALE * x, SCALE * y) for x, y in places], fill=colour, width=SCALE * width)

    def _text(self, x: float, y: float, text: str, size: int, colour: tuple[int, int, int], anchor: str) -> None:
        font = ImageFont.load_default(SCALE * size)
        self.canvas.text((SCALE * x, SCALE * y), text, fill=colour, font=font, anchor=anchor)
