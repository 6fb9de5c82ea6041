"""Bonsai Image for ComfyUI: the V3 entry point. Importable without ComfyUI; nothing happens until ComfyUI asks."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls once it has imported this pack."""
    from .bonsai_ops.host import comfyui

    comfyui.require()
    from .nodes import BonsaiExtension

    return BonsaiExtension()
