"""Implementations of the packed matmul. Each knows tensors only: no files, no ComfyUI."""
