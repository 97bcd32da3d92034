"""Fused kernels for GPT-2 training: attention, layer_norm, cross_entropy, linear_cross_entropy.

Importing one imports Triton, which takes 70 MB and half a second. triton_kernels.reference has the
same operations in plain PyTorch; it is all there is where Triton is not installed.
"""

import sys
from importlib import import_module
from types import ModuleType

__all__ = ["attention", "cross_entropy", "layer_norm", "linear_cross_entropy"]


class _Package(ModuleType):
    """attention is the operation, not the module that it is in, and imported when asked for."""

    def __getattr__(self, name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{name}"), name)

    def __setattr__(self, name: str, value) -> None:
        # Importing a module sets it here, too.
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
