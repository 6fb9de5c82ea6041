"""The fused kernels for GPUs, what launches them, and the sizes they run with."""
