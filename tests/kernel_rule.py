"""The rule that every kernel test goes by, on a CPU through Triton's interpreter and on a GPU.

The error of a kernel against the same operation in fp64 is, for each element, at most twice torch's
own at the same dtype, or what the arithmetic allows, whichever is more. What it allows is known
beforehand: a sum of n terms in fp32, in any order, is off by eps * sqrt(n) times the sum of
|terms| (Higham and Mary, doi 10.1137/18M1226312, and 2 for chance), and each rounding to a dtype
by its eps. So no verdict depends on the BLAS that torch or Triton's interpreter uses. The *_bounds
functions follow those errors through an operation, in fp64.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import triton_kernels
from triton_kernels import reference

SAME_BITS = dict(rtol=0, atol=0)  # of torch.testing.assert_close
EPS = torch.finfo(torch.float32).eps
DEEP = 8 * EPS  # of the kernels' own sums and torch's: in tiles and trees, 64 terms deep at most


def assert_as_exact_as_torch(
    ours: Tensor, theirs: Tensor, exact: Tensor, name: str, bound: Tensor | float = 0.0
) -> None:
    """ours and theirs (torch's, at the same dtype) against exact (fp64), by the rule.

    bound, like exact: what the arithmetic allows, besides the rounding of the result.
    """
    assert ours.shape == exact.shape, name
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN in other places than torch's"
    assert torch.equal(ours.isinf(), theirs.isinf()), f"{name}: infinity where torch has none"
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


def results(
    function: Callable, tensors: list[Tensor], upstream: list, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The outputs of function(*tensors), a few or one, and the gradients of tensors; upstream: of
    each output its own, perhaps more. dtype: compute with copies of that dtype.
    """
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        torch.as_tensor(u, device=o.device).to(o.dtype).expand(o.shape)
        for u, o in zip(upstream, outputs, strict=False)
    ]
    kept = [o.detach().clone() for o in outputs]
    return kept + list(torch.autograd.grad(outputs, leaves, upstream))


def check(
    call: Callable, tensors: list[Tensor], upstream: list, bounds: dict[str, Tensor]
) -> list[Tensor]:
    """Results of call(triton_kernels, *tensors) by the rule; bounds in their order."""

    def of(module, dtype=None):
        return results(lambda *leaves: call(module, *leaves), tensors, upstream, dtype)

    ours, theirs, exact = of(triton_kernels), of(reference), of(reference, torch.float64)
    for name, *values in zip(bounds, ours, theirs, exact, strict=True):
        assert values[0].dtype == values[1].dtype, name
        assert_as_exact_as_torch(*values, name, bounds[name])
    return ours


def packed_documents(B: int, T: int, seed: int = 0, mean: float = 30.0) -> Tensor:
    """doc_start (B, T) of documents of random length, mean on average and several a row."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(B, T, generator=generator) < max(3 / T, 1 / mean)
    return torch.where(begins, torch.arange(T).expand(B, T), 0).cummax(1).values.int()


def check_attention(
    qkv: Tensor, dout: Tensor | None = None, doc_start: Tensor | None = None, rows=None
) -> None:
    """Output and the gradients of q, k and v; against the oracle, which holds (H, T, T), one row
    of the batch at a time, those in rows.
    """
    if dout is None:
        B, T, _, H, D = qkv.shape
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(B, T, H, D, generator=generator, device="cpu").to(qkv)
    out, dqkv = results(
        lambda qkv: triton_kernels.attention(qkv, doc_start=doc_start), [qkv], [dout]
    )
    for row in range(len(qkv)) if rows is None else rows:
        at = slice(row, row + 1)
        first = None if doc_start is None else doc_start[at]

        def plain(qkv, first=first):
            return reference.attention(qkv, doc_start=first)

        theirs = results(plain, [qkv[at]], [dout[at]])
        exact = results(plain, [qkv[at]], [dout[at]], torch.float64)
        bounds = attention_bounds(qkv[at], dout[at], first)
        parts = ((o, *d.unbind(2)) for o, d in ((out[at], dqkv[at]), theirs, exact))
        for name, *values in zip(bounds, *parts, strict=True):
            assert_as_exact_as_torch(*values, f"{name} of row {row}", bounds[name])


def attention_bounds(
    qkv: Tensor, dout: Tensor, doc_start: Tensor | None = None
) -> dict[str, Tensor]:
    """Of out, dq, dk and dv, each (B, T, H, D). p and ds are rounded to qkv's dtype."""
    B, T, _, H, D = qkv.shape
    scale = D**-0.5
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


def check_cross_entropy(
    buffer: Tensor, targets: Tensor, V: int, dloss: Tensor | float = 1.0, *,
    inplace_backward: bool = False, **options,
) -> None:  # fmt: skip
    """Loss and gradient of buffer[:, :V], which are intermediate and may be overwritten."""

    def call(module, buffer):
        logits = (buffer * 1)[:, :V]
        return module.cross_entropy(logits, targets, inplace_backward=inplace_backward, **options)

    loss, dlogits = loss_bounds(buffer[:, :V], targets, dloss, **options)
    dlogits = F.pad(dlogits, (0, buffer.shape[1] - V))
    ours = check(call, [buffer], [dloss], {"loss": loss, "dlogits": dlogits})
    assert ours[0].dtype == torch.float32
    assert not ours[1][:, V:].any()


def loss_bounds(
    z: Tensor, targets: Tensor, dloss: Tensor | float, *, reduction: str = "mean",
    ignore_index: int = -100, dz: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def check_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor | float = 1.0, **options
) -> None:
    """Loss, dx and dweight; logits and their gradients are rounded to x's dtype, or autocast's."""
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    def call(module, x, weight):
        if x.dtype == torch.float64:
            with torch.autocast(device, enabled=False):
                return module.linear_cross_entropy(x, weight, targets, **options)
        return module.linear_cross_entropy(x, weight, targets, **options)

    bounds = linear_loss_bounds(x, weight, targets, dloss, dtype, **options)
    ours = check(call, [x, weight], [dloss], bounds)
    assert ours[0].dtype == torch.float32
    assert not ours[2][options.get("vocab_size") or len(weight) :].any()


def linear_loss_bounds(
    x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor | float, dtype: torch.dtype, *,
    vocab_size: int | None = None, reduction: str = "mean", ignore_index: int = -100,
) -> dict[str, Tensor]:  # fmt: skip
    """Of the loss, dx and dweight, with logits and their gradients in dtype."""
    (N, C), rows = x.shape, slice(vocab_size)
    x_, w = x.double(), weight[rows].double()
    cast = 0.0 if dtype == x.dtype else 2 * torch.finfo(dtype).eps  # of each product
    z = x_ @ w.mT
    dz = (EPS * C**0.5 + cast) * x_.abs() @ w.abs().mT + rounding(z, dtype)
    options = dict(reduction=reduction, ignore_index=ignore_index)
    loss, dg = loss_bounds(z, targets, dloss, dz=dz, **options)
    counted = targets != ignore_index
    is_target = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    dloss = torch.as_tensor(dloss, device=z.device).double().abs().expand(N) * counted
    if reduction == "mean":
        dloss = dloss / counted.sum()
    g = (z.softmax(-1) - is_target.double()).abs()
    # rounded while it is p - 1 [j = t], before dloss comes
    dg = dg + dloss[:, None] * (rounding(g, dtype) + (EPS * max(N, len(w)) ** 0.5 + cast) * g)
    dw = F.pad(dg.mT @ x_.abs(), (0, 0, 0, len(weight) - len(w)))
    return {"loss": loss, "dx": dg @ w.abs(), "dweight": dw}


def check_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    seed: int = 1,
) -> None:  # fmt: skip
    """y, the sum if there is a residual, and the gradients of all that is given."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for _ in range(2)]
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    given = [name for name, t in tensors.items() if t is not None]

    def call(module, *leaves):
        t = dict(zip(given, leaves, strict=True))
        return module.layer_norm(t["x"], t["weight"], t.get("bias"), residual=t.get("residual"))

    bounds = layer_norm_bounds(tensors, upstream)
    names = ["y", *["sum"] * (residual is not None), *("d" + name for name in given)]
    bounds = {name: bounds[name] for name in names}
    check(call, [tensors[name] for name in given], upstream, bounds)


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
