"""What became of every layer, as text, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...quantize import LayerError
from ..sheet import AMBER, BLUE, FAINT, GAP, GREEN, LARGE, PURPLE, SMALL, YELLOW, Sheet, bytes_text

CHART = 240
"""Pixels of height."""
COLORS = {"ternary": GREEN, "binary": BLUE, "4bit": AMBER, "8bit": PURPLE}
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

    @property
    def dense_bytes(self) -> int:
        """Bytes that it had with all linear layers in 16 bit."""
        return self.other_bytes + sum(2 * layer.weights for layer in self.layers)

    def to_text(self) -> str:
        """Totals, then a line a packed layer, worst first, then what was kept and why."""
        packed, kept = self.packed, [layer for layer in self.layers if layer.form == "kept"]
        weights, size = sum(p.weights for p in packed), sum(p.nbytes for p in packed)
        lines = [self.title]
        if packed:
            lines.append(
                f"{len(packed)} linear layers packed: {_mb(2 * weights)} in 16 bit -> {_mb(size)}, "
                f"{8 * size / weights:.3f} bits a weight"
            )
        lines.append(f"whole model: {_mb(self.dense_bytes)} with all linear layers in 16 bit -> {_mb(self.nbytes)}")
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
        """The sizes, and bars of the relative error of each packed layer's weights in model order, with marks for that
        of its outputs where known: float32 [H, W, 3] in 0 .. 1.
        """
        sheet = Sheet()
        sheet.text(f"{bytes_text(self.nbytes)}; in 16 bit {bytes_text(self.dense_bytes)}", LARGE)
        sheet.text(self.title, color=FAINT)
        sheet.gap()
        packed = sum(layer.nbytes for layer in self.packed)
        whole = max(self.dense_bytes, self.nbytes)
        sheet.bar([(packed, GREEN), (self.nbytes - packed, AMBER)], whole, "packed layers, and what is kept")
        sheet.bar([(self.dense_bytes, FAINT)], whole, "all of it in 16 bit")
        sheet.gap()
        sheet.text(f"{len(self.packed)} of {len(self.layers)} linear layers packed; the relative error of each:", SMALL)
        sheet.gap(2 * GAP)
        columns = [(p.error.relative, COLORS.get(p.form, FAINT), p.error.output) for p in self.packed]
        sheet.columns(columns, CHART, 0.1)
        keys = [(form, COLORS.get(form, FAINT)) for form in dict.fromkeys(p.form for p in self.packed)]
        if self.total("output") is not None:
            keys.append((f"outputs, {self.inputs}", YELLOW))
        sheet.keys(keys)
        return sheet.image()


def count_layers(done: str, total: int, without: Sequence[str]) -> str:
    """A note on how many of the layers were calibrated or measured, with the names of those that were not."""
    names = f"; not called: {', '.join(without)}" if without else ""
    return f"{done}: {total - len(without)} of {total} layers{names}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
