"""The parts of the plugin that hosts.py tests on each ComfyUI: {part: some tests, as pytest takes them}.

Few tests, those that lean most on ComfyUI and its packages. {version} and {folder} are those of the host.
"""

from __future__ import annotations

HOST, MODEL = "tests/host", "tests/host/model"

PARTS: dict[str, tuple[str, ...]] = {
    "import": (
        f"{HOST}/test_contract.py::test_every_name_is_there[{{folder}}]",
        f"{HOST}/test_contract.py::test_the_chosen_packages_come_first",
        f"{HOST}/test_flags.py::test_every_option_of_comfyui_is_listed[{{folder}}]",
        f"{HOST}/test_matrix.py::test_nodes_are_registered[{{version}}]",
        f"{HOST}/test_matrix.py::test_beside_comfyui_manager",
        f"{MODEL}/test_traps.py::test_a_newer_comfy_kitchen_misses_nothing",
        f"{MODEL}/test_traps.py::test_a_second_import_breaks_no_model",
    ),
    "load": (
        f"{MODEL}/test_traps.py::test_loading_takes_no_memory_for_dense_layers",
        f"{MODEL}/test_traps.py::test_a_layer_can_be_moved_and_cast",
        f"{MODEL}/test_traps.py::test_activations_are_not_cast_to_uint8",
        f"{MODEL}/test_traps.py::test_another_quantization_is_refused",
        f"{MODEL}/test_traps.py::test_scale_and_shift_are_not_exchanged",
        f"{MODEL}/test_traps.py::test_a_model_can_be_made_for_another_device",
        f"{MODEL}/test_clone.py::test_clones_share_weights_and_keep_their_patches_apart",
        f"{MODEL}/test_clone.py::test_a_clone_without_dynamic_vram",
        f"{MODEL}/test_clone.py::test_select_device_node",
        f"{MODEL}/test_folders.py::test_a_file_with_a_large_ending_is_loaded",
    ),
    "sample": (
        f"{HOST}/test_matrix.py::test_text_to_image[{{version}}]",
        f"{HOST}/test_matrix.py::test_same_sigmas_as_the_stock_scheduler[{{version}}]",
        f"{MODEL}/test_guidance.py",
        f"{MODEL}/test_attention.py::test_a_picture_drawn_in_parts",
        f"{MODEL}/test_attention.py::test_another_choice_stays",
        f"{MODEL}/test_traps.py::test_a_product_unpacks_no_layer",
        f"{MODEL}/test_generation.py::test_text_is_that_of_the_twin",
    ),
    "LoRA": (
        f"{MODEL}/test_lora.py::test_key_forms",
        f"{MODEL}/test_lora.py::test_each_variant",
        f"{MODEL}/test_lora.py::test_three_stacked",
        f"{MODEL}/test_lora.py::test_slices_of_the_input",
        f"{MODEL}/test_lora.py::test_other_adapters",
        f"{MODEL}/test_lora.py::test_low_precision",
        f"{MODEL}/test_lora.py::test_text_encoder_lora",
        f"{MODEL}/test_traps.py::test_a_lora_is_no_silent_no_op",
        f"{MODEL}/test_traps.py::test_a_lora_is_not_gone_after_a_step",
        f"{MODEL}/test_hooks.py::test_a_hook_equals_the_lora_itself",
        f"{MODEL}/test_hooks.py::test_hooks_on_an_offloaded_model",
        f"{MODEL}/test_gradients.py::test_a_loaded_pack",
        f"{MODEL}/test_gradients.py::test_train_lora_at_every_depth",
        f"{MODEL}/test_train_lora.py::test_training_goes_on_and_the_file_loads",
    ),
    "offload": (
        f"{MODEL}/test_offload.py",
        f"{MODEL}/test_traps.py::test_dynamic_vram_rounds_no_lora_away",
        f"{MODEL}/test_traps.py::test_no_codes_stay_in_vram",
        f"{MODEL}/test_traps.py::test_offload_stays_asynchronous",
        f"{MODEL}/test_traps.py::test_dynamic_vram_can_be_turned_off",
    ),
    "save": (
        f"{HOST}/test_matrix.py::test_saved_model_draws_the_same[{{version}}]",
        f"{MODEL}/test_saving.py::test_every_node_that_saves_is_listed",
        f"{MODEL}/test_saving.py::test_round_trip",
        f"{MODEL}/test_saving.py::test_save_bonsai_model_and_convert",
        f"{MODEL}/test_traps.py::test_model_save_writes_no_garbage",
        f"{MODEL}/test_traps.py::test_an_offloaded_model_can_be_saved",
        f"{MODEL}/test_merge_save.py::test_merge",
    ),
    "patch": (
        f"{MODEL}/test_patch.py::test_every_architecture",
        f"{MODEL}/test_patch.py::test_clone_factory_offload_and_messages",
        f"{MODEL}/test_patch_source.py::test_quantized_layers_are_read_as_they_compute",
    ),
    "browser": (
        "tests/browser/test_workflows.py::test_workflow_runs[Bonsai 02 - Text to image]",
        "tests/browser/test_workflows.py::test_workflow_as_shipped_names_its_files[Bonsai 02 - Text to image]",
        "tests/browser/test_workflows.py::test_page_shows_translated_titles[zh]",
    ),
}
REST, REST_TESTS = "the rest", (MODEL,)
"""One more part: all other tests that run in the process of ComfyUI."""
