"""Fused kernels for GPT-2 training. triton_kernels.reference has the same operations in plain
PyTorch."""
