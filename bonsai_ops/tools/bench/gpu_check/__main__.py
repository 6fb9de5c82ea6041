"""One process of a stage, as drive.py starts it: `.. -m bonsai_ops.tools.bench.gpu_check NAME SETTINGS`, JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace

from .check import Check, Settings
from .stages import PROCESSES


def main(argv: list[str]) -> int:
    """Runs the process to its end; does not come back if nothing was raised."""
    process, settings = PROCESSES[argv[0]], Settings.parse(json.loads(argv[1]))
    if process.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        settings = replace(settings, device="cpu", asked=settings.device)
    check = Check(process.name, settings)
    if process.comfyui:
        check.start(process.comfyui == "dynamic")
    importlib.import_module(f"{__package__}.{process.module}").run(check, process.part)
    sys.stdout.flush()
    os._exit(0)  # nothing that a library does at exit may look like a failure of the stage


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
