"""What the benchmarks work with; the plugin starts without these."""

from __future__ import annotations

from .need import PATCHER, Need

NEEDS = (
    Need("tools/bench/inside", "comfy.options.enable_args_parsing", "to set the options of ComfyUI"),
    Need("tools/bench/inside", "comfy.ops.manual_cast", "to time a layer", "Linear", takes="bias dtype device"),
    Need("tools/bench/inside", "comfy.cli_args", "to set its memory management up", "args enables_dynamic_vram"),
    Need(
        "tools/bench/inside",
        "comfy.model_management",
        "to set its memory management up",
        "is_nvidia is_wsl torch_version_numeric get_torch_device",
    ),
    Need(
        "tools/bench/inside",
        "comfy.model_management.get_all_torch_devices",
        "to set its memory management up",
        costs="",
        since="0.24",
    ),
    Need(
        "tools/bench/inside",
        "comfy.model_patcher",
        "to set its memory management up",
        "CoreModelPatcher ModelPatcherDynamic",
    ),
    Need("tools/bench/inside", "comfy.memory_management.aimdo_enabled", "to set its memory management up"),
    Need("tools/bench/inside", "comfy.sd.load_diffusion_model", "to time dense models", takes="model_options"),
    Need("tools/bench/inside", "comfy.sd.load_clip", "to time dense models", takes="clip_type"),
    Need("tools/bench/inside", "comfy.sd.VAE", "to time dense models", takes="sd metadata"),
    Need("tools/bench/inside", "comfy.utils.load_torch_file", "to time dense models", takes="return_metadata"),
    Need("tools/bench/inside", "comfy.sd.CLIPType", "to time dense models", "FLUX2"),
    Need("tools/bench/inside", "comfy.model_management.cleanup_models", "to time dense models one by one"),
    Need("tools/bench/inside", "comfy.sd.load_lora_for_models", "to time LoRAs"),
    Need("tools/bench/inside", "comfy.sample.prepare_noise", "to time steps and pictures"),
    Need(
        "tools/bench/inside", "comfy.sample.sample_custom", "to time steps and pictures", takes="callback disable_pbar"
    ),
    Need("tools/bench/inside", PATCHER, "to time models one by one", "clone add_callback", "model"),
    Need("tools/bench/inside", "comfy_extras.nodes_train.TrainLoraNode", "to time training", "execute"),
    Need("tools/bench/inside", "comfy.patcher_extension.CallbacksMP", "to time training", "ON_PRE_RUN"),
    Need("tools/bench/inside", "comfy.model_management.get_free_memory", "to time what fits"),
    Need("tools/bench/inside", "comfy_kitchen", "to tell its kernels from others", "__file__"),
    Need("tools/bench/inside", "comfy.samplers.sampler_object", "to time steps and pictures"),
)
