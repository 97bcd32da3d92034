"""Layer normalisation with the residual addition that precedes it, forward and backward.

M rows, C channels, P programs of the backward's first stage.

Forward, for each row, with s = x + residual (s = x where there is none), rounded to s's dtype
first, so that what the backward reads is what the forward normalised:
    mean = sum(s) / C        rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)
    h = (s - mean) rstd      y = h w + b
Backward, with g = w dy and the incoming gradient ds of the sum itself:
    ds_total = ds + rstd (g - mean_C(g) - h mean_C(g h))       both dx and dresidual
    dw = sum_M(dy h)         db = sum_M(dy)

The forward reads x and residual once and writes s and y once; the backward reads s, dy and ds
once and writes dx once. A row stays in registers between its load and its store, and mean and
rstd stay in fp32. dw and db come in two stages without atomics, so they are the same bits on
every run: each of P programs walks over every P-th block of rows and leaves one fp32 partial row,
and a second kernel adds up the P partial rows.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.launch import (
    architecture,
    check_same_device,
    check_tensor,
    layer_norm_tile,
    multiprocessors,
    operator,
)

MAX_WIDTH = 16384  # a row, its gradient and two partial rows must fit in a program's registers


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C), row stride stride_xm
    residual_ptr,  # (M, C), row stride stride_rm; None unless HAS_RESIDUAL
    weight_ptr,  # (C,)
    bias_ptr,  # (C,); None unless HAS_BIAS
    y_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C) contiguous, x + residual; None unless HAS_RESIDUAL
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    M, stride_xm, stride_rm, C: tl.constexpr, EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = norm(x + residual) w + b for BLOCK_M rows; grid (cdiv(M, BLOCK_M),)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    in_rows = rows < M
    in_cols = cols < C
    in_tile = in_rows[:, None] & in_cols[None, :]
    out = rows[:, None] * C + cols[None, :]  # (BLOCK_M, BLOCK_C)

    s = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=in_tile, other=0.0).to(
        tl.float32
    )
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows[:, None] * stride_rm + cols[None, :], mask=in_tile, other=0.0
        )
        rounded = (s + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=in_tile)
        s = rounded.to(tl.float32)

    mean = tl.sum(s, axis=1) / C  # (BLOCK_M,)
    centred = tl.where(in_cols[None, :], s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + EPS)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)

    y = (
        centred
        * rstd[:, None]
        * tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    )
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y, mask=in_tile)


@triton.jit
def _layer_norm_bwd_kernel(
    s_ptr,  # (M, C), row stride stride_sm: what the forward normalised
    dy_ptr,  # (M, C), row stride stride_ym
    ds_ptr,  # (M, C), row stride stride_dm: gradient of the sum from elsewhere; None unless HAS_DS
    weight_ptr,  # (C,)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    dsum_ptr,  # (M, C) contiguous: gradient of the residual, and of x where their dtypes agree
    dx_ptr,  # (M, C) contiguous, the same in x's dtype; None unless HAS_DX
    partial_ptr,  # (2, P, C) fp32: partial dw, then partial db; None unless HAS_DW
    M, P, stride_sm, stride_ym, stride_dm, C: tl.constexpr, HAS_DS: tl.constexpr,
    HAS_DX: tl.constexpr, HAS_DW: tl.constexpr, HAS_DB: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of every P-th block of BLOCK_M rows and one partial row of dw and db; grid (P,)."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    in_cols = cols < C
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK_C,), tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)

    for block in tl.range(program, tl.cdiv(M, BLOCK_M), P, num_stages=STAGES):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = rows < M
        in_tile = in_rows[:, None] & in_cols[None, :]
        s = tl.load(s_ptr + rows[:, None] * stride_sm + cols[None, :], mask=in_tile, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_ym + cols[None, :], mask=in_tile, other=0.0)
        if HAS_DS:
            ds = tl.load(
                ds_ptr + rows[:, None] * stride_dm + cols[None, :], mask=in_tile, other=0.0
            )
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]

        dy = dy.to(tl.float32)
        h = (s.to(tl.float32) - mean) * rstd
        g = weight * dy  # zero outside the tile, which keeps both means exact there
        g_mean = tl.sum(g, axis=1)[:, None] / C
        gh_mean = tl.sum(g * h, axis=1)[:, None] / C
        total = rstd * (g - g_mean - h * gh_mean)
        if HAS_DS:
            total += ds.to(tl.float32)
        out = rows[:, None] * C + cols[None, :]
        tl.store(dsum_ptr + out, total, mask=in_tile)
        if HAS_DX:
            tl.store(dx_ptr + out, total, mask=in_tile)
        if HAS_DW:
            dw += tl.sum(dy * h, axis=0)
            if HAS_DB:
                db += tl.sum(dy, axis=0)

    if HAS_DW:
        tl.store(partial_ptr + program * C + cols, dw, mask=in_cols)
        if HAS_DB:
            tl.store(partial_ptr + (P + program) * C + cols, db, mask=in_cols)


@triton.jit
def _layer_norm_dw_kernel(
    partial_ptr,  # (2, P, C) fp32
    dw_ptr,  # (C,)
    db_ptr,  # (C,); None unless HAS_DB
    P, C: tl.constexpr, HAS_DB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of the partial rows, always in the same order; grid (cdiv(C, BLOCK_C), 1 + HAS_DB)."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        in_tile = (parts < P)[:, None] & in_cols[None, :]
        acc += tl.load(
            partial_ptr + (which * P + parts)[:, None] * C + cols[None, :], mask=in_tile, other=0.0
        )
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(dw_ptr + cols, total, mask=in_cols)
    if HAS_DB:
        if which == 1:
            tl.store(db_ptr + cols, total, mask=in_cols)


def _rows(t: Tensor | None) -> Tensor | None:
    """t (M, C) with adjacent channels, so that one row stride describes it."""
    return t if t is None or t.stride(1) == 1 else t.contiguous()


@operator
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """y, sum, mean and rstd of x (M, C); the sum is empty without a residual (an operator may not
    return its input).
    """
    M, C = x.shape
    if residual is None:
        summed = x.new_empty((0, C))
    else:
        summed = x.new_empty((M, C), dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = (x.new_empty((M,), dtype=torch.float32) for _ in range(2))
    y = x.new_empty((M, C), dtype=dtype)
    yield y, summed, mean, rstd
    x, residual = _rows(x), _rows(residual)
    tile = layer_norm_tile(architecture(x.device), C)
    _layer_norm_fwd_kernel[(triton.cdiv(M, tile.fwd_rows),)](
        x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y,
        None if residual is None else summed, mean, rstd, M, x.stride(0),
        0 if residual is None else residual.stride(0), C=C, EPS=eps,
        HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, BLOCK_M=tile.fwd_rows,
        BLOCK_C=triton.next_power_of_2(C), num_warps=tile.fwd_warps,
    )  # fmt: skip


@operator
def layer_norm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    x_dtype: torch.dtype, has_dw: bool, bias_dtype: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """dsum, dx, dw and db; dx is empty where x has the sum's dtype, dw and db where they are not
    asked for.
    """
    M, C = s.shape
    has_dx, has_db = x_dtype != s.dtype, has_dw and bias_dtype is not None
    dsum, dx = s.new_empty((M, C)), s.new_empty((M if has_dx else 0, C), dtype=x_dtype)
    dw = weight.new_empty((C if has_dw else 0,))
    db = weight.new_empty((C if has_db else 0,), dtype=bias_dtype)
    yield dsum, dx, dw, db
    if M == 0:  # no program would write them
        dw.zero_(), db.zero_()
        return
    s, dy, ds = _rows(s), _rows(dy), _rows(ds)
    tile = layer_norm_tile(architecture(s.device), C)
    P = min(triton.cdiv(M, tile.bwd_rows), multiprocessors(s.device) * tile.bwd_programs)
    partial = s.new_empty((1 + has_db, P, C), dtype=torch.float32) if has_dw else None
    _layer_norm_bwd_kernel[(P,)](
        s, dy, ds, weight.contiguous(), mean, rstd, dsum, dx if has_dx else None, partial, M, P,
        s.stride(0), dy.stride(0), 0 if ds is None else ds.stride(0), C=C, HAS_DS=ds is not None,
        HAS_DX=has_dx, HAS_DW=has_dw, HAS_DB=has_db, STAGES=tile.bwd_stages,
        BLOCK_M=tile.bwd_rows, BLOCK_C=triton.next_power_of_2(C), num_warps=tile.bwd_warps,
    )  # fmt: skip
    if has_dw:
        _layer_norm_dw_kernel[(triton.cdiv(C, tile.dw_cols), 1 + has_db)](
            partial, dw, db if has_db else None, P, C=C, HAS_DB=has_db, BLOCK_P=tile.dw_parts,
            BLOCK_C=tile.dw_cols, num_warps=4,
        )  # fmt: skip


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, dtype):  # x, residual (..., C)
        C = x.shape[-1]
        rows = None if residual is None else residual.reshape(-1, C)
        y, s, mean, rstd = layer_norm_fwd(x.reshape(-1, C), weight, bias, rows, eps, dtype)
        ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
        ctx.shape, ctx.x_dtype, ctx.has_residual = x.shape, x.dtype, residual is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return (y.view(x.shape), s.view(x.shape)) if ctx.has_residual else y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        s, weight, mean, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return ds, None, None, ds if ctx.has_residual else None, None, None
        C = ctx.shape[-1]
        has_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dsum, dx, dw, db = layer_norm_bwd(
            dy.reshape(-1, C), None if ds is None else ds.reshape(-1, C), s.reshape(-1, C), weight,
            mean, rstd, ctx.x_dtype, has_dw, ctx.bias_dtype,
        )  # fmt: skip
        # One view for both x and residual: autograd sees that it is shared and does not let two
        # .grad alias it.
        dsum = dsum.view(ctx.shape)
        dx = dsum if ctx.x_dtype == s.dtype else dx.view(ctx.shape)
        dw, db = dw if has_dw else None, db if has_dw and ctx.bias_dtype is not None else None
        return dx, dw, db, dsum if ctx.has_residual else None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"layer_norm: x has shape {tuple(x.shape)}; its last dimension must be 1 to {MAX_WIDTH}"
            " channels wide"
        )
    for name, t in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
        if t is None:
            continue
        shape = x.shape if name in ("x", "residual") else x.shape[-1:]
        if t.shape != shape:
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(t.shape)}, but x of shape {tuple(x.shape)}"
                f" needs {tuple(shape)}"
            )
        check_same_device("layer_norm", name, t, "x", x)
        check_tensor("layer_norm", name, t)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Layer normalisation over the last dimension, with the residual addition that comes before it.

    x (..., C) fp32 | fp16 | bf16, C <= 16384; weight (C,) and bias (C,) or None, any of those
    dtypes, used in fp32; residual (..., C) or None. Rows need not be contiguous; a tensor whose
    last dimension is strided is copied.
    Returns y, or (y, x + residual) where y normalises the sum.
    The sum has the dtype that torch promotes x and residual to, so a bf16 branch on an fp32 stream
    keeps the stream fp32.
    y has the autocast dtype under autocast (which saves the cast before the next matmul;
    F.layer_norm returns fp32 there), and otherwise the dtype of what was normalised. Statistics,
    gradients in flight, dw and db are fp32 until they are stored in the dtype of their tensor.
    Deterministic.

    Raises ValueError where shapes, dtypes or devices do not fit.  Source:
    torch.nn.functional.layer_norm.
    """
    _check(x, weight, bias, residual)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _LayerNorm.apply(x, weight, bias, residual, eps, dtype)
