"""`python -m bonsai_ops.tools.bench.inside MODULE OPTIONS`: ComfyUI as its main.py sets it up, then MODULE's `main`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from .comfyui import set_up


def main(argv: list[str]) -> int:
    """Runs the module; what was switched on in ComfyUI joins its options as "host"."""
    module, options = argv[0], json.loads(argv[1])
    options["host"] = set_up(Path(options["comfyui"]), options.get("device", "cpu"), options.get("dynamic", True))
    return importlib.import_module(f"{__package__}.{module}").main([json.dumps(options)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
