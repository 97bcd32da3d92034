"""The head and the loss of a language model on a CPU: reference.linear_cross_entropy in chunks of
rows, with the gradients computed while a chunk's logits are at hand.

The logits of all rows would be gigabytes, whose fresh pages cost more time than the chunks do.
N rows, C channels, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from triton_kernels.reference import linear_cross_entropy as in_one_piece


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """reference.linear_cross_entropy, holding the logits of chunk_rows rows at a time, in one
    buffer. Rows that do not count are left out. torch.compile gets the reference itself.
    """
    options = dict(ignore_index=ignore_index, vocab_size=vocab_size)
    if chunk_rows >= x.shape[0] or torch.compiler.is_compiling():
        return in_one_piece(x, weight, targets, reduction=reduction, **options)
    counted = targets != ignore_index
    if 0 < int(counted.sum()) < len(x):  # in SFT most of the work would be for nothing
        kept = counted.nonzero()[:, 0]
        losses = linear_cross_entropy(
            x.index_select(0, kept), weight, targets[kept], chunk_rows=chunk_rows,
            reduction=reduction, **options,
        )  # fmt: skip
        if reduction != "none":
            return losses
        return losses.new_zeros(len(x)).index_copy(0, kept, losses)
    if reduction == "none" and torch.is_grad_enabled():
        # Each row has its own incoming gradient: the gradients are computed in backward.
        def rows(x: Tensor, targets: Tensor) -> Tensor:
            return in_one_piece(x, weight, targets, reduction="none", **options)

        pairs = zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat([checkpoint(rows, *pair, use_reentrant=False) for pair in pairs])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if reduction == "none":
        return _chunked_losses(x, weight, targets, ignore_index, vocab_size, chunk_rows)
    total = _ChunkedLossSum.apply(
        x, weight, targets, ignore_index, vocab_size, chunk_rows, torch.is_grad_enabled()
    )
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def _row_losses(
    logits: Tensor, index: Tensor, counted: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (rows, 1) of logits (rows, V), and softmax as z / norm; z may overwrite logits.

    index (rows, 1): the targets; counted (rows, 1) bool: where they count, elsewhere the loss is 0.
    """
    z = logits[:, :vocab_size].float()  # a view where logits are float32
    z_target, top = z.gather(1, index), z.amax(1, keepdim=True)
    norm = z.sub_(top).exp_().sum(1, keepdim=True)
    return (norm.log() + top - z_target).where(counted, 0.0), z, norm


def _chunked_losses(x, weight, targets, ignore_index, vocab_size, chunk_rows) -> Tensor:
    """Each row's loss, (N,) float32, without gradients."""
    buffer = x.new_empty(min(chunk_rows, len(x)), weight.shape[0])
    losses = []
    with torch.autocast(x.device.type, enabled=False):
        for x_c, targets_c in zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True):
            counted = (targets_c != ignore_index)[:, None]
            logits = torch.mm(x_c, weight.t(), out=buffer[: len(x_c)])
            index = targets_c[:, None].where(counted, 0)
            losses.append(_row_losses(logits, index, counted, vocab_size)[0])
    return torch.cat(losses)[:, 0]


class _ChunkedLossSum(torch.autograd.Function):
    """Sum of the losses, with dx and dweight computed while a chunk's logits are at hand.

    For a row with logits z and target t: loss = lse(z) - z_t, dz = softmax(z) - [j = t].
    """

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, vocab_size, chunk_rows, has_gradient):
        buffer = x.new_empty(min(chunk_rows, len(x)), weight.shape[0])
        dx = torch.empty_like(x) if has_gradient and ctx.needs_input_grad[0] else None
        needs_dw = has_gradient and ctx.needs_input_grad[1]
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_dw else None
        total = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                x_c, targets_c = x[start : start + chunk_rows], targets[start : start + chunk_rows]
                counted = (targets_c != ignore_index)[:, None]
                index = targets_c[:, None].where(counted, 0)
                logits = torch.mm(x_c, weight.t(), out=buffer[: len(x_c)])
                loss, z, norm = _row_losses(logits, index, counted, vocab_size)
                total += loss.sum()
                if dx is None and dw is None:
                    continue
                z.div_(norm).scatter_add_(1, index, torch.full_like(norm, -1.0))
                z.masked_fill_(~counted, 0.0)
                if z.dtype != logits.dtype:
                    logits[:, :vocab_size] = z
                logits[:, vocab_size:] = 0.0
                if dx is not None:
                    torch.mm(logits, weight, out=dx[start : start + chunk_rows])
                if dw is not None:
                    if x.dtype == dw.dtype:
                        dw.addmm_(logits.t(), x_c)
                    else:
                        dw += logits.t() @ x_c
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx * dloss.to(dx.dtype)
        dw = None if dw is None else (dw * dloss).to(ctx.weight_dtype)
        return (dx, dw, *[None] * 5)
