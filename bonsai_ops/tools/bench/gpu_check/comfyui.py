"""ComfyUI inside this process, set up as its main.py does it, dynamic VRAM and cudaMallocAsync included."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def start(comfyui: Path, device: str, dynamic: bool = True) -> dict[str, Any]:
    """Call before anything imports torch. Returns facts about what was switched on."""
    base = tempfile.mkdtemp(prefix="comfy-base-")
    sys.path[:0] = [str(comfyui)]
    sys.argv = ["main.py", "--base-directory", base]
    sys.argv += ["--cpu"] if device == "cpu" else ([] if dynamic else ["--disable-dynamic-vram"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import args, enables_dynamic_vram

    if enables_dynamic_vram():
        comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=not args.disable_nvml_pressure)
    import cuda_malloc  # noqa: F401 (sets args.cuda_malloc and PYTORCH_CUDA_ALLOC_CONF)

    torch_before = "torch" in sys.modules
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    enabled = False
    if enables_dynamic_vram() and comfy.model_management.is_nvidia():
        devices = comfy.model_management.get_all_torch_devices()
        enabled = bool(comfy_aimdo.control.init_devices((d.index, int(args.vram_headroom * 1024**3)) for d in devices))
        if enabled:
            comfy_aimdo.control.set_log_warning()
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            comfy.memory_management.aimdo_enabled = True
    return {
        "dynamic_wanted": enables_dynamic_vram(),
        "dynamic": enabled,
        "cuda_malloc": bool(args.cuda_malloc),
        "alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "torch_imported_before": torch_before,
    }
