"""A scene -> a picture, drawn with pillow at twice the size and scaled down with a filter as wide as two pixels.

All lengths are fractions of the picture's height H; x positions are fractions of its width. The table begins at TABLE,
pots stand on POT_BOTTOM; the judge relies on both.
"""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from .scene import Scene

Colour = tuple[int, int, int]

OVERSAMPLING = 2
TABLE, POT_BOTTOM = 0.80, 0.905
TABLE_COLOUR: Colour = (176, 148, 120)
TRUNK: Colour = (104, 72, 50)
POT_COLOURS: dict[str, Colour] = {
    "blue": (48, 84, 190),
    "white": (240, 238, 232),
    "black": (38, 38, 44),
    "terracotta": (192, 84, 48),
    "green": (40, 140, 104),
    "yellow": (232, 190, 44),
}
FOLIAGE_COLOURS: dict[str, Colour] = {
    "green": (66, 140, 58),
    "yellow": (226, 196, 48),
    "orange": (228, 122, 30),
    "red": (186, 34, 44),
    "pink": (238, 146, 182),
}
SKIES: dict[str, Colour] = {
    "cream": (250, 243, 228),
    "blue": (118, 178, 230),
    "sunset": (104, 66, 132),
    "night": (12, 16, 46),
    "grey": (142, 150, 158),
}
HORIZONS: dict[str, Colour] = {
    "cream": (240, 226, 202),
    "blue": (214, 232, 244),
    "sunset": (252, 164, 92),
    "night": (48, 58, 110),
    "grey": (204, 208, 211),
}
POSITIONS = {1: (0.5,), 2: (0.29, 0.71), 3: (0.19, 0.5, 0.81)}
POT_WIDTHS = {1: 0.36, 2: 0.27, 3: 0.20}
TREE_HEIGHTS = {1: 0.70, 2: 0.60, 3: 0.52}


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of b in a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def shade(colour: Colour, amount: float) -> Colour:
    """Lighter for amount > 0, darker below."""
    return mix(colour, (255, 255, 255) if amount > 0 else (0, 0, 0), abs(amount))


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The RGB picture of `scene`, width x height pixels."""
    canvas = _Canvas(scene, width * OVERSAMPLING, height * OVERSAMPLING)
    canvas.sky()
    canvas.table()
    spread = min(1.0, width / height)
    for i, x in enumerate(POSITIONS[scene.count]):
        canvas.rng = random.Random(scene.variant + 100 * i)
        canvas.shadow(x, spread)
        canvas.tree(x, canvas.rng.uniform(0.92, 1.0), spread)
        canvas.pot(x, spread)
    canvas.rng = random.Random(0)
    canvas.ground_marks()
    if scene.season == "winter":
        canvas.snowflakes()
    return canvas.image.resize((width, height), Image.Resampling.BILINEAR)


class _Canvas:
    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene, self.width, self.height, self.rng = scene, width, height, random.Random(0)
        self.image = Image.new("RGB", (width, height))
        self.pen = ImageDraw.Draw(self.image)

    def _disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """An ellipse around pixel (x, y)."""
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def sky(self) -> None:
        """Vertical gradient, then what hangs in it: hills, moon and stars, clouds."""
        scene, rng, w, h = self.scene, self.rng, self.width, self.height
        rows = np.linspace(0, 1, round(h * TABLE))[:, None]
        colours = np.array(SKIES[scene.background]) * (1 - rows) + np.array(HORIZONS[scene.background]) * rows
        block = np.repeat(colours[:, None], w, axis=1).round().astype(np.uint8)
        self.image.paste(Image.fromarray(block), (0, 0))
        if scene.background in ("blue", "sunset", "grey"):
            hill = mix(HORIZONS[scene.background], SKIES[scene.background], 0.45)
            phase = rng.uniform(0, math.tau)
            for depth in (0.0, 1.0):
                top = 0.66 + 0.06 * depth
                line = [
                    (x, h * (top + 0.025 * math.sin(7 * x / w + phase + 2 * depth) + 0.012 * math.sin(17 * x / w)))
                    for x in range(0, w + 8, 8)
                ]
                tone = mix(hill, HORIZONS[scene.background], 0.45 - 0.25 * depth)
                self.pen.polygon([(0, h), *line, (w, h)], fill=tone)
        if scene.background == "night":
            for _ in range(26):
                x, y, r = rng.uniform(0, w), rng.uniform(0, 0.6 * h), rng.uniform(0.002, 0.0042) * h
                self._disc(x, y, r, r, mix((255, 255, 235), SKIES["night"], rng.uniform(0, 0.5)))
            x, y, r = w * 0.86, h * 0.13, h * 0.065
            self._disc(x, y, 1.35 * r, 1.35 * r, (40, 46, 84))
            self._disc(x, y, r, r, (248, 242, 214))
            self._disc(x - 0.3 * r, y + 0.2 * r, 0.18 * r, 0.18 * r, (226, 219, 190))
            self._disc(x + 0.25 * r, y - 0.3 * r, 0.12 * r, 0.12 * r, (226, 219, 190))
        if scene.background == "sunset":
            x, y, r = w * 0.14, h * 0.60, h * 0.075
            self._disc(x, y, 1.3 * r, 1.3 * r, (253, 186, 110))
            self._disc(x, y, r, r, (255, 226, 150))
        if scene.background == "blue":
            for x, y in ((0.14, 0.13), (0.82, 0.20)):
                x += rng.uniform(-0.03, 0.03)
                for dx, dy, r in ((-0.07, 0.01, 0.035), (0, -0.01, 0.05), (0.07, 0.012, 0.032)):
                    self._disc(x * w + dx * h, (y + dy) * h, 1.3 * r * h, r * h, (244, 248, 252))

    def table(self) -> None:
        """A board with grain, darker at night, white in winter."""
        w, h, rng = self.width, self.height, self.rng
        base = self.table_colour()
        self.pen.rectangle((0, h * TABLE, w, h), fill=base)
        self.pen.rectangle((0, h * TABLE, w, h * (TABLE + 0.012)), fill=shade(base, 0.25))
        if self.scene.season != "winter":
            for _ in range(7):
                y, x, length = (
                    rng.uniform(TABLE + 0.03, 0.99) * h,
                    rng.uniform(-0.1, 0.9) * w,
                    rng.uniform(0.2, 0.5) * w,
                )
                self.pen.line((x, y, x + length, y), fill=shade(base, -0.12), width=max(1, h // 200))

    def table_colour(self) -> Colour:
        """Colour of the table's top in this season."""
        return (204, 217, 238) if self.scene.season == "winter" else TABLE_COLOUR

    def shadow(self, x: float, spread: float) -> None:
        """A soft dark ellipse under a pot."""
        wide = POT_WIDTHS[self.scene.count] * self.height * spread
        self._disc(
            x * self.width + 0.05 * wide,
            (POT_BOTTOM + 0.004) * self.height,
            0.58 * wide,
            0.017 * self.height,
            shade(self.table_colour(), -0.28),
        )

    def pot(self, x: float, spread: float) -> None:
        """A glazed pot with rim, feet, a light and a dark side."""
        scene, h = self.scene, self.height
        wide = POT_WIDTHS[scene.count] * h * spread
        tall = {"tray": 0.085, "bowl": 0.105, "tall": 0.125}[scene.shape] * h
        foot = {"tray": 0.86, "bowl": 0.55, "tall": 0.66}[scene.shape]
        wide *= {"tray": 1.06, "bowl": 0.98, "tall": 0.86}[scene.shape]
        bottom, middle = POT_BOTTOM * h, x * self.width
        top = bottom - tall
        colour = POT_COLOURS[scene.pot]
        box = (int(middle - wide), int(top - 0.03 * h), int(middle + wide), int(bottom + 0.02 * h))
        size = (box[2] - box[0], box[3] - box[1])
        mask = Image.new("L", size, 0)
        pen = ImageDraw.Draw(mask)
        cx, ty, by = middle - box[0], top - box[1], bottom - box[1]
        outline = []
        for i in range(13):
            t = i / 12
            curve = math.sqrt(1 - t * t) if scene.shape == "bowl" else 1 - t
            half = wide / 2 * (foot + (0.97 - foot) * curve)
            outline.append((half, ty + t * (by - ty)))
        pen.polygon([(cx + a, b) for a, b in outline] + [(cx - a, b) for a, b in reversed(outline)], fill=255)
        rim = 0.022 * h
        pen.rounded_rectangle((cx - wide / 2, ty - rim * 0.3, cx + wide / 2, ty + rim), radius=rim * 0.4, fill=255)
        for side in (-1, 1):
            f = cx + side * wide * foot * 0.36
            pen.rectangle((f - 0.05 * wide, by - 1, f + 0.05 * wide, by + 0.012 * h), fill=255)
        across = np.linspace(-1.0, 1.0, size[0])[None, :] * wide / max(wide, 1)
        light = 0.30 * np.exp(-(((across + 0.28) / 0.16) ** 2)) - 0.30 * np.clip(across * 1.6, 0, 1)
        down = np.zeros((size[1], 1))
        down[: int(ty + rim)] = 0.12
        down[int(ty + rim) : int(ty + rim * 1.35)] = -0.22
        light = light + down
        target = np.where(light[..., None] > 0, 255.0, 0.0)
        block = np.array(colour)[None, None] + (target - np.array(colour)) * np.abs(light)[..., None] * 0.8
        self.image.paste(Image.fromarray(block.round().astype(np.uint8)), box[:2], mask)
        if scene.season == "winter":
            self.pen.rounded_rectangle(
                (middle - wide * 0.5, top - 0.012 * h, middle + wide * 0.5, top + 0.004 * h), radius=0.01 * h,
                fill=(247, 249, 252),
            )  # fmt: skip
        else:
            self._disc(middle, top - 0.004 * h, wide * 0.40, 0.012 * h, (86, 104, 52))

    def tree(self, x: float, size: float, spread: float) -> None:
        """A curved trunk with branches, each ending in a pad of leaves."""
        scene, rng, h = self.scene, self.rng, self.height
        tall = TREE_HEIGHTS[scene.count] * size * h
        wide = spread * tall * {1: 0.88, 2: 0.62, 3: 0.52}[scene.count]
        foot_y = (POT_BOTTOM - 0.085) * h
        lean = {"upright": 0.0, "left": -1.0, "right": 1.0}[scene.lean]
        bend = rng.uniform(0.05, 0.085) * (rng.choice((-1, 1)) if lean == 0 else -lean)

        def at(t: float) -> tuple[float, float]:
            """A point of the trunk, t from 0 (pot) to 1 (top)."""
            sway = bend * math.sin(math.tau * t * 0.85) * (1 - 0.4 * t) + 0.20 * lean * t**1.3
            return x * self.width + sway * wide * 1.4, foot_y - 0.80 * tall * t

        pads = [(0.98, 0.0, 0.25)]
        side = rng.choice((-1, 1))
        for t, reach in ((0.78, 0.27), (0.60, 0.36), (0.42, 0.42)):
            for s in (side, -side):
                pads.append((t + rng.uniform(-0.03, 0.03) + (0.05 if s == side else 0), s * reach, 0.24))
        for t, reach, _ in pads[1:]:
            bx, by = at(max(t - 0.14, 0.05))
            px, py = at(t)
            px += reach * wide * 0.8
            self._limb([(bx, by), ((bx + px) / 2, (by + py) / 2 + 0.02 * h), (px, py)], 0.030 * tall, 0.012 * tall)
        self._limb([at(i / 14) for i in range(15)], 0.085 * tall, 0.022 * tall, bark=True)
        for side in (-1, 1):
            fx, fy = at(0.03)
            self._limb([(fx, fy), (fx + side * 0.07 * tall, foot_y + 0.012 * h)], 0.05 * tall, 0.015 * tall)
        for t, reach, r in sorted(pads, key=lambda p: p[0]):
            px, py = at(t)
            self._pad(px + reach * wide, py - 0.01 * h, r * wide * 1.06, r * tall * 0.36)

    def _limb(self, points: list[tuple[float, float]], first: float, last: float, bark: bool = False) -> None:
        """A tapering line of wood with a light and a dark edge."""
        n = len(points) - 1
        colour = mix(TRUNK, (30, 24, 40), 0.35) if self.scene.background == "night" else TRUNK
        for offset, share, tone in (
            (0.0, 1.0, shade(colour, -0.28)),
            (-0.16, 0.70, colour),
            (-0.30, 0.26, shade(colour, 0.22)),
        ):
            for i in range(n):
                (x0, y0), (x1, y1) = points[i], points[i + 1]
                steps = max(2, int(abs(x1 - x0) + abs(y1 - y0)) // 3)
                for j in range(steps):
                    t = (i + j / steps) / n
                    r = (first + (last - first) * t) / 2
                    px, py = x0 + (x1 - x0) * j / steps, y0 + (y1 - y0) * j / steps
                    self._disc(px + offset * 2 * r, py, r * share, r * share, tone)
        if bark:
            for i in range(1, n, 2):
                px, py = points[i]
                r = (first + (last - first) * i / n) / 2
                self.pen.line(
                    (px - 0.3 * r, py, px + 0.5 * r, py - 0.5 * r), fill=shade(colour, -0.45), width=max(1, int(r / 5))
                )

    def _pad(self, x: float, y: float, rx: float, ry: float) -> None:
        """A cloud of leaves: dark below, light above, single leaves on it, blossoms or snow by season."""
        rng, season = self.rng, self.scene.season
        base = FOLIAGE_COLOURS[self.scene.foliage]
        if self.scene.background == "night":
            base = mix(base, (16, 18, 60), 0.18)
        lobes = [(-0.55, 0.12, 0.52), (0.55, 0.12, 0.52), (-0.2, -0.18, 0.62), (0.25, -0.15, 0.6), (0.0, 0.1, 0.72)]
        for tone, dy, scale in ((shade(base, -0.32), 0.22, 1.0), (base, 0.0, 0.94), (shade(base, 0.16), -0.28, 0.62)):
            for lx, ly, r in lobes:
                self._disc(x + lx * rx, y + (ly + dy) * ry, r * rx * scale, 1.1 * r * ry * scale, tone)
        leaf = max(1.2, 0.075 * ry + 0.004 * self.height)
        for _ in range(26):
            a, r = rng.uniform(0, math.tau), math.sqrt(rng.random())
            px, py = x + math.cos(a) * r * rx * 0.98, y + math.sin(a) * r * ry * 0.95
            light = 0.30 - 0.5 * (py - y + ry) / (2 * ry) + rng.uniform(-0.1, 0.1)
            self._disc(px, py, leaf * 1.25, leaf * 0.8, shade(base, max(-0.4, min(0.35, light))))
        if season == "spring":
            r = max(1.5, 0.0105 * self.height)
            petal = (255, 250, 252) if self.scene.foliage != "yellow" else (250, 244, 255)
            for _ in range(6):
                a, d = rng.uniform(0, math.tau), math.sqrt(rng.random()) * 0.8
                px, py = x + math.cos(a) * d * rx, y + math.sin(a) * d * ry
                for k in range(5):
                    b = math.tau * k / 5
                    self._disc(px + math.cos(b) * r * 0.8, py + math.sin(b) * r * 0.8, r * 0.7, r * 0.7, petal)
                self._disc(px, py, r * 0.55, r * 0.55, (232, 120, 160))
        if season == "winter":
            for lx, ly, r in lobes[:4]:
                self._disc(x + lx * rx, y + (ly - 0.46) * ry, r * rx * 0.80, 0.42 * r * ry, (246, 249, 253))

    def ground_marks(self) -> None:
        """What lies on the table in each season: petals, grass, leaves, snow."""
        rng, w, h, season = self.rng, self.width, self.height, self.scene.season
        if season == "summer":
            for _ in range(int(95 * w / h)):
                x, y = rng.uniform(0, w), rng.uniform(0.945, 1.0) * h
                for k in (-1, 0, 1):
                    tip = (x + k * 0.014 * h, y - rng.uniform(0.025, 0.05) * h)
                    tone = mix((92, 170, 48), (52, 120, 40), rng.random())
                    self.pen.polygon([(x - 0.005 * h, y), (x + 0.005 * h, y), tip], fill=tone)
        elif season == "autumn":
            for _ in range(int(48 * w / h)):
                x, y, r = rng.uniform(0, w), rng.uniform(0.925, 0.995) * h, rng.uniform(0.010, 0.016) * h
                tone = rng.choice(((206, 84, 24), (188, 52, 30), (222, 134, 30)))
                self._disc(x, y, r * 1.3, r * 0.8, tone)
                self._disc(x + r * 0.6, y - r * 0.4, r * 0.8, r * 0.6, shade(tone, -0.18))
        elif season == "winter":
            for _ in range(9):
                x, y = rng.uniform(0, w), rng.uniform(0.93, 1.02) * h
                self._disc(x, y, rng.uniform(0.06, 0.12) * h, 0.016 * h, (232, 239, 249))
        else:
            for _ in range(int(16 * w / h)):
                x, y, r = rng.uniform(0, w), rng.uniform(0.925, 0.99) * h, 0.0075 * h
                self._disc(x, y, r * 1.4, r, (250, 222, 234))

    def snowflakes(self) -> None:
        """Flakes in the air."""
        w, h, rng = self.width, self.height, self.rng
        for _ in range(int(34 * w / h)):
            r = rng.uniform(0.004, 0.008) * h
            self._disc(rng.uniform(0, w), rng.uniform(0, TABLE) * h, r, r, (250, 252, 255))
