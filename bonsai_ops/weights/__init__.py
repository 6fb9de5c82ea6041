"""What a pack is: how it lies in files, what its weights are. Knows no ComfyUI and no kernels."""
