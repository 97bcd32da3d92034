"""Which implementation of the kernels a model uses. The only importer of triton_kernels, and of
the C++ linear layer for decoding on a CPU.

The choice belongs to the run, not to the model: what was trained with one samples with the other.
The kernels are imported when a model is made, not before, since importing Triton takes a while.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CPU_LOGITS = 1 << 24  # that many at a time on a CPU, 64 MB: 333 rows of GPT-2's vocabulary
DECODE_ROWS = 16  # up to so many rows the C++ linear layer is faster; see docs/LOG.md


@dataclass(frozen=True)
class Ops:
    """The operations, with the signatures of triton_kernels.reference, and why these.

    linear has the signature of torch.nn.functional.linear.
    """

    name: str  # "triton" or "torch"
    reason: str
    attention: Callable
    cached_attention: Callable
    layer_norm: Callable
    linear_cross_entropy: Callable
    linear: Callable = F.linear


def select_ops(
    kernels: str | Ops = "auto", device: str | torch.device = "cpu", head_dim: int = 64
) -> Ops:
    """The implementation for "auto", "triton" or "torch" on a device; an Ops passes through.

    Raises ValueError where "triton" was asked for and cannot run, with the reason.
    """
    if isinstance(kernels, Ops):
        return kernels
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"unknown kernels {kernels!r}: use auto, triton or torch")
    if kernels == "torch":
        return _torch_ops("asked for", device)
    missing = _why_not_triton(torch.device(device), head_dim)
    if missing and kernels == "triton":
        raise ValueError(f"kernels 'triton' cannot run: {missing}; use --kernels torch")
    if missing:
        return _torch_ops(missing, device)
    # Interpreted kernels are exact but thousands of times slower: only for those who ask.
    if kernels == "auto" and torch.device(device).type == "cpu":
        return _torch_ops("on a CPU the Triton kernels are only interpreted", device)
    return _triton_ops("asked for" if kernels == "triton" else "a GPU they run on")


def _torch_ops(reason: str, device: str | torch.device) -> Ops:
    from triton_kernels import cpu
    from triton_kernels import reference as r

    loss, linear = r.linear_cross_entropy, F.linear
    if torch.device(device).type == "cpu":

        def loss(x, weight, targets, **kwargs):
            chunk_rows = max(CPU_LOGITS // weight.shape[0], 1)
            return cpu.linear_cross_entropy(x, weight, targets, chunk_rows=chunk_rows, **kwargs)

        linear = _decode_linear() or F.linear

    return Ops("torch", reason, r.attention, r.cached_attention, r.layer_norm, loss, linear)


def _decode_linear() -> Callable | None:
    """F.linear, by the C++ module for a few rows without gradients; None where it cannot run."""
    try:
        from gpt2 import _decode_linear as module
    except ImportError:
        return None
    if not module.is_supported():
        return None

    def linear(x, weight, bias=None):
        tensors = (x, weight) if bias is None else (x, weight, bias)
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or any(t.dtype != torch.float32 or not t.is_cpu for t in tensors)
            or any(t.layout != torch.strided for t in tensors)
            # of any other shape F.linear says what is wrong, or what comes out
            or weight.dim() != 2
            or weight.numel() == 0
            or x.shape[-1:] != weight.shape[1:]
            or x.numel() > DECODE_ROWS * weight.shape[1]
            or (bias is not None and bias.shape != weight.shape[:1])
            or not all(t.is_contiguous() for t in tensors[1:])
        ):
            return F.linear(x, weight, bias)
        n_out, n_in = weight.shape
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], n_out)
        n_rows, address = x.numel() // n_in, 0 if bias is None else bias.data_ptr()
        module.linear(
            x.data_ptr(), weight.data_ptr(), address, y.data_ptr(), n_rows, n_out, n_in,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    return linear


def _triton_ops(reason: str) -> Ops:
    import triton_kernels as t
    from triton_kernels import reference

    return Ops(
        "triton", reason, t.attention, reference.cached_attention, t.layer_norm,
        t.linear_cross_entropy,
    )  # fmt: skip


def _why_not_triton(device: torch.device, head_dim: int) -> str:
    """Empty where the Triton kernels run, else the reason why they do not."""
    try:
        from triton_kernels.attention import INTERPRETED, MAX_HEAD_DIM
    except ModuleNotFoundError:
        return "Triton is not installed"
    if head_dim > MAX_HEAD_DIM:
        return (
            f"the Triton kernels need a head dimension of at most {MAX_HEAD_DIM}, the model has "
            f"{head_dim}"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        old = torch.version.hip is None and major < 8
        needed = "the Triton kernels need compute capability 8.0, this GPU has"
        return f"{needed} {major}.{minor}" if old else ""
    if device.type == "cpu" and INTERPRETED:
        return ""
    return f"the Triton kernels need a CUDA GPU and the device is {device.type!r}"
