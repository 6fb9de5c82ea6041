"""What a loaded packed model is: sizes, bits, backend and why no faster one, as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .inventory import take_inventory

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

BF16_BYTES = 2
FONT_SIZE, LINE, MARGIN, LABEL, WIDTH, BAR = 16, 26, 20, 190, 760, 18
COLORS = {"packed": "#3f8f4f", "dense": "#c08a3e", "bf16": "#9aa0a6"}
Line = tuple[str, str]


def describe(model: ModelPatcher) -> list[Line]:
    """[(label, text)] about a model from our loaders. Raises ValueError if no layer of it is packed."""
    found = take_inventory(model)
    lines = [
        ("model", f"{', '.join(found.schemes)}, {found.weights / 1e9:.3f} billion weights"),
        (
            "packed layers",
            f"{found.packed_layers} as {', '.join(found.codecs)}, {_mb(found.packed_bytes)}, "
            f"{8 * found.packed_bytes / found.packed_weights:.3f} bits a weight",
        ),
        ("dense tensors", f"{found.dense_tensors}, {_mb(found.dense_bytes)}"),
        ("in memory", f"{_mb(found.resident_bytes)}; as dense bf16 it would be {_mb(BF16_BYTES * found.weights)}"),
        ("computes in", f"{found.dtype} on {found.device}"),
        ("backend", f"{found.backend}, {found.mode}"),
    ]
    lines += [(f"not {name}", reason) for name, reason in found.declined.items()]
    lines.append(("patched layers", str(len(model.patches))))
    if found.origin is not None:
        lines.append(("file", f"{found.origin.format}, {Path(found.origin.path).name}"))
        if found.origin.release:
            lines.append(("release", found.origin.release))
    return lines


def to_text(lines: Sequence[Line]) -> str:
    """The lines with aligned labels."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in lines)


def draw(model: ModelPatcher, lines: Sequence[Line]) -> torch.Tensor:
    """The lines and bars of the memory, packed beside bf16: an IMAGE [1, H, W, 3] float in 0 .. 1."""
    found = take_inventory(model)
    parts = {"packed": found.packed_bytes, "dense": found.dense_bytes}
    whole = BF16_BYTES * found.weights
    height = 2 * MARGIN + LINE * (len(lines) + 1) + 2 * (BAR + 8)
    picture = Image.new("RGB", (WIDTH, height), "#202124")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for i, (label, text) in enumerate(lines):
        y = MARGIN + i * LINE
        pen.text((MARGIN, y), label, fill="#9aa0a6", font=font)
        pen.text((LABEL, y), _fit(pen, text, font, WIDTH - LABEL - MARGIN), fill="#e8eaed", font=font)
    y, scale = MARGIN + (len(lines) + 1) * LINE, (WIDTH - 2 * MARGIN) / max(whole, sum(parts.values()))
    x = MARGIN
    for name, size in parts.items():
        pen.rectangle((x, y, x + max(1, round(size * scale)), y + BAR), fill=COLORS[name])
        x += max(1, round(size * scale))
    pen.text((x + 8, y), "this model: packed, dense", fill="#9aa0a6", font=font)
    pen.rectangle((MARGIN, y + BAR + 8, MARGIN + round(whole * scale), y + 2 * BAR + 8), fill=COLORS["bf16"])
    pen.text((MARGIN + 8, y + BAR + 8), "the same model in bf16", fill="#202124", font=font)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).unsqueeze(0)


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> str:
    """The text, its middle cut out if it is wider than `width` pixels."""
    shown = text
    while pen.textlength(shown, font=font) > width and len(shown) > 8:
        half = (len(shown) - 4) // 2
        shown = f"{shown[:half]} .. {shown[-half + 2 :]}"
    return shown


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
