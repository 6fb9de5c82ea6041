"""What Patch to BitLinear takes for a dense 4B model in the real host, each way in a process of its own.

The model is synthetic: random bf16 weights of the real shapes. So time, memory and sizes are those of the real one;
the errors are those of Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import session
from .report import show_table

WAYS: dict[str, dict] = {
    "ternary": {},
    "rank32": {"rank": 32},
    "mix": {"target_bytes": 2_500_000_000},
}
"""Way: what it changes of the node's defaults. mix: ternary, 4, 8 and 16 bits within 2500 MB."""


def measure(
    comfyui: Path,
    folder: Path,
    chosen: Sequence[str] | None = None,
    device: str = "cpu",
    ways: Mapping[str, dict] = WAYS,
) -> list[dict]:
    """Prints a row a way as it is done; returns [{"way", "seconds", "peak_bytes", "loaded_peak_bytes", ..}].

    seconds: the quantization alone. peak_bytes: the process's peak, or the GPU's memory's, while it quantizes, with the
    dense model; loaded_peak_bytes: while ComfyUI loads it (only Linux tells them apart, elsewhere the first is that of
    both). Raises SystemExit for a way that is not in `ways`.
    """
    unknown = [way for way in chosen or () if way not in ways]
    if unknown:
        raise SystemExit(f"--ways {unknown[0]} is unknown, expected some of {', '.join(ways)}")
    file = session.dense_file(folder, device)
    print(f"quantizing the linear layers of a dense model of {file.stat().st_size / 1e6:.1f} MB, {device}", flush=True)
    head = ("way", "minutes", "peak MB", "loading MB", "model MB", "bits a weight", "relative error")
    rows: list[dict] = []
    for way in chosen or ways:
        figures = session.run(
            "quantize", f"quantizing, way {way}", comfyui=comfyui, device=device, file=file, options=ways[way]
        )
        rows.append({"way": way, "device": device, **figures})
        shown = (
            way,
            figures["seconds"] / 60,
            figures["peak_bytes"] / 1e6,
            figures["loaded_peak_bytes"] / 1e6,
            figures["bytes"] / 1e6,
            figures["bits"],
            figures["relative_error"],
        )
        show_table(head, [shown], width=14, headed=len(rows) == 1)
    return rows
