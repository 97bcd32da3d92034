"""The head and the loss of a language model as one: cross entropy of x @ weight.T.

N rows, C channels, V classes, W rows of the weight (V and padding), S = W rounded up to 64, which
is the logits' row stride.

    logits = x weight^T                   (N, W), matmul
    loss, g = cross_entropy(logits)       g = d sum(loss) / d logits takes the place of logits
    dx = g weight, dw = g^T x             matmuls; dw leaves its matmul in fp32

For "mean" and "sum" the forward computes dx and dw as well, while the logits are at hand, so that
nothing of size (N, V) outlives it; the backward multiplies both by dloss, and by 1 / n_valid for
"mean", out of place and on the device. g itself is never scaled: its entries are within [-1, 1]
and lose nothing in fp16 to a division by N. With "none" every row has its own dloss, which dw
needs before its sum: there the forward keeps only lse, and the backward computes the logits
again, one more matmul.

The matmuls are cuBLAS's, by the variants with out=, which autocast leaves alone. They run on whole
rows of the padded buffer where the weight is padded too, since the gradient's padding is exactly 0.
Left out: recomputing tiles of logits inside the loss kernel (cut cross-entropy), which costs a
fourth GEMM to save memory that GPT-2's head does not need.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.cross_entropy import check_rows, gradient_rows, loss_rows, reduce_loss
from triton_kernels.launch import check_same_device, operator

ALIGN = 64  # elements: rows of logits start 128 bytes apart or a multiple of it (bf16)
SCALE_BLOCK, SCALE_WARPS = 4096, 8  # 16 elements a thread


@triton.jit
def _scaled_kernel(
    x_ptr,  # (n,)
    scale_ptr,  # () fp32
    out_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    """out = x * scale in fp32, rounded once; grid (cdiv(n, BLOCK),)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * tl.load(scale_ptr), mask=at < n)


@operator
def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """x * scale () in dtype; torch's own product would round scale to x's dtype first, or make an
    fp32 copy of x.
    """
    out = x.new_empty(x.shape, dtype=dtype)
    yield out
    _scaled_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
        x, scale, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
    )


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T (N, W), the first columns of a buffer (N, S)."""
    N, W = x.shape[0], weight.shape[0]
    logits = x.new_empty((N, triton.cdiv(W, ALIGN) * ALIGN))
    torch.mm(x, weight.t(), out=logits[:, :W])
    return logits


def _products(
    g: Tensor, x: Tensor, weight: Tensor, dx: Tensor, dw: Tensor, need_dx: bool, need_dw: bool
) -> None:
    """dx (N, C) = g weight and dw (W, C) fp32 = g^T x, where needed."""
    g = g[:, : weight.shape[0]]
    if need_dx:
        torch.mm(g, weight, out=dx)
    if not need_dw:
        return
    if g.dtype == torch.float32 or not g.is_cuda or torch.version.hip:
        torch.mm(g.t().float(), x.float(), out=dw)
    else:  # half precision in, fp32 to the last store
        torch.ops.aten.mm.dtype_out(g.t(), x, torch.float32, out=dw)


@operator
def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    dtype: torch.dtype, need_dx: bool, need_dw: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """loss and lse (N,), and of the sum of loss dx (N, C) in dtype and dw (W, C) in fp32, empty
    unless needed.
    """
    loss, lse = (x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(2))
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=dtype)
    dw = weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    yield loss, lse, dx, dw
    x, weight = x.to(dtype), weight.to(dtype)
    logits = _logits(x, weight)
    loss_rows(logits, targets, loss, lse, ignore_index, vocab_size, need_dx or need_dw)
    _products(logits, x, weight, dx, dw, need_dx, need_dw)


@operator
def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int,
    vocab_size: int, dtype: torch.dtype, need_dx: bool, need_dw: bool,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """dx (N, C) in dtype and dw (W, C) in fp32 of the sum of dloss (N,) loss, from logits that are
    computed again.
    """
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=dtype)
    dw = weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    yield dx, dw
    x, weight = x.to(dtype), weight.to(dtype)
    logits = _logits(x, weight)
    gradient_rows(dloss, logits, targets, lse, logits, ignore_index, vocab_size)
    _products(logits, x, weight, dx, dw, need_dx, need_dw)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients in the forward: "mean" and "sum"."""

    @staticmethod
    def forward(ctx, x, weight, targets, reduction, has_gradient, ignore_index, vocab_size, dtype):
        needs = (has_gradient and needed for needed in ctx.needs_input_grad[:2])
        loss, _, dx, dw = linear_cross_entropy_fwd(
            x, weight, targets, ignore_index, vocab_size, dtype, *needs
        )
        loss, n_valid = reduce_loss(loss, targets, ignore_index, reduction)
        ctx.save_for_backward(dx, dw, n_valid)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw, n_valid = ctx.saved_tensors
        # Where no row counts the gradient is 0, and 0 / 0 would make it NaN.
        scale = dloss if n_valid is None else dloss / n_valid.clamp(min=1.0)
        # Out of place: the saved gradients must be whole for another backward.
        dx, dw = (
            scaled(d, scale, dtype) if needed else None
            for d, dtype, needed in zip((dx, dw), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        )
        return dx, dw, *[None] * 6


class _LinearCrossEntropyRows(torch.autograd.Function):
    """Gradients in the backward, from logits computed again: "none"."""

    @staticmethod
    def forward(ctx, x, weight, targets, *numbers):
        loss, lse, _, _ = linear_cross_entropy_fwd(x, weight, targets, *numbers, False, False)
        ctx.save_for_backward(x, weight, targets, lse)
        ctx.numbers = numbers
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, *rest = ctx.saved_tensors  # once: under checkpointing they are given only once
        needs = ctx.needs_input_grad[:2]
        dx, dw = linear_cross_entropy_bwd(
            dloss.contiguous(), x, weight, *rest, *ctx.numbers, *needs
        )
        dx, dw = dx.to(x.dtype) if needs[0] else None, dw.to(weight.dtype) if needs[1] else None
        return dx, dw, *[None] * 4


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
    reduction: str = "mean", vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of x @ weight.T against class indices: the head and the loss of a language
    model as one.

    x (N, C) and weight (V, C) fp32 | fp16 | bf16, of one dtype unless autocast is on, which casts
        both to its own.
    targets (N,) int64 | int32; ignore_index marks rows that do not count: their loss and dx are 0.
        Their x must be finite all the same: dweight holds 0 * x of them, as torch's does. A target
        out of range makes its row's loss NaN, and so the gradients.
    vocab_size: classes beyond it are padding of the weight and take no part; their rows of dw are
        0. Default V.
    Returns a scalar fp32, or (N,) for reduction "none". Gradients have the dtype of their tensor,
    and dw is fp32 until it is stored, so an fp32 weight under autocast gets an fp32 gradient.
    Backward may run any number of times.

    Raises ValueError where shapes, dtypes, devices or numbers do not fit.
    Source: torch.nn.functional.cross_entropy(x @ weight.T, targets).
    """
    op = "linear_cross_entropy"
    check_rows(op, "x", x, targets, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, but x is {x.shape[1]} wide; it must be"
            f" (V, {x.shape[1]})"
        )
    check_same_device(op, "weight", weight, "x", x)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(
            f"{op}: vocab_size is {vocab_size}; it must be in 1..{weight.shape[0]}, the rows of"
            " weight"
        )
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    elif weight.dtype != dtype:
        raise ValueError(
            f"{op}: weight is {weight.dtype} and x {dtype}; cast one, or call under torch.autocast"
        )
    targets, numbers = targets.contiguous(), (ignore_index, vocab_size, dtype)
    if reduction == "none":
        return _LinearCrossEntropyRows.apply(x, weight, targets, *numbers)
    return _LinearCrossEntropy.apply(
        x, weight, targets, reduction, torch.is_grad_enabled(), *numbers
    )
