"""What Patch to BitLinear works with."""

from __future__ import annotations

from .need import BASE_MODEL, BYPASS, BYPASS_WORDS, PATCHER, TENSOR, Need

NEEDS = (
    Need("host/patch/layers.py", "comfy.lora.calculate_weight", "to carry out merges", takes="intermediate_dtype"),
    Need("host/patch/layers.py", TENSOR, "to unpack quantized layers", "dequantize"),
    Need("host/patch/layers.py", PATCHER, "to read", words="model patches weight_wrapper_patches offload_device"),
    Need("host/patch/layers.py", BASE_MODEL, "to find its layers", words="diffusion_model"),
    Need("host/patch/model.py", PATCHER, "to read a model", words="model"),
    Need("host/patch/work.py", "comfy.model_management.soft_empty_cache", "to retry on the CPU"),
    Need("host/patch/work.py", PATCHER, "to choose devices", words="load_device offload_device"),
    Need("host/patch/measure.py", PATCHER, "to compare models", words="model load_device"),
    Need("host/patch/calibrate.py", PATCHER, "to find its layers", words="model"),
    Need(
        "host/patch/carry.py",
        PATCHER,
        "to hand on what was set on the source",
        "add_patches set_injections remove_injections use_ejected",
        "model object_patches wrappers callbacks injections weight_wrapper_patches model_options attachments "
        "additional_models",
    ),
    Need("host/patch/carry.py", BASE_MODEL, "to know its parts", words="diffusion_model"),
    Need("host/patch/carry.py", "comfy.model_management.loaded_models", "to know whose injections are in place"),
    Need(
        "host/patch/carry.py", "comfy.patcher_extension.PatcherInjection", "to hand on injections", words="inject eject"
    ),
    Need("host/patch/carry.py", BYPASS, "to hand on bypass LoRAs", words=BYPASS_WORDS, costs=""),
    Need("host/patch/carry.py", "comfy.weight_adapter.LoRAAdapter", "to know DoRAs", words="weights", costs=""),
    Need("host/patch/assemble.py", TENSOR, "to unpack quantized layers", "dequantize"),
    Need(
        "host/patch/assemble.py",
        PATCHER,
        "to hand on what was set on the source",
        "clone get_clone_model_override",
        "model size parent load_device offload_device cached_patcher_init cached_hook_patches hook_backup "
        "current_hooks is_injected",
    ),
    Need(
        "host/patch/assemble.py",
        BASE_MODEL,
        "to make a twin of it",
        "get_dtype_inference",
        "diffusion_model model_config model_type",
    ),
    Need("host/patch/assemble.py", f"{PATCHER}.clone", "to clone it", takes="disable_dynamic model_override"),
    # recovery
    Need("host/patch/points.py", "folder_paths", "to keep many points on the disk", "get_temp_directory"),
    Need("host/patch/loaded.py", "comfy.samplers.Sampler", "to be given a loaded model", "sample max_denoise"),
    Need("host/patch/loaded.py", "comfy.samplers", "to ask a model", "calc_cond_batch"),
    Need(
        "host/patch/loaded.py",
        "comfy.samplers.CFGGuider",
        "to be given a loaded model",
        words="conds inner_model positive model_options",
    ),
    Need("host/patch/recover.py", "comfy.sample", "noise as ComfyUI makes it", "prepare_noise"),
    Need("host/patch/loaded.py", "comfy.sample", "to have a model loaded", "sample_custom"),
    Need("host/patch/loaded.py", "comfy.sample.sample_custom", "to do so", takes="disable_pbar seed"),
    Need(
        "host/patch/recover.py",
        "comfy.model_management",
        "to train without the original in memory",
        "unload_all_models soft_empty_cache in_training",
    ),
    Need(
        "host/patch/recover.py",
        PATCHER,
        "to train a copy",
        "add_weight_wrapper",
        "model patches weight_wrapper_patches injections load_device",
    ),
    Need("host/patch/loaded.py", BASE_MODEL, "to begin a sampling", words="model_sampling noise_scaling"),
    Need("host/patch/loaded.py", PATCHER, "to name its class", words="model"),
    Need("host/patch/recover.py", BASE_MODEL, "to train its blocks", words="diffusion_model"),
    Need("host/comfyui.py", "comfy.quant_ops.QUANT_ALGOS", "to know scaled columns", costs=""),
    Need("host/comfyui.py", "comfy.quant_ops", "to do so", words="pre_quant_scale parameters", costs="", since="0.30"),
    Need("host/comfyui.py", PATCHER, "to know clones of one model", words="clone_base_uuid", costs="", since="0.24"),
)
