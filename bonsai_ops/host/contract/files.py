"""What files are listed, read and written with."""

from __future__ import annotations

from .need import BASE_MODEL, CONFIGURATION, KLEIN, NO_ENCODER, PATCHER, SAVED, Need

NEEDS = (
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
)
