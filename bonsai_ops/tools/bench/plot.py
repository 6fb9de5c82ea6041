"""The figures as one PNG of horizontal bars, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .table import BENCHMARKS
from .ways import LAYER_WAYS, OURS, PROGRAMS, RIVAL, STEP_WAYS, SWEEP_WAYS, Way, named

WIDTH, MARGIN, LABEL, VALUE = 1200, 40, 340, 150
BAR, GAP, GROUP_GAP, TITLE, NOTE = 22, 6, 18, 34, 26
INK, PALE, LINE, PAPER = (33, 37, 41), (108, 117, 125), (206, 212, 218), (255, 255, 255)


@dataclass(frozen=True)
class Bar:
    """One bar. `text`: what stands behind it."""

    label: str
    value: float
    text: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Panel:
    """Groups of bars over one scale. `mark`: (value, label) of a line through all of them."""

    title: str
    note: str
    groups: Sequence[tuple[str, Sequence[Bar]]]
    mark: tuple[float, str] | None = None

    @property
    def height(self) -> int:
        """Pixels."""
        bars = sum(len(group) * (BAR + GAP) + GROUP_GAP for _, group in self.groups)
        return TITLE + NOTE + (22 if self.mark else 6) + bars


def draw(file: Path, figures: Mapping[str, object]) -> tuple[int, int] | None:
    """Draws what `figures` holds of the benchmarks that have a panel; (width, height), None if nothing."""
    panels = [b.panel(figures[b.name]) for b in BENCHMARKS if b.panel and figures.get(b.name)]
    if not panels:
        return None
    machine = figures.get("machine") or {}
    height = 2 * MARGIN + sum(panel.height + MARGIN // 2 for panel in panels) + NOTE
    image = Image.new("RGB", (WIDTH, height), PAPER)
    canvas = ImageDraw.Draw(image)
    y = MARGIN
    for panel in panels:
        _draw_panel(canvas, panel, y)
        y += panel.height + MARGIN // 2
    facts = [str(machine[name]) for name in ("gpu", "cpu", "instructions") if machine.get(name)]
    facts += [f"{name} {machine[name]}" for name in ("threads", "torch", "bonsai_image") if machine.get(name)]
    canvas.text((MARGIN, y), ", ".join(facts), fill=PALE, font=_font(15))
    image.save(file, format="PNG", optimize=True)
    return image.size


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; before Pillow 10.1 it has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def _draw_panel(canvas: ImageDraw.ImageDraw, panel: Panel, y: int) -> None:
    canvas.text((MARGIN, y), panel.title, fill=INK, font=_font(24))
    canvas.text((MARGIN, y + TITLE), panel.note, fill=PALE, font=_font(16))
    y += TITLE + NOTE + (22 if panel.mark else 6)
    values = [bar.value for _, group in panel.groups for bar in group]
    room, largest = WIDTH - 2 * MARGIN - LABEL - VALUE, max([*values, panel.mark[0] if panel.mark else 0])
    left, top = MARGIN + LABEL, y
    scale = room / largest if largest else 0
    bottom = y + sum(len(group) * (BAR + GAP) + GROUP_GAP for _, group in panel.groups) - GROUP_GAP
    if panel.mark:
        x = left + panel.mark[0] * scale
        for dash in range(top - 4, bottom, 10):
            canvas.line((x, dash, x, min(dash + 5, bottom)), fill=INK, width=1)
        canvas.text((x, top - 14), panel.mark[1], fill=INK, font=_font(15), anchor="mm")
    for head, group in panel.groups:
        canvas.text((MARGIN, y + BAR / 2), head, fill=INK, font=_font(17), anchor="lm")
        for bar in group:
            canvas.text((left - 12, y + BAR / 2), bar.label, fill=INK, font=_font(16), anchor="rm")
            end = left + max(2, bar.value * scale)
            canvas.rectangle((left, y, end, y + BAR), fill=bar.colour)
            place, font = (end + 8, y + BAR / 2), _font(16)
            canvas.rectangle(canvas.textbbox(place, bar.text, font=font, anchor="lm"), fill=PAPER)
            canvas.text(place, bar.text, fill=INK, font=font, anchor="lm")
            y += BAR + GAP
        y += GROUP_GAP
    canvas.line((left, top - 4, left, bottom), fill=LINE, width=2)


def layers_panel(rows: list[dict]) -> Panel:
    """Speed of each way relative to dense bf16, a group a shape."""
    groups = []
    for row in rows:
        speeds = [(way, row.get(f"{way.name}_vs_bf16")) for way in LAYER_WAYS]
        bars = [_bar(way, speed, f"{speed:.2f} x") for way, speed in speeds if speed is not None]
        groups.append((f"{row['k']} to {row['n']}", bars))
    return Panel(
        f"Linear layers, {rows[0]['m']} tokens",
        "speed relative to a dense bf16 layer, longer is faster",
        groups,
        (1.0, "dense bf16"),
    )


def sweep_panel(rows: list[dict]) -> Panel:
    """Microseconds a token, a group a number of tokens and of pictures at a time."""
    groups = []
    for row in rows:
        costs = [(named(LAYER_WAYS, name), row.get(f"{name}_us_per_token")) for name in SWEEP_WAYS]
        bars = [_bar(way, cost, f"{cost:.0f} us") for way, cost in costs if cost is not None]
        batch = f"{row['batch']} times " if row["batch"] > 1 else ""
        groups.append((f"{batch}{row['m']} tokens", bars))
    return Panel(
        "Cost of a token against the number of tokens and of pictures at a time",
        "microseconds a token in both layers of a single block, shorter is faster; level bars mean linear cost",
        groups,
    )


def step_panel(figures: dict) -> Panel:
    """Seconds of a step."""
    ways = [way for way in STEP_WAYS if f"{way.name}_s" in figures]
    seconds = {way: figures[f"{way.name}_s"] for way in ways}
    texts = {way: f"{seconds[way]:.1f} s, {figures[f'{way.name}_bytes'] / 1e9:.2f} GB" for way in ways}
    return Panel(
        f"One step of the 4B model at {figures['size']}x{figures['size']}",
        "seconds in the real host, shorter is faster; GB of weights",
        [("", [_bar(way, seconds[way], texts[way]) for way in ways])],
    )


def profile_panel(figures: dict) -> Panel:
    """Shares of a step by kind and cause."""
    kinds: dict[tuple[str, str], float] = {("outside of torch", "Python"): figures["outside_s"]}
    for row in figures["rows"]:
        key = (row["kind"], row["cause"])
        kinds[key] = kinds.get(key, 0.0) + row["seconds"]
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    bars = [
        Bar(
            f"{kind} ({cause})",
            seconds,
            f"{100 * seconds / figures['step_s']:.1f} %",
            OURS if cause == "plugin" else RIVAL,
        )
        for (kind, cause), seconds in ranked
    ]
    return Panel(
        f"Where a step at {figures['size']}x{figures['size']} goes",
        f"of {figures['step_s']:.1f} s; green: what the plugin asks for",
        [("", bars)],
    )


def picture_panel(figures: dict) -> Panel:
    """Seconds of each part and of the whole process, a bar a program."""
    groups = []
    parts = {"text encoder": "text_encoder_s", "steps": "steps_s", "VAE decode": "vae_s", "together": "total_s"}
    for label, key in {**parts, "whole process": "whole_s"}.items():
        found = [(way, figures[way.name]) for way in PROGRAMS if way.name in figures]
        seconds = [(way, row[key]) for way, row in found if key in row and row.get("height") in (None, figures["size"])]
        groups.append((label, [_bar(way, value, f"{value:.1f} s") for way, value in seconds]))
    return Panel(
        f"One picture of {figures['size']}x{figures['size']}",
        "seconds, shorter is faster; the whole process loads and writes a PNG too",
        groups,
    )


def _bar(way: Way, value: float, text: str) -> Bar:
    return Bar(way.label, value, text, way.colour)
