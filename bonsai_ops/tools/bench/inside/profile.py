"""The profile of one step, a process of its own (session.py): profile {"file", "size", "options"}.

A TorchDispatchMode times every operation that reaches torch and walks the Python stack to who asked for it. The packed
product is one operation (bonsai::linear); what it does inside is not taken apart.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...environment import PLUGIN
from .start import start, synchronise
from .step import load, steps

KINDS = (
    # (kind, parts of names of functions whose operations belong to it, parts of names of operations)
    ("packed linear", (), ("bonsai",)),
    ("RoPE", ("rope",), ("rope",)),
    ("attention", ("attention",), ("scaled_dot_product",)),
    ("dense linear", (), ("aten.linear", "aten.mm", "aten.addmm", "aten.bmm")),
    ("norm", (), ("norm",)),
    ("modulation", ("apply_mod",), ("addcmul",)),
    ("SwiGLU", ("SiLUActivation",), ("silu",)),
    ("cast", (), ("_to_copy", "aten.to.")),
    ("copy", (), ("copy_", "clone", "aten.cat", "contiguous", "flatten")),
)
"""The first that fits names the kind of an operation; functions are looked for in the innermost frames."""
INNERMOST = 3


def kind_of(op: str, functions: list[str]) -> str:
    """The kind of operation `op` asked for in `functions`, innermost first."""
    for kind, names, parts in KINDS:
        if any(part in op for part in parts) or any(name in f for name in names for f in functions[:INNERMOST]):
            return kind
    return "residual and other elementwise" if op.startswith("aten") else "other"


class StepProfile(TorchDispatchMode):
    """Seconds, calls and result bytes of every operation, by operation and place."""

    def __init__(self, device: str, folders: dict[str, str]) -> None:
        """folders: {cause: folder}; the innermost frame of a file in one of them is the place of an operation."""
        super().__init__()
        self.device, self.folders = device, folders
        self.table: dict[tuple[str, str, str, str], list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        synchronise(self.device)
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronise(self.device)
        seconds = time.perf_counter() - started
        cause, place, functions = self._asked_by(sys._getframe(1))
        op = str(func).removesuffix(".default")
        entry = self.table.setdefault((kind_of(op, functions), op, cause, place), [0, 0.0, 0])
        entry[0] += 1
        entry[1] += seconds
        entry[2] += result.nbytes if isinstance(result, torch.Tensor) else 0
        return result

    def _asked_by(self, frame: FrameType | None) -> tuple[str, str, list[str]]:
        """(cause, file:line function, functions) of the frames in `folders`, innermost first."""
        cause, place, functions = "", "", []
        while frame is not None and len(functions) < INNERMOST:
            file = frame.f_code.co_filename
            found = next((name for name, folder in self.folders.items() if file.startswith(folder)), None)
            if found and "bench" not in Path(file).parts:
                owner = frame.f_locals.get("self")
                name = frame.f_code.co_name
                function = f"{type(owner).__name__}.{name}" if isinstance(owner, torch.nn.Module) else name
                functions.append(function)
                if not cause:
                    cause, place = found, f"{Path(file).name}:{frame.f_lineno} {function}"
            frame = frame.f_back
        return cause or "other", place, functions

    def rows(self) -> list[dict]:
        """{"kind", "op", "cause", "place", "calls", "seconds", "bytes"}, most expensive first."""
        rows = [
            {"kind": kind, "op": op, "cause": cause, "place": place, "calls": n, "seconds": seconds, "bytes": nbytes}
            for (kind, op, cause, place), (n, seconds, nbytes) in self.table.items()
        ]
        return sorted(rows, key=lambda row: -row["seconds"])


def main(argv: list[str]) -> int:
    """Loads the model, samples a step to warm up and one under the profile; prints the figures."""
    options = start(argv)
    import comfy_kitchen

    profile = StepProfile(
        options["device"],
        {
            "plugin": str(PLUGIN / "bonsai_ops"),
            "ComfyUI": str(Path(options["comfyui"])),
            "comfy-kitchen": str(Path(comfy_kitchen.__file__).parent),
        },
    )
    with torch.inference_mode():
        model = load("ours", options["file"], options["options"])
        seconds = steps(model, options["size"], options["device"], count=1, last=profile)[-1][0]
    rows = profile.rows()
    outside = seconds - sum(row["seconds"] for row in rows)
    print(json.dumps({"step_s": seconds, "outside_s": outside, "rows": rows}))
    return 0
