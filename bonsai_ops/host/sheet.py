"""A picture of lines and bars that grows downwards, drawn so that it can be read on a node of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, BAR, GAP = 640, 24, 30, 8
"""Pixels. A node shows the picture at about two thirds of its size."""
MOST = 4000
"""Pixels of height; what lies below is not drawn."""
LARGE, NORMAL, SMALL = 32, 20, 17
BACKGROUND, TEXT, FAINT, LINES = "#202124", "#e8eaed", "#9aa0a6", "#3c4043"
GREEN, AMBER, BLUE, PURPLE, YELLOW = "#3f8f4f", "#c08a3e", "#4f79c0", "#a25bb0", "#f2d16b"


class Sheet:
    """Each method draws below what was drawn before, between the margins."""

    def __init__(self) -> None:
        self._picture = Image.new("RGB", (WIDTH, MOST), BACKGROUND)
        self._pen = ImageDraw.Draw(self._picture)
        self._y = MARGIN

    def gap(self, height: int = GAP) -> None:
        """Leaves room."""
        self._y += height

    def text(self, text: str, size: int = NORMAL, color: str = TEXT, label: str = "", indent: int = 0) -> None:
        """Text in as many lines as it needs, `indent` pixels from the margin, with a label before the first."""
        font, x = ImageFont.load_default(size), MARGIN + indent
        if label:
            self._pen.text((MARGIN, self._y), label, fill=FAINT, font=font)
        for line in self._wrapped(text, font, WIDTH - MARGIN - x):
            self._pen.text((x, self._y), line, fill=color, font=font)
            self._y += round(1.4 * size)

    def bar(self, parts: Sequence[tuple[float, str]], whole: float, caption: str) -> None:
        """Values beside each other, each in its colour, and a caption above; `whole` would fill the width."""
        self.text(caption, SMALL, FAINT)
        x, scale = float(MARGIN), (WIDTH - 2 * MARGIN) / (whole or 1)
        for value, color in parts:
            if not value:
                continue
            width = max(2.0, value * scale)
            self._pen.rectangle((round(x), self._y, round(x + width) - 1, self._y + BAR), fill=color)
            x += width
        self._y += BAR + GAP

    def keys(self, keys: Sequence[tuple[str, str]]) -> None:
        """What each colour stands for: (text, colour)."""
        font, x, box = ImageFont.load_default(SMALL), MARGIN, SMALL - 3
        for text, color in keys:
            width = box + 2 * GAP + round(self._pen.textlength(text, font=font))
            if x > MARGIN and x + width > WIDTH - MARGIN:
                x, self._y = MARGIN, self._y + round(1.4 * SMALL)
            self._pen.rectangle((x, self._y + 4, x + box, self._y + 4 + box), fill=color)
            self._pen.text((x + box + GAP, self._y), text, fill=TEXT, font=font)
            x += width + 2 * GAP
        self._y += round(1.4 * SMALL)

    def columns(self, columns: Sequence[tuple[float, str, float | None]], height: int, least: float) -> None:
        """A chart of upright bars: (value, colour, value of a mark upon it or None). `least`: of the upper end."""
        top = max([least, *(max(value, mark or 0.0) for value, _, mark in columns)])
        left, right, bottom = MARGIN + 48, WIDTH - MARGIN, self._y + height
        font = ImageFont.load_default(SMALL)
        for i in range(5):
            y = bottom - height * i / 4
            self._pen.line((left, y, right, y), fill=LINES)
            self._pen.text((MARGIN, y - SMALL / 2 - 2), f"{top * i / 4:.2f}", fill=FAINT, font=font)
        step = (right - left) / max(1, len(columns))
        for i, (value, color, mark) in enumerate(columns):
            x = left + i * step
            end = max(x, x + step - max(1, step / 8))
            self._pen.rectangle((x, bottom - max(1, height * value / top), end, bottom), fill=color)
            if mark is not None:
                y = bottom - height * mark / top
                self._pen.rectangle((x, y - 1, end, y + 1), fill=YELLOW)
        self._y = bottom + 2 * GAP

    def image(self) -> np.ndarray:
        """What was drawn: float32 [H, WIDTH, 3] in 0 .. 1."""
        return np.asarray(self._picture, dtype=np.float32)[: self._y + MARGIN - GAP] / 255.0

    def _wrapped(self, text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
        """The text in lines of at most `width` pixels, broken between words, in a word that is longer within it."""
        lines = [""]
        for word in text.split():
            line = f"{lines[-1]} {word}".strip()
            if self._pen.textlength(line, font=font) <= width:
                lines[-1] = line
                continue
            if lines[-1]:
                lines.append("")
            for character in word:
                if self._pen.textlength(lines[-1] + character, font=font) > width:
                    lines.append("")
                lines[-1] += character
        return lines


def bytes_text(size: int) -> str:
    """Bytes as a person says them: "1.18 GB", "24.6 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
