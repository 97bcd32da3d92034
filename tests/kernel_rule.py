"""The rule that every kernel test goes by, and what the tests share.

The error of a kernel against the same operation in fp64 is, for each element, at most twice torch's
own at the same dtype, or what the arithmetic allows, whichever is more. What it allows is known
beforehand: a sum of n terms in fp32, in any order, is off by eps * sqrt(n) times the sum of
|terms| (Higham and Mary, doi 10.1137/18M1226312, and 2 for chance), and each rounding to a dtype
by its eps. So no verdict depends on the BLAS that torch or Triton's interpreter uses. The *_bounds
functions follow those errors through an operation, in fp64.
"""

import torch
from torch import Tensor

from triton_kernels import reference

EPS = torch.finfo(torch.float32).eps
DEEP = 8 * EPS  # of the kernels' own sums and torch's: in tiles and trees, 64 terms deep at most


def assert_as_exact_as_torch(
    ours: Tensor, theirs: Tensor, exact: Tensor, name: str, bound: Tensor | float = 0.0
) -> None:
    """ours and theirs (torch's, at the same dtype) against exact (fp64), by the rule.

    bound, like exact: what the arithmetic allows, besides the rounding of the result.
    """
    assert ours.shape == exact.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    )
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN in other places than torch's"
    assert torch.equal(ours.isinf(), theirs.isinf()), (
        f"{name}: infinity in other places than torch's"
    )
    finite = ours.isfinite()
    if not finite.any():
        return
    error = (ours.double() - exact).abs()[finite]
    torchs = (theirs.double() - exact).abs()[finite].max()
    allowed = (rounding(exact, ours.dtype) + 2 * EPS * exact.abs() + bound)[finite]
    worst = (error / allowed.clamp(min=2 * torchs)).max()
    assert worst <= 1, (
        f"{name}: an error is {worst:.3g} times what is allowed; the largest is {error.max():.3g},"
        f" torch's {torchs:.3g}"
    )


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding x to dtype, to nearest or towards 0."""
    return torch.finfo(dtype).eps * x.abs().clamp(min=torch.finfo(dtype).smallest_normal)


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of t that collects its own gradient."""
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def packed_documents(B: int, T: int, seed: int = 0, mean: float = 30.0) -> Tensor:
    """doc_start (B, T) of documents of random length, mean on average and several a row."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(B, T, generator=generator) < max(3 / T, 1 / mean)
    return torch.where(begins, torch.arange(T).expand(B, T), 0).cummax(1).values.int()


def attention_bounds(
    qkv: Tensor, dout: Tensor, doc_start: Tensor | None = None, scale: float | None = None
) -> dict[str, Tensor]:
    """For out, dq, dk and dv, each (B, T, H, D). p and ds are rounded to qkv's dtype."""
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    B, T, _, H, D = qkv.shape
    eps = EPS * max(T, D) ** 0.5
    seen = reference.doc_mask(qkv.new_zeros(B, T) if doc_start is None else doc_start, T)[:, 0]
    found: dict[str, list[Tensor]] = {"out": [], "dq": [], "dk": [], "dv": []}
    for h in range(H):  # one at a time: (B, T, T) in fp64 is large enough
        q, k, v = qkv[:, :, :, h].double().unbind(2)  # (B, T, D) each
        do = dout[:, :, h].double()
        p = (scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = p @ v
        # of a score, eps times its terms, and of p by that of all the scores of its row
        scores = (scale * q.abs() @ k.abs().mT).where(seen, 0.0).amax(-1, keepdim=True)
        dp = eps * p * (1 + scores)
        dp_rounded = dp + rounding(p, qkv.dtype).where(seen, 0.0)
        ds = p * (do @ v.mT - (do * out).sum(-1, keepdim=True))
        terms = do.abs() @ v.abs().mT + (do.abs() * (p @ v.abs())).sum(-1, keepdim=True)
        delta = (do.abs() * rounding(out, qkv.dtype)).sum(-1, keepdim=True)
        dds = 2 * dp * terms + p * delta + rounding(ds, qkv.dtype).where(seen, 0.0)
        found["out"].append(dp_rounded @ v.abs())
        found["dv"].append(dp_rounded.mT @ do.abs())
        found["dq"].append(scale * (dds + eps * ds.abs()) @ k.abs())
        found["dk"].append(scale * (dds + eps * ds.abs()).mT @ q.abs())
    return {name: torch.stack(bounds, 2) for name, bounds in found.items()}


def by_name(out_and_dqkv: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """out, dq, dk and dv, as attention_bounds has them."""
    return out_and_dqkv[0], *out_and_dqkv[1].unbind(2)


def loss_bounds(
    z: Tensor,
    targets: Tensor,
    dloss: Tensor | float,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    dz: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Of the loss and of the gradient of logits z (N, V), which are themselves uncertain by dz."""
    z, counted = z.double(), (targets != ignore_index)[:, None]
    p, top, lse = z.softmax(-1), z.amax(-1, keepdim=True), z.logsumexp(-1, keepdim=True)
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    dz = torch.zeros_like(z) + dz
    far = (top - z).where(p > 0, 0.0)  # what exp loses to the size of its argument
    dlse = (p * (DEEP + EPS * far + dz)).sum(-1, keepdim=True)
    dp = p * (DEEP + EPS * (z.abs() + lse.abs()).where(p > 0, 0.0) + dz + dlse) + EPS * is_target
    loss = (dlse + (EPS * far + dz).where(is_target, 0.0).sum(-1, keepdim=True)).where(counted, 0.0)
    dloss = torch.as_tensor(dloss, device=z.device).double().abs().expand(len(z))[:, None]
    if reduction == "mean":
        loss, dloss = loss / counted.sum(), dloss / counted.sum()
    dlogits = dloss * dp.where(counted, 0.0)
    return loss[:, 0] if reduction == "none" else loss.sum(), dlogits


def linear_loss_bounds(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dloss: Tensor | float,
    *,
    vocab_size: int | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Of the loss, dx and dweight; logits and their gradients are rounded to dtype, else x's."""
    dtype = dtype or x.dtype
    (N, C), rows = x.shape, slice(vocab_size)
    x_, w = x.double(), weight[rows].double()
    z, eps = x_ @ w.mT, EPS * max(N, C, w.shape[0]) ** 0.5
    dz = EPS * C**0.5 * x_.abs() @ w.abs().mT + rounding(z, dtype)
    if dtype != x.dtype:
        dz = dz + 2 * torch.finfo(dtype).eps * x_.abs() @ w.abs().mT
    options = dict(reduction=reduction, ignore_index=ignore_index)
    loss, dg = loss_bounds(z, targets, dloss, dz=dz, **options)
    counted = targets != ignore_index
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    dloss = torch.as_tensor(dloss, device=z.device).double().expand(N) * counted
    if reduction == "mean":
        dloss = dloss / counted.sum()
    g = (z.softmax(-1) - is_target.double()) * dloss[:, None]
    smallest = torch.finfo(dtype).smallest_normal * dloss.abs()[:, None]
    dg = dg + eps * g.abs() + torch.finfo(dtype).eps * g.abs().clamp(min=smallest)
    if dtype != x.dtype:
        dg = dg + 2 * torch.finfo(dtype).eps * g.abs()
    dw = torch.zeros_like(weight, dtype=torch.float64)
    dw[rows] = dg.mT @ x_.abs()
    return {"loss": loss, "dx": dg @ w.abs(), "dweight": dw}


def layer_norm_bounds(tensors: dict, upstream: list[Tensor]) -> dict[str, Tensor]:
    """By name, of the outputs and the gradients; upstream: of y, and of the sum if there is one."""
    x, residual, w = tensors["x"].double(), tensors["residual"], tensors["weight"].double()
    s, ds = x, 0.0
    rounded = torch.zeros_like(x)  # x + residual is rounded before it is normalised
    if residual is not None:
        s, ds = x + residual.double(), upstream[1].double()
        rounded = rounding(s, torch.promote_types(tensors["x"].dtype, residual.dtype))
    var, mean = torch.var_mean(s, -1, correction=0, keepdim=True)
    rstd = (var + 1e-5).rsqrt()
    h, dy = (s - mean) * rstd, upstream[0].double()

    def row_mean(t: Tensor) -> Tensor:
        return t.abs().mean(-1, keepdim=True)

    dh = rstd * (rounded + row_mean(rounded) + DEEP * row_mean(s))
    drstd = DEEP + row_mean(h * dh)  # relative
    dh = dh + h.abs() * drstd
    g, gh = w * dy, row_mean(w * dy * h)
    total = rstd * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    dtotal = DEEP * (g.abs() + row_mean(g) + h.abs() * gh) + dh * gh + h.abs() * row_mean(g * dh)
    dsum = rstd * dtotal + drstd * total.abs() + EPS * torch.as_tensor(ds).abs()
    rows = tuple(range(x.dim() - 1))
    found = {"y": w.abs() * dh, "sum": EPS * s.abs(), "dx": dsum, "dresidual": dsum}
    found["dweight"] = (dy.abs() * (dh + DEEP * h.abs())).sum(rows)
    return found | {"dbias": DEEP * dy.abs().sum(rows)}
