"""Every name of ComfyUI and comfy-kitchen that the plugin leans on, who needs it and why.

A new ComfyUI: run

    BONSAI_COMFYUI=/path/to/ComfyUI python -m tests tests/host/test_contract.py -rA

and read which names are gone and who needs them. tests/unit/test_contract.py compares this table with the code, both
ways. What becomes of a missing name is decided in comfyui.py.
"""

from __future__ import annotations

from . import bench, files, models, nodes, patch
from .need import Need

__all__ = ["NEEDS", "Need"]

NEEDS = (*nodes.NEEDS, *files.NEEDS, *models.NEEDS, *patch.NEEDS, *bench.NEEDS)
