"""ComfyUI inside this process, set up as its main.py does it, dynamic VRAM and cudaMallocAsync included.

The order is main.py's: comfy-aimdo, which replaces functions of the driver, then the allocator of torch, then torch.
Standard library only until then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def set_up(
    comfyui: Path, device: str = "cpu", dynamic: bool = True, arguments: Sequence[str] = (), find: bool = True
) -> dict[str, Any]:
    """Call before anything imports torch. Returns facts about what was switched on.

    device: "cpu", or anything else for the GPU that ComfyUI chooses. dynamic=False: ComfyUI's earlier way to manage
    memory. arguments: further ones of main.py. find: put the folder first on the path.
    """
    if find:
        sys.path.insert(0, str(comfyui))
    begin(device, dynamic, arguments)
    return {} if device == "cpu" else finish()


def begin(device: str, dynamic: bool = True, arguments: Sequence[str] = ()) -> None:
    """Sets ComfyUI's options; on a GPU also comfy-aimdo and the allocator, which want to be there before torch."""
    sys.argv = ["main.py", *(["--cpu"] if device == "cpu" else [] if dynamic else ["--disable-dynamic-vram"])]
    sys.argv += arguments
    import comfy.options

    comfy.options.enable_args_parsing()
    if device == "cpu":
        return
    from comfy.cli_args import args, enables_dynamic_vram

    if enables_dynamic_vram() and importlib.util.find_spec("comfy_aimdo"):
        import comfy_aimdo.control

        options = vars(args)  # each ComfyUI has its own
        if "disable_nvml_pressure" in options:
            pressure = not options["disable_nvml_pressure"]
            comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=pressure)
        else:
            comfy_aimdo.control.init()
    import cuda_malloc  # noqa: F401 (sets args.cuda_malloc and PYTORCH_CUDA_ALLOC_CONF)


def finish() -> dict[str, Any]:
    """On a GPU: starts ComfyUI's memory management. Returns facts about it."""
    torch_before = "torch" in sys.modules
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    from comfy.cli_args import args, enables_dynamic_vram

    nvidia = comfy.model_management.is_nvidia() and not comfy.model_management.is_wsl()
    wanted = vars(args).get("enable_dynamic_vram") or (enables_dynamic_vram() and nvidia)
    enabled = bool(wanted and importlib.util.find_spec("comfy_aimdo") and _aimdo_takes_the_devices())
    if enabled:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return {
        "dynamic_wanted": bool(wanted),
        "dynamic": enabled,
        "cuda_malloc": bool(vars(args)["cuda_malloc"]),
        "alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "torch_imported_before": torch_before,
    }


def _aimdo_takes_the_devices() -> bool:
    """Each ComfyUI has its own call for that."""
    import comfy.model_management as management
    import comfy_aimdo.control as control
    from comfy.cli_args import args

    if management.torch_version_numeric < (2, 8):
        return False
    if not hasattr(management, "get_all_torch_devices"):  # ComfyUI before 0.24
        taken = control.init_device(management.get_torch_device().index)
    elif (gigabytes := vars(args).get("vram_headroom")) is not None:
        headroom = int(gigabytes * 1024**3)
        taken = control.init_devices((device.index, headroom) for device in management.get_all_torch_devices())
    else:
        taken = control.init_devices(device.index for device in management.get_all_torch_devices())
    if taken:
        control.set_log_warning()
    return bool(taken)
