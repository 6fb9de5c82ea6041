"""What a loaded packed model is: sizes, bits, backend and why no faster one, as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..kernels import dispatch
from ..weights.packed_weight import PackedWeight
from .layout import is_packed, mode_of, unwrap
from .loader import ATTACHMENT

BF16_BYTES = 2
FONT_SIZE, LINE, MARGIN, LABEL, WIDTH, BAR = 16, 26, 20, 190, 760, 18
COLORS = {"packed": "#3f8f4f", "dense": "#c08a3e", "bf16": "#9aa0a6"}
Line = tuple[str, str]


def describe(model: object) -> list[Line]:
    """[(label, text)] about a ModelPatcher from our loaders. Raises ValueError if no layer of it is packed."""
    packed, dense = _weights(model)
    modes = {mode_of(p) for p in model.model.diffusion_model.parameters() if is_packed(p)}
    if not packed:
        raise ValueError('this model has no packed layer: connect a model from "Load Bonsai Model"')
    report = model.get_attachment(ATTACHMENT)
    device, dtype = model.load_device, model.model.get_dtype_inference()
    choice = dispatch.resolve(dispatch.call_of(device, dtype, packed[0], modes.pop()))
    packed_bytes, dense_bytes = sum(w.nbytes for w in packed), sum(t.nbytes for t in dense)
    numbers = sum(w.shape[0] * w.shape[1] for w in packed)
    whole = numbers + sum(t.numel() for t in dense)
    schemes = sorted({w.scheme for w in packed})
    lines = [
        ("model", f"{', '.join(schemes)}, {whole / 1e9:.3f} billion weights"),
        (
            "packed layers",
            f"{len(packed)} as {', '.join(sorted({w.codec for w in packed}))}, {_mb(packed_bytes)}, "
            f"{8 * packed_bytes / numbers:.3f} bits a weight",
        ),
        ("dense tensors", f"{len(dense)}, {_mb(dense_bytes)}"),
        ("in memory", f"{_mb(packed_bytes + dense_bytes)}; as dense bf16 it would be {_mb(BF16_BYTES * whole)}"),
        ("computes in", f"{str(dtype).removeprefix('torch.')} on {device}"),
        ("backend", f"{choice.backend.name}, {choice.mode}"),
    ]
    lines += [(f"not {name}", reason) for name, reason in choice.declined.items()]
    lines.append(("patched layers", str(len(model.patches))))
    if report is not None:
        lines.append(("file", f"{report.format}, {Path(report.path).name}"))
    return lines


def to_text(lines: Sequence[Line]) -> str:
    """The lines with aligned labels."""
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in lines)


def draw(model: object, lines: Sequence[Line]) -> torch.Tensor:
    """The lines and bars of the memory, packed beside bf16: an IMAGE [1, H, W, 3] float in 0 .. 1."""
    packed, dense = _weights(model)
    parts = {"packed": sum(w.nbytes for w in packed), "dense": sum(t.nbytes for t in dense)}
    whole = BF16_BYTES * (sum(w.shape[0] * w.shape[1] for w in packed) + sum(t.numel() for t in dense))
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


def _weights(model: object) -> tuple[list[PackedWeight], list[torch.Tensor]]:
    """(packed weights, dense tensors) of the transformer as it stands."""
    packed, dense = [], []
    for parameter in model.model.diffusion_model.parameters():
        if is_packed(parameter):
            packed.append(unwrap(parameter))
        else:
            dense.append(parameter)
    return packed, dense


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> str:
    """The text, its middle cut out if it is wider than `width` pixels."""
    shown = text
    while pen.textlength(shown, font=font) > width and len(shown) > 8:
        half = (len(shown) - 4) // 2
        shown = f"{shown[:half]} .. {shown[-half + 2 :]}"
    return shown


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
