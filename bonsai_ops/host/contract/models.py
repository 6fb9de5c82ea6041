"""What layers and models are, how they are patched, compiled and sampled."""

from __future__ import annotations

from .need import BASE_MODEL, CONFIGURATION, MISFIT, PARAMS, PATCHER, SLOW_LORAS, SLOW_TRAINING, TENSOR, Need

NEEDS = (
    # one layer
    Need("host/layout.py", TENSOR, "to hold packed codes", "dequantize params", "_layout_cls _qdata _params"),
    Need(
        "host/layout.py",
        "comfy_kitchen.tensor.QuantizedLayout",
        "to describe them",
        "quantize dequantize get_plain_tensors state_dict_tensors",
    ),
    Need("host/layout.py", PARAMS, "to describe them", "_tensor_fields copy_from", "orig_dtype orig_shape"),
    Need(
        "host/layout.py",
        "comfy_kitchen.tensor",
        "to make them known",
        "get_layout_class register_layout_class register_layout_op",
    ),
    Need("host/linear.py", TENSOR, "to unpack and save a layer", "dequantize state_dict"),
    Need("host/linear.py", "comfy.ops.manual_cast", "to make all other layers", "Linear Embedding"),
    Need(
        "host/linear.py",
        "comfy.ops.CastWeightBiasOp",
        "to be seen as a layer of its own",
        "comfy_cast_weights weight_function bias_function",
    ),
    Need("host/linear.py", "comfy.ops", "to move weights", "cast_bias_weight uncast_bias_weight run_every_op"),
    Need(
        "host/linear.py", "comfy.ops.cast_bias_weight", "to move weights", takes="dtype device bias_dtype offloadable"
    ),
    Need(
        "host/linear.py",
        "comfy.model_patcher",
        "to find LoRAs of offloaded and dynamic layers, and to be patched",
        words="weight_function weight_lowvram_function convert_weight set_weight inplace_update seed return_weight",
    ),
    Need(
        "host/lora.py",
        "comfy.lora.calculate_weight",
        "to apply what is no plain LoRA",
        words="model_as_lora",
        takes="intermediate_dtype original_weights",
    ),
    Need(
        "host/lora.py",
        "comfy.model_patcher.LowVramPatch",
        "to read the LoRAs of an offloaded layer",
        words="key patches",
        costs=SLOW_LORAS,
    ),
    Need("host/rows.py", "comfy.weight_adapter.LoRAAdapter", "to know a plain LoRA", words="weights", costs=SLOW_LORAS),
    Need(
        "host/rows.py",
        "comfy.weight_adapter.LoHaAdapter",
        "to unpack some rows at a time",
        words="weights loaded_keys",
        costs="",
    ),
    Need(
        "host/attention.py",
        "comfy.ldm.modules.attention.attention_sub_quad",
        "to attend in parts on a CPU",
        words="optimized_attention_override",
        costs="attention on a CPU takes more memory and time",
    ),
    Need("host/attention.py", "comfy.model_management", "to know a CPU", "is_device_cpu"),
    Need("host/attention.py", PATCHER, "to attend in parts on a CPU", words="load_device model_options"),
    # one model
    Need(
        "host/patcher.py",
        PATCHER,
        "to keep packed layers packed when LoRAs and hooks come and go",
        "patch_weight_to_device load partially_load partially_unload loaded_size "
        "unpatch_model model_state_dict state_dict_for_saving pre_run cleanup "
        "add_hook_patches patch_hooks patch_hook_weight_to_device unpatch_hooks get_callbacks add_callback_with_key",
        "model patches backup patches_uuid cached_hook_patches hook_backup weight_wrapper_patches",
    ),
    Need(
        "host/patcher.py",
        f"{PATCHER}.patch_weight_to_device",
        "to be called by it",
        takes="device_to inplace_update return_weight",
    ),
    Need("host/patcher.py", PATCHER, "to say what packed layers need while offloaded", "_load_list", costs=""),
    Need("host/patcher.py", "comfy.model_patcher", "to save layers as they are", words="comfy_patched_weights weight"),
    Need(
        "host/patcher.py", PATCHER, "to save one part of a model", "model_state_dict_for_saving", costs="", since="0.18"
    ),
    Need("host/patcher.py", BASE_MODEL, "to tell a model from a text encoder", words="diffusion_model"),
    Need("host/record.py", PATCHER, "to say what a saved model is", words="model"),
    Need("host/record.py", BASE_MODEL, "to say what a saved model is", words="diffusion_model model_config"),
    Need("host/record.py", CONFIGURATION, "to say what a saved model is", "process_unet_state_dict_for_saving"),
    Need("host/patcher.py", "comfy.patcher_extension.CallbacksMP", "to follow clones", "ON_CLONE"),
    Need("host/patcher.py", "comfy.utils", "to reach a layer by its name", "get_attr set_attr_param"),
    Need(
        "host/model_class.py",
        CONFIGURATION,
        "to make a packed twin of any model",
        "get_model process_unet_state_dict set_inference_dtype custom_operations unet_config sampling_settings "
        "optimizations quant_config",
    ),
    Need(
        "host/model_class.py",
        BASE_MODEL,
        "to make a packed twin of any model",
        "get_dtype_inference",
        "model_config model_type model_sampling diffusion_model manual_cast_dtype",
    ),
    Need("host/model_class.py", "comfy.model_base.model_sampling", "to set how a twin is sampled"),
    Need("host/model_class.py", "comfy.model_base.ModelType", "to set how a twin is sampled", "__members__"),
    Need("host/model_class.py", "comfy.supported_models.models", "to read a saved model of any class"),
    Need("host/model_class.py", PATCHER, "to manage a twin"),
    Need("host/model_class.py", "comfy.model_management.is_device_cpu", "to know a CPU"),
    Need(
        "host/model_class.py",
        "comfy.model_patcher.CoreModelPatcher",
        "to manage a twin by dynamic VRAM",
        costs="patched models and saved ones of other classes do without dynamic VRAM",
    ),
    Need("host/model_class.py", PATCHER, "to know dynamic VRAM", "is_dynamic", costs="dynamic VRAM is not used"),
    Need("host/tensors.py", PATCHER, "to read weights as they were loaded", words="model backup object_patches_backup"),
    Need("host/tensors.py", "comfy.utils", "to read weights as they were loaded", "get_attr set_attr ATTR_UNSET"),
    Need("host/tensors.py", BASE_MODEL, "to read weights as they were loaded", words="diffusion_model"),
    Need("host/inventory.py", PATCHER, "to describe a model", "get_attachment set_attachments", "model load_device"),
    Need("host/inventory.py", BASE_MODEL, "to describe a model", "get_dtype_inference", "diffusion_model"),
    Need("host/info.py", PATCHER, "to describe a model", words="patches"),
    Need("host/save.py", PATCHER, "to save a model without its LoRAs", words="patches"),
    Need("host/fold.py", PATCHER, "to save LoRAs", words="model patches injections weight_wrapper_patches"),
    Need("host/fold.py", BASE_MODEL, "to round as the model does", "get_dtype_inference"),
    Need("host/fold.py", "comfy.sd", "to refuse what lies outside of the weights", words="bypass_lora"),
    # training
    Need("host/gradients.py", PATCHER, "to train right", "clone get_callbacks add_callback_with_key", "model"),
    Need("host/gradients.py", BASE_MODEL, "to find its blocks", words="diffusion_model"),
    Need("host/gradients.py", "comfy.patcher_extension.CallbacksMP", "to follow clones", "ON_CLONE"),
    Need("host/gradients.py", "comfy.ops.CastWeightBiasOp", "to know what is trained", "weight_function"),
    Need(
        "host/adapters.py",
        "comfy.weight_adapter.lora.LoraDiff",
        "to train beside packed weights",
        words="lora_up lora_down lora_mid alpha rank",
        costs=SLOW_TRAINING,
    ),
    Need(
        "host/adapters.py",
        "comfy.weight_adapter.lokr.LokrDiff",
        "to train beside packed weights",
        "w1 w2",
        "use_tucker",
        costs=SLOW_TRAINING,
    ),
    Need("host/adapters.py", "comfy.weight_adapter.oft.OFTDiff", "to train beside packed weights", costs=SLOW_TRAINING),
    # steps
    Need(
        "host/sampling.py", "comfy.sample", "to sample", "fix_empty_latent_channels prepare_noise sample sample_custom"
    ),
    Need("host/sampling.py", "comfy.sample.sample", "to sample", takes="noise_mask callback disable_pbar seed"),
    Need("host/sampling.py", "comfy.sample.sample_custom", "to sample", takes="noise_mask callback disable_pbar seed"),
    Need("host/sampling.py", "comfy.samplers.sampler_object", "to take Euler steps"),
    Need("host/sampling.py", "comfy.utils", "to show progress", "PROGRESS_BAR_ENABLED"),
    Need("host/sampling.py", "latent_preview.prepare_callback", "to show previews", costs="no previews are shown"),
    Need("host/sampling.py", PATCHER, "to know the latents of a model", "get_model_object", "model"),
    Need("host/sampling.py", "comfy.latent_formats.LatentFormat", "to know them", "latent_channels"),
    Need(
        "host/sampling.py", "nodes", "to read a LATENT", words="samples noise_mask batch_index downscale_ratio_spacial"
    ),
    Need("host/misfit.py", "comfy.patcher_extension.WrappersMP", "to see a sampling fail", "OUTER_SAMPLE"),
    Need("host/misfit.py", PATCHER, "to see a sampling fail", "get_wrappers add_wrapper_with_key", "model"),
    Need("host/misfit.py", "comfy.patcher_extension.WrapperExecutor", "to see a sampling fail", words="class_obj"),
    Need("host/misfit.py", "comfy.samplers.CFGGuider", "to see what it was given", words="conds model_patcher"),
    Need("host/misfit.py", "comfy.samplers", "to see what it was given", words="control"),
    Need("host/misfit.py", "comfy.sampler_helpers", "to see what it was given", words="cross_attn"),
    Need("host/misfit.py", BASE_MODEL, MISFIT, words="latent_format diffusion_model model_config"),
    Need("host/misfit.py", CONFIGURATION, MISFIT, "unet_config"),
    Need("host/misfit.py", "comfy.latent_formats.LatentFormat", MISFIT, "latent_channels latent_dimensions"),
    Need("host/misfit.py", "comfy.controlnet.ControlBase", MISFIT),
    # compiled models
    Need(
        "host/compiled.py",
        "comfy_api.torch_helpers.torch_compile",
        "to compile again",
        "set_torch_compile_wrapper COMPILE_KEY TORCH_COMPILE_KWARGS",
        "compiled_module_dict",
        costs="",
    ),
    Need("host/compiled.py", "comfy.patcher_extension.WrappersMP", "to know compiled models", "APPLY_MODEL"),
    Need("host/compiled.py", PATCHER, "to do so", "clone get_wrappers remove_wrappers_with_key", "model_options"),
)
