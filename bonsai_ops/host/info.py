"""What a loaded packed model is: sizes, bits, backend and why no faster one, as lines of text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import kernels
from .inventory import Inventory, take_inventory
from .sheet import AMBER, FAINT, GREEN, LARGE, SMALL, YELLOW, Sheet, bytes_text

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

BF16_BYTES = 2
LABEL = 150
"""Pixels that the labels have."""
IN_BARS = ("dense tensors", "in memory", "backend")
"""Lines of which the picture tells in another way."""
Line = tuple[str, str]


def describe(model: ModelPatcher, found: Inventory | None = None) -> list[Line]:
    """[(label, text)] about a model from our loaders, whose inventory may be at hand.

    Raises ValueError if no layer of it is packed.
    """
    found = found or take_inventory(model)
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
    if found.device == "cpu":
        threads, against = kernels.threads_told()
        lines.append(("threads", f"{threads}, but {against}" if against else str(threads)))
    lines += [(f"not {name}", reason) for name, reason in found.declined.items()]
    lines += [("timed", f"{products}: {found.timed[products]}") for products in found.timed]
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


def draw(found: Inventory, lines: Sequence[Line]) -> torch.Tensor:
    """The memory as bars beside that of bf16, the backend and why no faster one, then the other lines: an IMAGE
    [1, H, W, 3] float in 0 .. 1.
    """
    sheet, whole, resident = Sheet(), BF16_BYTES * found.weights, found.resident_bytes
    sheet.text(f"{bytes_text(resident)} in memory", LARGE)
    sheet.text(f"{100 * resident / max(1, whole):.0f} % of the {bytes_text(whole)} that bf16 would take", color=FAINT)
    sheet.gap()
    most = max(whole, resident)
    sheet.bar([(found.packed_bytes, GREEN), (found.dense_bytes, AMBER)], most, "this model")
    sheet.bar([(whole, FAINT)], most, "the same model in bf16")
    packed, dense = bytes_text(found.packed_bytes), bytes_text(found.dense_bytes)
    sheet.keys([(f"packed layers {packed}", GREEN), (f"dense tensors {dense}", AMBER)])
    sheet.gap()
    sheet.text(f"{found.backend}, {found.mode}", label="backend", indent=LABEL)
    for name, reason in found.declined.items():
        sheet.text(f"{name}: {reason}", SMALL, YELLOW, label="why not", indent=LABEL)
    sheet.gap()
    for label, text in lines:
        if label not in IN_BARS and label.removeprefix("not ") not in found.declined:
            sheet.text(text, SMALL, label=label, indent=LABEL)
    return torch.from_numpy(sheet.image()).unsqueeze(0)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
