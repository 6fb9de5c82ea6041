"""`python -m bonsai_ops.tools.environment` with tiny packages in place of the pinned ones: setup_child.py SHA256.

The private environment is made as always, with the real pip, from whatever index pip is told of. SHA256: of the source
distribution that stands for ComfyUI's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PINS = "bonsai_ops.tools.environment.pins"

sys.path.insert(0, str(REPOSITORY))
spec = importlib.util.spec_from_file_location(PINS, REPOSITORY / "bonsai_ops" / "tools" / "environment" / "pins.py")
pins = sys.modules[PINS] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pins)
pins.SOURCES = {pins.NEWEST: pins.Source("9", sys.argv[1])}
pins.COMFYUI_VERSIONS = (pins.NEWEST,)
pins.TORCH_REQUIREMENTS, pins.TORCHAUDIO_REQUIREMENTS = ("bonsai-torch==1",), ("bonsai-audio==1",)

from bonsai_ops.tools.environment import __main__ as command  # noqa: E402

raise SystemExit(command.main([]))
