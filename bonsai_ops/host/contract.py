"""Every name of ComfyUI and comfy-kitchen that the plugin leans on, who needs it and why.

A new ComfyUI: run

    BONSAI_COMFYUI=/path/to/ComfyUI python -m tests tests/host/test_contract.py -rA

and read which names are gone and who needs them. tests/unit/test_contract.py compares this table with the code, both
ways. What becomes of a missing name is decided in comfyui.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """One file (or folder) of ours and one module, class or function of ComfyUI that it needs.

    Lists have spaces in between. members: what it uses of a module or class, or overrides of a class. words: attributes
    of instances, keys and keyword arguments that the source of `name` spells; only the tests look them up. takes:
    parameters that are given by name, to each member if there are some. costs: what is lost without it, "" if nothing
    is; None: it is required. since: the ComfyUI that brought it.
    """

    user: str
    name: str
    why: str
    members: str = ""
    words: str = ""
    takes: str = ""
    costs: str | None = None
    since: str = ""

    @property
    def names(self) -> list[str]:
        """The dotted names that must exist."""
        return [f"{self.name}.{member}" for member in self.members.split()] or [self.name]


IO, PATCHER = "comfy_api.latest.io", "comfy.model_patcher.ModelPatcher"
BASE_MODEL, CONFIGURATION = "comfy.model_base.BaseModel", "comfy.supported_models_base.BASE"
TENSOR, PARAMS = "comfy_kitchen.tensor.QuantizedTensor", "comfy_kitchen.tensor.base.BaseLayoutParams"
KLEIN = "comfy.text_encoders.flux"
BYPASS, BYPASS_WORDS = "comfy.weight_adapter.BypassInjectionManager", "hooks module adapter multiplier"
MISFIT = "to tell what belongs to another model"
SAVED = "to say what a saved text encoder is"
NO_ENCODER = "no pack's text encoder is loaded; CLIPLoader with qwen_3_4b.safetensors and type flux2 serves as well"
SLOW_LORAS = "LoRAs on packed layers are exact but slow: each call unpacks the layer"

NEEDS = (
    # nodes: what a node is made of
    Need("nodes", "comfy_api.latest.ComfyExtension", "to register nodes", "on_load get_node_list"),
    Need("nodes", f"{IO}.ComfyNode", "to be a node", "define_schema execute hidden"),
    Need(
        "nodes",
        f"{IO}.Schema",
        "to describe a node",
        takes="node_id display_name category description inputs outputs hidden is_output_node",
    ),
    Need("nodes", f"{IO}.NodeOutput", "to return results", takes="ui"),
    Need("nodes", IO, "to describe inputs", "Model.Input Conditioning.Input Latent.Input", takes="tooltip"),
    Need("nodes", f"{IO}.Combo.Input", "to offer choices", takes="options default tooltip optional"),
    Need("nodes", f"{IO}.String.Input", "to ask for text", takes="default multiline tooltip"),
    Need("nodes", f"{IO}.Boolean.Input", "to ask yes or no", takes="default optional display_name tooltip"),
    Need("nodes", f"{IO}.Int.Input", "to ask for a number", takes="default min max control_after_generate tooltip"),
    Need("nodes", f"{IO}.Float.Input", "to ask for a number", takes="default min max step tooltip"),
    Need("nodes", f"{IO}.Custom", "to name the type of a calibration"),
    Need(
        "nodes",
        IO,
        "to describe outputs",
        "Model.Output Clip.Output Vae.Output Latent.Output Image.Output String.Output",
        takes="tooltip",
    ),
    Need("nodes", f"{IO}.Hidden", "to save the workflow with a model", "prompt extra_pnginfo"),
    Need("nodes", "comfy.cli_args.args", "to respect --disable-metadata", "disable_metadata"),
    Need("nodes", "comfy.samplers.KSampler", "to offer its choices", "SAMPLERS SCHEDULERS"),
    Need("nodes", "folder_paths", "to find embeddings", "get_folder_paths"),
    Need("nodes", "folder_paths", "to choose where to write", "get_output_directory get_save_image_path"),
    # files in and out
    Need(
        "host/folders.py",
        "folder_paths",
        "to list packs",
        "folder_names_and_paths get_folder_paths get_full_path models_dir",
    ),
    Need("host/folders.py", "folder_paths.add_model_folder_path", "to list packs", takes="is_default"),
    Need(
        "host/loader.py",
        "comfy.sd.load_diffusion_model_state_dict",
        "to put packed weights into its own model class",
        words="custom_operations dtype",
        takes="model_options disable_dynamic",
    ),
    Need("host/loader.py", "comfy.model_management", "to choose the device", "get_torch_device unet_offload_device"),
    Need("host/precision.py", "comfy.model_management.unet_manual_cast", "to choose the dtype"),
    Need(
        "host/precision.py",
        "comfy.model_management.unet_dtype",
        "to choose the dtype",
        takes="model_params weight_dtype supported_dtypes",
    ),
    Need(
        "host/precision.py",
        "comfy.cli_args.args",
        "to choose the dtype",
        "force_fp32 fp32_unet fp64_unet bf16_unet fp16_unet",
    ),
    Need("host/flags.py", "comfy.cli_args.args", "to leave no file mapped where that is asked for", "disable_mmap"),
    Need("host/progress.py", "comfy.utils.ProgressBar", "to show progress", "update_absolute"),
    Need("host/progress.py", "comfy.model_management.throw_exception_if_processing_interrupted", "to be cancelled"),
    Need("host/loader.py", BASE_MODEL, "to compute in that dtype", words="manual_cast_dtype"),
    Need("host/loader.py", CONFIGURATION, "to compute in that dtype", "set_inference_dtype"),
    Need("host/loader.py", PATCHER, "to be cloned", words="model cached_patcher_init"),
    Need(
        "host/text_encoder.py",
        "comfy.sd.CLIP",
        "to put packed weights into its own text encoder",
        words="patcher",
        takes="state_dict model_options embedding_directory disable_dynamic",
    ),
    Need("host/text_encoder.py", PATCHER, "to be cloned", words="cached_patcher_init"),
    Need("host/flags.py", "comfy.model_management.text_encoder_dtype", "to keep layers as it is asked to"),
    Need(
        "host/flags.py",
        "comfy.cli_args.args",
        "to keep layers as it is asked to",
        "fp8_e4m3fn_text_enc fp8_e5m2_text_enc fp16_text_enc bf16_text_enc fp32_text_enc",
    ),
    Need("host/text_encoder.py", "comfy.sd.CLIP", SAVED, words="cond_stage_model tokenizer state_dict"),
    Need("host/text_encoder.py", PATCHER, SAVED, "model_state_dict_for_saving", costs="", since="0.18"),
    Need(
        "host/generation.py",
        "comfy.sd1_clip.SD1ClipModel",
        "to generate text with the last layers of a text encoder too",
        words="generate load_sd set_clip_options",
    ),
    Need(
        "host/generation.py",
        "comfy.sd1_clip.SDClipModel",
        "to read and compute them",
        words="transformer execution_device custom_operations",
    ),
    Need(
        "host/generation.py",
        "comfy.text_encoders.llama",
        "to read and compute them",
        words="model embed_tokens layers norm num_hidden_layers",
    ),
    Need("host/generation.py", "comfy.text_encoders.flux", "to read and compute them", words="qwen3_4b"),
    Need("host/generation.py", PATCHER, "to manage them, and to know a merge", words="load_device model patches"),
    Need(
        "host/generation.py",
        "comfy.model_management",
        "to manage them",
        "load_models_gpu text_encoder_offload_device current_loaded_models",
    ),
    Need("host/text_encoder.py", "comfy.supported_models_base.ClipTarget", "to name class and tokenizer"),
    Need("host/text_encoder.py", f"{KLEIN}.klein_te", "to read prompts as FLUX.2 Klein does", costs=NO_ENCODER),
    Need(
        "host/text_encoder.py",
        f"{KLEIN}.KleinTokenizer",
        "to read prompts as FLUX.2 Klein does",
        words="tokenize_with_weights qwen3_4b tokenizer",
        costs=NO_ENCODER,
    ),
    Need(
        "host/vae.py",
        "comfy.sd.VAE",
        "to decode pictures",
        words="first_stage_model latent_channels downscale_ratio upscale_ratio",
        takes="sd config",
    ),
    Need(
        "host/vae.py",
        "comfy.taesd.taesd.TAESD",
        "to decode pictures with a tiny VAE",
        words="taesd_encoder taesd_decoder",
        takes="latent_channels",
        costs="packs with a tiny VAE are not loaded",
    ),
    # one layer
    Need("host/layout.py", TENSOR, "to hold packed codes", "dequantize params", "_layout_cls _qdata _params"),
    Need(
        "host/layout.py",
        "comfy_kitchen.tensor.QuantizedLayout",
        "to describe them",
        "quantize dequantize get_plain_tensors state_dict_tensors",
    ),
    Need("host/layout.py", PARAMS, "to describe them", "_tensor_fields", "orig_dtype orig_shape"),
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
    Need("host/lora.py", "comfy.weight_adapter.LoRAAdapter", "to know a plain LoRA", words="weights", costs=SLOW_LORAS),
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
        "patch_weight_to_device load unpatch_model model_state_dict state_dict_for_saving pre_run cleanup "
        "add_hook_patches patch_hooks patch_hook_weight_to_device unpatch_hooks get_callbacks add_callback_with_key",
        "model patches backup patches_uuid cached_hook_patches hook_backup",
    ),
    Need(
        "host/patcher.py",
        f"{PATCHER}.patch_weight_to_device",
        "to be called by it",
        takes="device_to inplace_update return_weight",
    ),
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
    # Patch to BitLinear
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
    Need("host/comfyui.py", "comfy.quant_ops.QUANT_ALGOS", "to know scaled columns", costs=""),
    Need("host/comfyui.py", "comfy.quant_ops", "to do so", words="pre_quant_scale parameters", costs="", since="0.30"),
    Need("host/comfyui.py", PATCHER, "to know clones of one model", words="clone_base_uuid", costs="", since="0.24"),
    # benchmarks; the plugin starts without these
    Need("tools/bench/inside", "comfy.options.enable_args_parsing", "to set the options of ComfyUI"),
    Need("tools/bench/inside", "comfy.sd.load_diffusion_model", "to time dense models", takes="model_options"),
    Need("tools/bench/inside", "comfy.sd.load_lora_for_models", "to time LoRAs"),
    Need("tools/bench/inside", "comfy.sample.prepare_noise", "to time steps and pictures"),
    Need(
        "tools/bench/inside", "comfy.sample.sample_custom", "to time steps and pictures", takes="callback disable_pbar"
    ),
    Need("tools/bench/inside", PATCHER, "to time models one by one", "clone", "model"),
    Need("tools/bench/inside", "comfy_kitchen", "to tell its kernels from others", "__file__"),
    Need("tools/bench/inside", "comfy.samplers.sampler_object", "to time steps and pictures"),
)
