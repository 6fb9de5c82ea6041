"""Packed 1-bit and ternary weights: formats, kernels and the ComfyUI loader of the bonsai-image nodes."""

__version__ = "0.1.0"
