"""Which implementation of the four kernels a model uses. The only importer of triton_kernels.

The choice belongs to the run, not to the model: what was trained with one samples with the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from triton_kernels import reference
from triton_kernels.reference import doc_mask as doc_mask


@dataclass(frozen=True)
class Ops:
    """The four operations, with the signatures of triton_kernels.reference, and why these."""

    name: str  # "triton" or "torch"
    reason: str
    attention: Callable
    layer_norm: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable


def select_ops(kernels: str | Ops = "auto", device: str | torch.device = "cpu") -> Ops:
    """The implementation for "auto", "triton" or "torch" on a device; an Ops passes through.

    Raises ValueError where "triton" was asked for and cannot run, with the reason.
    """
    if isinstance(kernels, Ops):
        return kernels
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"unknown kernels {kernels!r}: use auto, triton or torch")
    if kernels == "torch":
        return _torch_ops("asked for")
    missing = _why_not_triton(torch.device(device))
    if missing and kernels == "triton":
        raise ValueError(f"kernels 'triton' cannot run: {missing}; use --kernels torch")
    return _torch_ops(missing)


def _torch_ops(reason: str) -> Ops:
    r = reference
    return Ops("torch", reason, r.attention, r.layer_norm, r.cross_entropy, r.linear_cross_entropy)


def _why_not_triton(device: torch.device) -> str:
    """Empty where the Triton kernels run, else the reason why they do not."""
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA GPU and the device is {device.type!r}"
    return "this version has no Triton kernels yet"
