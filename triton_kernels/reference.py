"""The four operations in plain PyTorch: fallback, test oracle and benchmark baseline, in one place.

triton_kernels.<name> has the same names and signatures; gpt2.ops chooses between the two.
Everything here is differentiable, compiles with torch.compile(fullgraph=True), and keeps statistics
in fp32.

B batch, T time, C channels, H heads, D head dimension, V vocabulary, N rows (B*T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def doc_mask(doc_start: Tensor, n_keys: int) -> Tensor:
    """Which keys each query may see: causal, and not before its document's first token.

    doc_start (B, T) int32: first visible key of each query; the T queries are the last T of n_keys
    positions.
    Returns (B, 1, T, n_keys) bool, True = visible.
    """
    n_queries = doc_start.shape[1]
    key = torch.arange(n_keys, device=doc_start.device)
    query = key[n_keys - n_queries :, None]  # (T, 1)
    return ((key <= query) & (key >= doc_start[..., None]))[:, None]


def attention(
    qkv: Tensor, *, doc_start: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Causal self-attention on packed projections.

    qkv (B, T, 3, H, D): queries, keys and values as c_attn writes them.
    doc_start (B, T) int32: first key that a query may see (packed documents, left padding).
    scale: multiplies q.k, default 1/sqrt(D).
    Returns (B, T, H, D).  Source: torch.nn.functional.scaled_dot_product_attention(is_causal=True).
    """
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D) each
    if doc_start is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = doc_mask(doc_start, qkv.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of new tokens to all cached ones, themselves included: generation's attention.

    q (B, H, T, D); k, v (B, H, S, D).
    mask (B or 1, 1, T, S) bool, True = visible; None: all keys for T = 1, causal for T = S.
    Returns (B, T, H, D).
    """
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension, with the residual addition that comes before it.

    x (..., C); weight (C,); bias (C,) or None; residual (..., C) or None.
    Returns y, or (y, x + residual) where y normalises the sum.
    Source: torch.nn.functional.layer_norm.
    """
    if residual is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight, bias, eps), summed


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Cross entropy of logits against class indices, in fp32.

    logits (N, V), any row stride; targets (N,) int64, ignore_index marks rows that do not count.
    z_loss: weight of logsumexp(logits)^2, added per counted row (PaLM, arXiv 2204.02311, sec. 5).
    inplace_backward: lets a kernel overwrite logits with their gradient; no effect here.
    Returns a scalar fp32, or (N,) for reduction "none".
    Source: torch.nn.functional.cross_entropy.
    """
    del inplace_backward
    logits = logits.float()
    kwargs = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    if z_loss == 0.0:
        return F.cross_entropy(logits, targets, reduction=reduction, **kwargs)
    counted = targets != ignore_index
    loss = F.cross_entropy(logits, targets, reduction="none", **kwargs)
    loss = loss + torch.where(counted, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross entropy of x @ weight.T against class indices: a language model's head and loss.

    x (N, C); weight (V, C); targets (N,) int64.
    vocab_size: classes beyond it are padding of the weight and take no part; default V.
    chunk_rows: hold the logits of this many rows at a time, in one buffer, and compute the
    gradients with them; on a CPU that is faster too, since fresh gigabytes cost page faults.
    Returns a scalar fp32, or (N,) for reduction "none".
    """

    def rows(x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = F.linear(x, weight)[:, :vocab_size]  # (rows, V)
        return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)

    if chunk_rows is None or chunk_rows >= x.shape[0] or torch.compiler.is_compiling():
        return rows(x, targets, reduction)
    counted = targets != ignore_index
    if 0 < int(counted.sum()) < len(x):  # in SFT most of the work would be for nothing
        kept = counted.nonzero()[:, 0]
        losses = linear_cross_entropy(
            x.index_select(0, kept), weight, targets[kept], ignore_index=ignore_index,
            reduction=reduction, vocab_size=vocab_size, chunk_rows=chunk_rows,
        )  # fmt: skip
        if reduction != "none":
            return losses
        return losses.new_zeros(len(x)).index_copy(0, kept, losses)
    if reduction == "none" and torch.is_grad_enabled():
        # Each row has its own incoming gradient: the gradients are computed in backward.
        pairs = zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat([checkpoint(rows, *pair, "none", use_reentrant=False) for pair in pairs])
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
