"""Which implementation of the kernels a model uses: Triton's, the C++ ones of gpt2.cpu, or torch's.

The choice belongs to the run, not to the model: what was trained with one samples with the other.
The kernels are imported when a model is made, not before, since importing Triton takes a while.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from gpt2.cpu import Choice


@dataclass(frozen=True)
class Ops:
    """The operations, with the signatures of triton_kernels.reference, and why these.

    linear, gelu and embedding have those of torch.nn.functional.
    """

    name: str  # "triton", "cpp" or "torch"
    reason: str
    attention: Callable
    cached_attention: Callable
    layer_norm: Callable
    linear_cross_entropy: Callable
    linear: Callable = F.linear
    gelu: Callable = partial(F.gelu, approximate="tanh")
    embedding: Callable = F.embedding
    choice: "Choice | None" = None  # on a CPU: of matrix products, where a run may time them

    def describe(self) -> str:
        products = f"; {self.choice.describe()}" if self.choice and self.choice.products else ""
        return f"{self.name} ({self.reason}){products}"


def select_ops(
    kernels: str | Ops = "auto", device: str | torch.device = "cpu", head_dim: int = 64
) -> Ops:
    """The implementation for "auto", "triton", "cpp" or "torch" on a device; an Ops passes through.

    Raises ValueError where what was asked for cannot run, with the reason.
    """
    if isinstance(kernels, Ops):
        return kernels
    if kernels not in ("auto", "triton", "cpp", "torch"):
        raise ValueError(f"unknown kernels {kernels!r}: use auto, triton, cpp or torch")
    asked, device = kernels != "auto", torch.device(device)
    missing, reason = "", "asked for"
    # Interpreted Triton kernels are exact but thousands of times slower: only for those who ask.
    if kernels == "cpp" or device.type == "cpu" and not asked:
        missing = _why_not_cpp(device)
    elif kernels != "torch":
        missing = _why_not_triton(device, head_dim)
    if missing and asked:
        raise ValueError(f"kernels {kernels!r} cannot run: {missing}; use --kernels torch")
    if device.type == "cpu" and kernels != "triton":
        reason = reason if asked else missing or "the kernels for a CPU"
        return _cpu_ops(reason, cpp=kernels != "torch" and not missing, timed=not asked)
    if missing or kernels == "torch":
        return _torch_ops(missing or reason)
    return _triton_ops(reason if asked else "a GPU they run on")


def _torch_ops(reason: str) -> Ops:
    from triton_kernels import reference as r

    return Ops(
        "torch", reason, r.attention, r.cached_attention, r.layer_norm, r.linear_cross_entropy
    )


def _cpu_ops(reason: str, *, cpp: bool, timed: bool) -> Ops:
    """cpp: with the kernels of csrc/.  timed: a run may time its matrix products, and choose."""
    from gpt2 import cpu
    from triton_kernels import reference as r

    choice = cpu.Choice(cpp)
    loss = partial(cpu.linear_cross_entropy, choice=choice)
    if not (cpp or timed):
        return replace(_torch_ops(reason), linear_cross_entropy=loss)
    own = (choice.linear, cpu.gelu, cpu.embedding, choice if timed else None)
    attention, name = (cpu.attention, "cpp") if cpp else (r.attention, "torch")
    return Ops(name, reason, attention, r.cached_attention, r.layer_norm, loss, *own)


def _triton_ops(reason: str) -> Ops:
    import triton_kernels as t
    from triton_kernels import reference

    return Ops(
        "triton", reason, t.attention, reference.cached_attention, t.layer_norm,
        t.linear_cross_entropy,
    )  # fmt: skip


def _why_not_cpp(device: torch.device) -> str:
    """Empty where the C++ kernels run, else the reason why they do not."""
    from gpt2 import cpu

    return cpu.why_not() if device.type == "cpu" else f"they are for a CPU, not {device.type!r}"


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
