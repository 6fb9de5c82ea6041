"""Reads a picture's attributes back by colour and place; no learned part.

The layout is drawing.py's: pots stand on POT_BOTTOM at POSITIONS, the sky is seen above the trees, the ground below the
pots. Every function takes RGB uint8 [height, width, 3] of any size.
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

from .drawing import FOLIAGE_COLOURS, HORIZONS, POSITIONS, POT_COLOURS, SKIES, TABLE, TABLE_COLOUR, shade

SIDE = 128
"""Pictures are judged at this height."""


def judge(picture: np.ndarray) -> dict[str, str | int]:
    """{attribute: value} for pot, foliage, background, season and count."""
    image = Image.fromarray(picture)
    width = round(SIDE * image.width / image.height)
    pixels = np.asarray(image.resize((width, SIDE), Image.Resampling.BOX)).astype(np.float32)
    background, sky = _background(pixels)
    pot, count = _pots(pixels)
    return {
        "pot": pot,
        "foliage": _foliage(pixels, sky),
        "background": background,
        "season": _season(pixels),
        "count": count,
    }


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """(name, its colours row by row [rows, 3] down to the table), from the rows that trees rarely reach."""
    rows = np.linspace(0, 1, round(SIDE * TABLE))[:, None]
    ramps = {n: np.array(SKIES[n]) * (1 - rows) + np.array(HORIZONS[n]) * rows for n in SKIES}
    top = pixels[: round(0.24 * SIDE)]
    distance = {n: np.median(np.abs(top - ramp[: len(top), None]).sum(2)) for n, ramp in ramps.items()}
    name = min(distance, key=distance.get)
    return name, ramps[name]


def _pots(pixels: np.ndarray) -> tuple[str, int]:
    """(colour, number): the pair whose positions look most like that colour and whose gaps least."""
    height, width = pixels.shape[:2]
    band = pixels[round(0.845 * height) : round(0.885 * height)]
    scale = min(1.0, width / height) * height / width
    best = ("", 0, -np.inf)
    for name, colour in POT_COLOURS.items():
        tones = np.array([colour, shade(colour, 0.2), shade(colour, -0.25)], dtype=np.float32)
        nearness = -np.sqrt(((band[:, :, None] - tones) ** 2).sum(-1)).min(-1).mean(0)  # [width]
        for count, places in POSITIONS.items():
            half = {1: 0.07, 2: 0.05, 3: 0.04}[count] * scale
            inside = np.concatenate([_columns(nearness, x - half, x + half) for x in places])
            others = [
                x for n, xs in POSITIONS.items() if n != count for x in xs if all(abs(x - y) > 0.17 for y in places)
            ]
            gaps = np.concatenate(
                [_columns(nearness, x - 0.03 * scale, x + 0.03 * scale) for x in (*others, *_between(places))]
            )
            score = 2 * inside.mean() - np.maximum(gaps, -90).mean()
            if score > best[2]:
                best = (name, count, score)
    return best[0], best[1]


def _between(places: tuple[float, ...]) -> tuple[float, ...]:
    """Points halfway between neighbouring pots, or beside a single one."""
    return tuple((a + b) / 2 for a, b in itertools.pairwise(places)) or (0.17, 0.83)


def _columns(values: np.ndarray, first: float, last: float) -> np.ndarray:
    n = len(values)
    lo = int(first * n)
    return values[lo : max(lo + 1, int(np.ceil(last * n)))]


def _foliage(pixels: np.ndarray, sky: np.ndarray) -> str:
    """The leaf colour of most pixels between sky and table that are neither sky nor white.

    Only the more saturated half is asked: where a picture is soft, blossoms and snow pale the leaves around them, and
    red ones would be read as pink.
    """
    rows = slice(round(0.12 * SIDE), round(0.74 * SIDE))
    area, behind = pixels[rows], sky[rows]
    saturation = area.max(2) - area.min(2)
    far = np.abs(area - behind[:, None]).sum(2) > 70
    chosen = area[far & (saturation > 45)]
    if len(chosen) == 0:
        return min(FOLIAGE_COLOURS)
    purity = (chosen.max(1) - chosen.min(1)) / chosen.max(1)
    chosen = chosen[purity >= np.median(purity)]
    votes = {}
    names = list(FOLIAGE_COLOURS)
    directions = np.stack([_chroma(np.array([c], dtype=np.float32))[0] for c in FOLIAGE_COLOURS.values()])
    nearest = (np.linalg.norm(_chroma(chosen)[:, None] - directions, axis=2)).argmin(1)
    for i, name in enumerate(names):
        votes[name] = (nearest == i).sum()
    return max(votes, key=votes.get)


def _chroma(colours: np.ndarray) -> np.ndarray:
    """Colours [n, 3] with brightness taken out: hue and saturation as a point of a plane."""
    largest = np.maximum(colours.max(1, keepdims=True), 1)
    relative = colours / largest
    a = relative[:, 0] - 0.5 * (relative[:, 1] + relative[:, 2])
    b = (relative[:, 1] - relative[:, 2]) * np.sqrt(3) / 2
    return np.stack([a, b], 1)


def _season(pixels: np.ndarray) -> str:
    """Snow, grass or fallen leaves below the pots, else spring."""
    ground = pixels[round(0.925 * SIDE) :].reshape(-1, 3)
    red, green, blue = ground.T
    if np.median(blue - red) > 5:
        return "winter"
    if (green - red > 12).mean() > 0.12:
        return "summer"
    orange = (red - green > np.array(TABLE_COLOUR)[0] - np.array(TABLE_COLOUR)[1] + 28) & (red - blue > 80)
    return "autumn" if orange.mean() > 0.05 else "spring"
