"""What the nodes are made of."""

from __future__ import annotations

from .need import IO, Need

NEEDS = (
    Need("nodes", "comfy_api.latest.ComfyExtension", "to register nodes", "on_load get_node_list"),
    Need("nodes", f"{IO}.ComfyNode", "to be a node", "define_schema execute hidden"),
    Need(
        "nodes",
        f"{IO}.Schema",
        "to describe a node",
        takes="node_id display_name category description inputs outputs hidden is_output_node is_input_list",
    ),
    Need("nodes", f"{IO}.Schema", "to be found", takes="search_aliases essentials_category", costs=""),
    Need("nodes", f"{IO}.Combo.Input", "to be folded away", takes="advanced", costs=""),
    Need("nodes", f"{IO}.NodeOutput", "to return results", takes="ui"),
    Need("nodes", "comfy_api.latest.ui.PreviewImage", "to show a picture on the node", "as_dict"),
    Need(
        "nodes", IO, "to describe inputs", "Model.Input Conditioning.Input Latent.Input Sigmas.Input", takes="tooltip"
    ),
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
)
