"""What became of every layer, as text, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...quantize import LayerError

WIDTH, HEIGHT, MARGIN, FONT_SIZE = 960, 460, 56, 14
COLORS = {"ternary": "#3f8f4f", "binary": "#4f79c0", "4bit": "#c08a3e", "8bit": "#a25bb0"}
OTHER_COLOR, OUTPUT_COLOR = "#9aa0a6", "#f2d16b"
COLUMNS = (
    "layer",
    "form",
    "rows",
    "columns",
    "bits",
    "bytes",
    "bytes_16bit",
    "relative_error",
    "sqnr_db",
    "output_error",
)


@dataclass(frozen=True)
class LayerReport:
    """One layer. form: the recipe, or "kept". nbytes: as it is stored now. reason: why it was kept, in a few words."""

    name: str
    form: str
    shape: tuple[int, ...]
    nbytes: int
    error: LayerError | None = None
    reason: str = ""
    rank: int = 0

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.nbytes / max(1, self.weights)


@dataclass(frozen=True)
class Report:
    """The whole model. other_bytes: tensors that are no linear layer; conv_layers: how many of these are convolutions.

    seconds: what it took. inputs: which ones the errors of the outputs are for.
    """

    title: str
    layers: Sequence[LayerReport]
    other_bytes: int
    conv_layers: int
    seconds: float
    notes: Sequence[str] = ()
    inputs: str = "calibrated inputs"

    @property
    def packed(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.form != "kept"]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.other_bytes + sum(layer.nbytes for layer in self.layers)

    def to_text(self) -> str:
        """Totals, then a line a packed layer, worst first, then what was kept and why."""
        packed, kept = self.packed, [layer for layer in self.layers if layer.form == "kept"]
        weights, size = sum(p.weights for p in packed), sum(p.nbytes for p in packed)
        dense = self.other_bytes + sum(2 * layer.weights for layer in self.layers)
        lines = [self.title]
        if packed:
            lines.append(
                f"{len(packed)} linear layers packed: {_mb(2 * weights)} in 16 bit -> {_mb(size)}, "
                f"{8 * size / weights:.3f} bits a weight"
            )
        lines.append(f"whole model: {_mb(dense)} with all linear layers in 16 bit -> {_mb(self.nbytes)}")
        relative = self.total("relative")
        if relative is not None and relative > 0:
            lines.append(f"relative error of the weights {relative:.4f}, SQNR {-20 * math.log10(relative):.2f} dB")
        elif relative == 0:
            lines.append("the packed weights are exactly those of the model")
        output = self.total("output")
        if output is not None:
            lines.append(f"relative error of the layers' outputs, {self.inputs}: {output:.4f} (root mean square)")
        lines.append(
            f"kept: {len(kept)} linear layers ({_mb(sum(k.nbytes for k in kept))}), other tensors "
            f"{_mb(self.other_bytes)}, {self.conv_layers} convolutions among them"
        )
        lines += [*self.notes, f"{self.seconds:.1f} s", ""]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in sorted(packed, key=lambda p: -p.error.relative):
            made = f"{layer.form} + rank {layer.rank}" if layer.rank else layer.form
            shown = "" if layer.error.output is None else f"  output {layer.error.output:.4f}"
            lines.append(
                f"{layer.name.ljust(width)}  {made:<16} {layer.bits:6.3f} bit {_mb(layer.nbytes):>10}  "
                f"error {layer.error.relative:.4f}  {layer.error.sqnr:6.2f} dB{shown}"
            )
        lines += [f"{layer.name.ljust(width)}  kept: {layer.reason}" for layer in kept]
        return "\n".join(lines)

    def total(self, name: str) -> float | None:
        """Root mean square of the packed layers' errors, where known, weighted by their size; None if none is."""
        found = [(p.weights, error) for p in self.packed if (error := getattr(p.error, name)) is not None]
        if not found:
            return None
        return math.sqrt(sum(n * error**2 for n, error in found) / sum(n for n, _ in found))

    def to_csv(self) -> str:
        """A line a linear layer, columns as in COLUMNS."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            error = layer.error
            known = () if error is None else (error.relative, error.sqnr, error.output)
            numbers = ["" if value is None else f"{value:.6g}" for value in known] or [""] * 3
            size = (f"{layer.bits:.4f}", layer.nbytes, 2 * layer.weights)
            rows, columns = layer.shape[0], math.prod(layer.shape[1:])
            writer.writerow((layer.name, layer.form, rows, columns, *size, *numbers))
        return out.getvalue()

    def draw(self) -> np.ndarray:
        """Bars of the relative error of each packed layer's weights in model order, marks for that of its outputs where
        known: float32 [HEIGHT, WIDTH, 3] in 0 .. 1.
        """
        picture = Image.new("RGB", (WIDTH, HEIGHT), "#202124")
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
        pen.text((MARGIN, 12), self.title, fill="#e8eaed", font=font)
        size = f"{_mb(self.nbytes)}, {len(self.packed)} of {len(self.layers)} linear layers packed"
        subtitle = f"relative error of each packed layer's weights, in model order; {size}"
        pen.text((MARGIN, 32), subtitle, "#9aa0a6", font)
        bottom, height = HEIGHT - 40, HEIGHT - 40 - 64
        top = max([0.1, *(error for p in self.packed for error in (p.error.relative, p.error.output or 0))])
        for i in range(5):
            y = bottom - height * i / 4
            pen.line((MARGIN, y, WIDTH - 16, y), fill="#3c4043")
            pen.text((8, y - 8), f"{top * i / 4:.2f}", fill="#9aa0a6", font=font)
        step = (WIDTH - 16 - MARGIN) / max(1, len(self.packed))
        for i, layer in enumerate(self.packed):
            x = MARGIN + i * step
            y = bottom - max(1, height * layer.error.relative / top)
            right = max(x, x + step - max(1, step / 8))
            pen.rectangle((x, y, right, bottom), fill=COLORS.get(layer.form, OTHER_COLOR))
            if layer.error.output is not None:
                y = bottom - height * layer.error.output / top
                pen.rectangle((x, y - 1, right, y + 1), fill=OUTPUT_COLOR)
        keys = [(form, COLORS.get(form, OTHER_COLOR)) for form in dict.fromkeys(p.form for p in self.packed)]
        if self.total("output") is not None:
            keys.append((f"outputs, {self.inputs}", OUTPUT_COLOR))
        x = MARGIN
        for name, color in keys:
            pen.rectangle((x, HEIGHT - 26, x + 12, HEIGHT - 14), fill=color)
            pen.text((x + 18, HEIGHT - 28), name, fill="#e8eaed", font=font)
            x += 110
        return np.asarray(picture, dtype=np.float32) / 255.0


def count_layers(done: str, total: int, without: Sequence[str]) -> str:
    """A note on how many of the layers were calibrated or measured, with the names of those that were not."""
    names = f"; not called: {', '.join(without)}" if without else ""
    return f"{done}: {total - len(without)} of {total} layers{names}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
