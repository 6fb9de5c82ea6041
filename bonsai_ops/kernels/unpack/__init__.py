"""Unpacking in one launch, then the vendor's product: for GPUs, wherever no fused kernel takes a call.

product.py     y = x W^T through a scratch of values, whoever writes them
by_triton.py   the backend whose values a Triton kernel writes (kernel.py)
by_nvrtc.py    the backend for machines without Triton: CUDA C++ (kernel.cu), compiled and started by nvrtc.py
"""
