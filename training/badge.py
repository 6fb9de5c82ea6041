"""The icon and the banner of the ComfyUI registry, drawn by the seedling and set by pillow.

The seedling draws in a real ComfyUI, as in a first run, with fixed seeds: on the same machine the files come out the
same to the byte.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bonsai_ops.tools.environment import PLUGIN, link_plugin
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import find_nodes, to_api

ICON, BANNER = PLUGIN / "docs" / "icon.png", PLUGIN / "docs" / "banner.png"
ICON_SIDE, BANNER_SIZE = 400, (1260, 540)
"""Pixels. The registry asks for at most 400 x 400, and 21 : 9."""
TILE, ACROSS, DOWN = 270, 3, 2
DRAWN = 256
WORKFLOW = PLUGIN / "workflows" / "Bonsai 01 - First run, no download.json"
"""Pixels of a side as the seedling draws."""
SEED = 7
PROMPTS = (
    "one pink bonsai tree in a white pot, spring, cream wall",
    "two green bonsai trees in blue pots, summer, blue sky",
    "one orange bonsai tree in a black bowl, autumn, fallen leaves, mist",
    "at sunset, one red bonsai tree in a terracotta bowl",
    "a starry night, three yellow bonsai trees in blue pots",
    "one green bonsai tree in a yellow tray, winter, snow",
)
"""Of the banner; the icon is the second's tree alone."""
ICON_PROMPT = "one green bonsai tree in a blue pot, summer, cream wall"
PAPER, INK, FAINT = (250, 246, 238), (44, 52, 46), (108, 116, 110)
LINES = ("1-bit and ternary FLUX.2 Klein,", "packed in memory, on GPU or CPU,", "with LoRAs, in ComfyUI")


def make(work: Path, comfyui: Path) -> None:
    """Draws both and writes them into docs/."""
    with _seedling(work, comfyui) as draw:
        icon(draw(ICON_PROMPT)).save(ICON, optimize=True)
        banner([draw(prompt) for prompt in PROMPTS]).save(BANNER, optimize=True)


def icon(drawing: Image.Image) -> Image.Image:
    """A drawing as the icon: 400 x 400 pixels, round corners, 128 colours."""
    shape = Image.new("L", (4 * ICON_SIDE, 4 * ICON_SIDE))
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, 4 * ICON_SIDE - 1, 4 * ICON_SIDE - 1), 4 * ICON_SIDE // 6, 255)
    picture = drawing.convert("RGB").resize((ICON_SIDE, ICON_SIDE), Image.Resampling.LANCZOS).convert("RGBA")
    picture.putalpha(shape.resize((ICON_SIDE, ICON_SIDE), Image.Resampling.LANCZOS))
    return picture.quantize(128, Image.Quantize.FASTOCTREE)


def banner(drawings: Sequence[Image.Image]) -> Image.Image:
    """Six drawings as the banner: 1260 x 540 pixels, name and purpose at the left, the drawings at the right."""
    picture = Image.new("RGB", BANNER_SIZE, PAPER)
    left = BANNER_SIZE[0] - ACROSS * TILE
    for i, drawing in enumerate(drawings):
        tile = drawing.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
        picture.paste(tile, (left + i % ACROSS * TILE, i // ACROSS * TILE))
    pen, y = ImageDraw.Draw(picture), BANNER_SIZE[1] // 2 - 90
    pen.text((36, y), "Bonsai Image", INK, ImageFont.load_default(62))
    for i, line in enumerate(LINES):
        pen.text((38, y + 96 + 34 * i), line, FAINT, ImageFont.load_default(24))
    return picture.quantize(256, Image.Quantize.MEDIANCUT)


@contextmanager
def _seedling(work: Path, comfyui: Path) -> Iterator:
    """A function from a prompt to the seedling's drawing of it, in a ComfyUI that runs meanwhile."""
    base = work / "badge"
    link_plugin(base)
    with ComfyServer(Path(sys.executable), comfyui, base) as server:
        saved = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        graph = to_api(saved, server.object_info())

        def draw(prompt: str) -> Image.Image:
            inputs = {"CLIPTextEncode": {"text": prompt}, "BonsaiSampler": {"seed": SEED}}
            inputs["EmptyFlux2LatentImage"] = {"width": DRAWN, "height": DRAWN}
            for kind, values in inputs.items():
                (number,) = find_nodes(graph, kind)
                graph[number]["inputs"].update(values)
            (file,) = server.images(server.wait(server.queue(graph)))
            with Image.open(file) as picture:
                return picture.convert("RGB")

        yield draw
