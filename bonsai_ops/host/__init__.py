"""How packed weights live in ComfyUI: the only folder that imports comfy."""
