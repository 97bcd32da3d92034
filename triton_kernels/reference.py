"""The operations in plain PyTorch: fallback, test oracle and benchmark baseline, in one place.

triton_kernels.<name> has the same names and signatures; gpt2.ops chooses between the two.
Everything here is differentiable, compiles with torch.compile(fullgraph=True), and keeps statistics
in fp32, or in fp64 for fp64 inputs, as tests give them.

B batch, T time, C channels, H heads, D head dimension, V vocabulary, N rows (B*T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attention(qkv: Tensor, *, doc_start: Tensor | None = None) -> Tensor:
    """Causal self-attention on packed projections.

    qkv (B, T, 3, H, D): queries, keys and values as c_attn writes them.
    doc_start (B, T) int32: first key that a query may see (packed documents, left padding).
    Returns (B, T, H, D).  Source: torch.nn.functional.scaled_dot_product_attention(is_causal=True).
    """
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, D) each
    if doc_start is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = doc_mask(doc_start, qkv.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of new tokens to all cached ones, themselves included: generation's attention.

    q (B, H, T, D); k, v (B, H, S, D) in the cache's dtype, in which all is computed.
    mask (B or 1, 1, T, S) bool, True = visible; None: all keys for T = 1, causal for T = S.
    Returns (B, T, H, D).
    """
    causal = mask is None and q.shape[2] > 1
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, is_causal=causal)
    return out.transpose(1, 2)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
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
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    """Cross entropy of logits against class indices, in fp32.

    logits (N, V), any row stride; targets (N,) int64, ignore_index marks rows that do not count.
    inplace_backward: lets a kernel overwrite logits with their gradient; no effect here.
    Returns a scalar fp32, or (N,) for reduction "none".
    Source: torch.nn.functional.cross_entropy.
    """
    del inplace_backward
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
    reduction: str = "mean", vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of x @ weight.T against class indices: a language model's head and loss.

    x (N, C); weight (V, C); targets (N,) int64.
    vocab_size: classes beyond it are padding of the weight and take no part; default V.
    Returns a scalar fp32, or (N,) for reduction "none".
    """
    logits = F.linear(x, weight)[:, :vocab_size]  # (N, V)
    return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
