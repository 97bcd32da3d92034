"""Fused kernels for GPT-2 training: attention, layer_norm, cross_entropy, linear_cross_entropy.

triton_kernels.reference has the same operations in plain PyTorch; it is all there is where Triton
is not installed.
"""

try:
    from triton_kernels.attention import attention
    from triton_kernels.cross_entropy import cross_entropy
    from triton_kernels.layer_norm import layer_norm
    from triton_kernels.linear_cross_entropy import linear_cross_entropy

    __all__ = ["attention", "cross_entropy", "layer_norm", "linear_cross_entropy"]
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
