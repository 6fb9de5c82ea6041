"""A step of ComfyUI's Train LoRA on the 4B model in the real host, each model in a process of its own.

The packed model beside a dense one in bf16, behind Right Gradients for Training, at each size: batch 1, a cached text,
checkpoint depth 2, AdamW. Both train in bf16, on a processor without bf16 products in fp32, and with bypass_mode off.
A size that does not fit the memory that is free, or the time that is given, has a row that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import session
from .report import show_table
from .ways import STEP_WAYS, named

SIZES = (512, 1024)
WAYS = ("ours", "dense_bf16")


def measure(
    comfyui: Path,
    folder: Path,
    sizes: Sequence[int] = SIZES,
    rank: int = 16,
    density: str = "compact",
    device: str = "cpu",
    budget: float = 1800.0,
    ways: Sequence[str] = WAYS,
) -> list[dict]:
    """Prints a row as it is done; returns [{"way", "size", "seconds", "step_s", "peak", "sampling_peak", ..}].

    seconds: of a training step. step_s: of a sampling step of the same model. peak, sampling_peak: bytes, of the
    process or on a GPU of its device, while it trains and while it samples. trained: values of the LoRA. budget:
    seconds that training a model at a size may take; why_not: what kept it from being trained, or None.
    """
    first, rows = True, []
    print(f"training a rank {rank} LoRA on every layer of the 4B model, batch 1, {device}", flush=True)
    for size in sizes:
        for way in (named(STEP_WAYS, name) for name in ways):
            file = session.ternary_pack(folder, device) if way.ours else session.dense_file(folder, device)
            figures = session.run(
                "train",
                f"training {way.name} at {size}",
                comfyui=comfyui,
                device=device,
                model=way.model,
                file=file,
                size=size,
                rank=rank,
                budget=budget,
                options={"layout": density} if way.ours else None,
            )
            rows.append({"way": way.name, "size": size, "device": device, "rank": rank, **figures})
            _show(rows[-1], way.label, first)
            first = False
    return rows


def _show(row: dict, label: str, headed: bool) -> None:
    seconds, step, peak, sampling = (row[name] for name in ("seconds", "step_s", "peak", "sampling_peak"))
    trains = seconds is not None
    head = ("way", "size", "dtype", "s a step", "of sampling", "peak MB", "sampling MB", "weights MB")
    shown = (
        *(label, row["size"], row["dtype"], seconds, seconds / step if trains else None),
        *(peak / 1e6 if trains else None, None if sampling is None else sampling / 1e6, row["bytes"] / 1e6),
    )
    show_table(head, [shown], width=13, headed=headed)
    if row["why_not"]:
        print(f"{label} at {row['size']}: not trained, {row['why_not']}", flush=True)
