"""Cross entropy over a large vocabulary, with the gradient written over logits that may go.

N rows, V classes. For a row x with target t:
    lse  = log(sum(exp(x)))        loss = lse - x_t        dx_j = dloss (exp(x_j - lse) - [j = t])
and loss and dx are 0 where t is ignore_index.

One program walks over one row. Each lane keeps one running maximum m and s = sum(exp(x - m)) of its
own columns, so the walk needs no reduction across lanes until its end. There are two ways to the
gradient:
  - the forward walks over the row a second time and writes the gradient over the logits, which is
    linear_cross_entropy's way. A row is 100 kB, so the second read is served by the caches, and HBM
    sees one read and one write for forward and backward.
  - the forward only reads, and the backward computes the gradient from the logits and lse, into a
    new buffer or over the logits: one more read, but any dloss costs the same.
Columns come in whole tiles, unmasked, and then in masked tail tiles. Where the row stride divides
by 16 bytes (a padded vocabulary, 50257 in 50304) whole tiles move 16 bytes a lane; rows of 50257
without a gap move 2. Rounding happens once, when the gradient, with the 1 of the target already
subtracted in fp32, is stored.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.launch import (
    CROSS_ENTROPY,
    architecture,
    check_same_device,
    check_tensor,
    for_architecture,
    on_device,
    operator,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Times LOG2E it is still finite; a row with no logit above it counts as all -inf.
LOWEST = tl.constexpr(-2.3e38)
REDUCTIONS = ("mean", "sum", "none")
VOCABULARY_LIMIT = 2**31 - 2**16  # columns are int32


@triton.jit
def _online(m, s, x):
    """Some more logits a lane, neighbours in x (BLOCK,): m (LANES,) running maximum, and
    s = sum(exp(x - m)).

    m starts at LOWEST, not at -inf: then -inf - m is never -inf - -inf.
    """
    x = tl.reshape(x, (m.shape[0], x.shape[0] // m.shape[0]))
    top = tl.maximum(m, tl.max(x, axis=1))
    e = tl.sum(tl.exp2((x - top[:, None]) * LOG2E), axis=1)
    return top, s * tl.exp2((m - top) * LOG2E) + e


@triton.jit
def _write_gradient(
    x_row,  # (V,) of this row
    dx_row,  # (WIDTH,) of this row; may be x_row
    lse,
    target,
    x_target,
    scale,
    V,
    READABLE,  # columns of x_row that may be read: V or more
    WIDTH,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The gradient of one row times scale, and zeros from column V up to WIDTH.

    The target's column is written again at the end, so that no other is compared with it.
    """
    whole = V // BLOCK * BLOCK
    cols = tl.arange(0, BLOCK)
    lse2 = lse * LOG2E
    # every lane has read x_target and its columns before one is overwritten
    tl.debug_barrier()
    ahead = tl.load(x_row + cols, mask=whole > 0, other=0.0, eviction_policy="evict_first")
    for start in range(0, whole, BLOCK):
        x = ahead.to(tl.float32)
        # The next tile is asked for before this one is used: the stores below keep the compiler
        # from doing so.
        ahead = tl.load(
            x_row + start + BLOCK + cols,
            mask=start + BLOCK < whole,
            other=0.0,
            eviction_policy="evict_first",
        )
        g = tl.exp2(x * LOG2E - lse2) * scale
        tl.store(dx_row + start + cols, g, cache_modifier=".cs")
    for start in range(whole, WIDTH, TAIL):
        tail_cols = start + tl.arange(0, TAIL)
        in_vocabulary = tail_cols < V
        x = tl.load(x_row + tail_cols, mask=tail_cols < READABLE, other=0.0).to(tl.float32)
        x = tl.where(in_vocabulary, x, 0.0)  # the padding may hold anything
        g = tl.exp2(x * LOG2E - lse2) * scale
        tl.store(
            dx_row + tail_cols,
            tl.where(in_vocabulary, g, 0.0),
            mask=tail_cols < WIDTH,
            cache_modifier=".cs",
        )
    tl.debug_barrier()  # what was stored there comes before
    g = tl.exp2(x_target * LOG2E - lse2) * scale - scale
    tl.store(dx_row + target, g, mask=(target >= 0) & (target < V))


@triton.jit
def _write_zeros(dx_row, WIDTH, BLOCK: tl.constexpr):
    """Zeros in columns 0 to WIDTH of one row."""
    whole = WIDTH // BLOCK * BLOCK
    cols = tl.arange(0, BLOCK)
    for start in range(0, whole, BLOCK):
        tl.store(dx_row + start + cols, tl.zeros((BLOCK,), tl.float32), cache_modifier=".cs")
    tl.store(dx_row + whole + cols, tl.zeros((BLOCK,), tl.float32), mask=whole + cols < WIDTH)


@triton.jit(do_not_specialize=("V", "ignore_index"))
def _cross_entropy_fwd_kernel(
    logits_ptr,  # (N, WIDTH), row stride stride_n; with WRITE_GRADIENT overwritten by the gradient
    targets_ptr,  # (N,) integer
    loss_ptr,  # (N,) fp32
    lse_ptr,  # (N,) fp32
    stride_n, V, WIDTH, ignore_index, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Loss, lse and, with WRITE_GRADIENT, the gradient in place, of one row; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)  # 65,536 rows of 50,304 columns are beyond int32
    x_row = logits_ptr + row * stride_n
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if WRITE_GRADIENT:
            _write_zeros(x_row, WIDTH, BLOCK)
    else:
        # A target outside the vocabulary reads nothing and turns its row's loss and gradient into
        # NaN.
        in_range = (target >= 0) & (target < V)
        x_target = tl.load(x_row + target, mask=in_range, other=float("nan")).to(tl.float32)

        whole = V // BLOCK * BLOCK
        cols = tl.arange(0, BLOCK)
        m = tl.full((BLOCK // 8,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK // 8,), tl.float32)
        ahead = tl.load(x_row + cols, mask=whole > 0, other=0.0, eviction_policy="evict_last")
        for start in range(0, whole, BLOCK):
            x = ahead.to(tl.float32)
            ahead = tl.load(
                x_row + start + BLOCK + cols,
                mask=start + BLOCK < whole,
                other=0.0,
                eviction_policy="evict_last",
            )
            m, s = _online(m, s, x)
        m_tail = tl.full((TAIL // 4,), LOWEST, tl.float32)
        s_tail = tl.zeros((TAIL // 4,), tl.float32)
        for start in range(whole, V, TAIL):
            tail_cols = start + tl.arange(0, TAIL)
            in_vocabulary = tail_cols < V
            # Masked by the padded width, which divides by 16 where the row stride does, the loads
            # stay wide.
            x = tl.load(x_row + tail_cols, mask=tail_cols < WIDTH, other=0.0).to(tl.float32)
            m_tail, s_tail = _online(m_tail, s_tail, tl.where(in_vocabulary, x, float("-inf")))

        top = tl.maximum(tl.max(m, axis=0), tl.max(m_tail, axis=0))
        total = tl.sum(s * tl.exp2((m - top) * LOG2E), axis=0)
        total += tl.sum(s_tail * tl.exp2((m_tail - top) * LOG2E), axis=0)
        log_total = tl.log2(total) * LN2
        lse = top + log_total
        # Not lse - x_target, which loses log_total's digits to a large top.
        loss = log_total + (top - x_target)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)

        if WRITE_GRADIENT:
            lse = tl.where(in_range, lse, float("nan"))
            _write_gradient(x_row, x_row, lse, target, x_target, 1.0, V, WIDTH, WIDTH, BLOCK, TAIL)


@triton.jit(do_not_specialize=("V", "ignore_index"))
def _cross_entropy_bwd_kernel(
    logits_ptr,  # (N, V), row stride stride_n
    targets_ptr,  # (N,) integer
    lse_ptr,  # (N,) fp32
    dloss_ptr,  # (N,), or () with stride_d = 0
    dlogits_ptr,  # (N, WIDTH), row stride stride_dn; may be logits_ptr
    stride_n, stride_d, stride_dn, V, WIDTH, ignore_index, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradient of one row from its lse; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    dx_row = dlogits_ptr + row * stride_dn
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        _write_zeros(dx_row, WIDTH, BLOCK)
    else:
        lse = tl.load(lse_ptr + row)
        scale = tl.load(dloss_ptr + row * stride_d).to(tl.float32)
        in_range = (target >= 0) & (target < V)
        scale = tl.where(in_range, scale, float("nan"))
        x_row = logits_ptr + row * stride_n
        x_target = tl.load(x_row + target, mask=in_range, other=0.0).to(tl.float32)
        _write_gradient(x_row, dx_row, lse, target, x_target, scale, V, V, WIDTH, BLOCK, TAIL)


def _tile(device: torch.device) -> dict[str, int]:
    """Tile sizes and the number of warps, as kernel arguments."""
    tile = for_architecture(CROSS_ENTROPY, architecture(device))
    return dict(BLOCK=tile.block, TAIL=tile.tail, num_warps=tile.warps)


def loss_rows(
    logits: Tensor, targets: Tensor, loss: Tensor, lse: Tensor, ignore_index: int, vocab_size: int,
    write_gradient: bool = False,
) -> None:  # fmt: skip
    """Launch the forward on logits (N, WIDTH >= vocab_size), into loss (N,) and lse (N,).

    write_gradient: overwrite logits by their gradient, 0 beyond vocab_size.
    """
    N, width = logits.shape
    _cross_entropy_fwd_kernel[(N,)](
        logits, targets, loss, lse, logits.stride(0), vocab_size, width, ignore_index,
        WRITE_GRADIENT=write_gradient, **_tile(logits.device),
    )  # fmt: skip


def gradient_rows(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, out: Tensor, ignore_index: int,
    vocab_size: int,
) -> None:  # fmt: skip
    """Launch the backward: the gradient of logits (N, .) into out (N, WIDTH), 0 beyond vocab_size.

    dloss () or (N,); out may be logits.
    """
    N, width = out.shape
    _cross_entropy_bwd_kernel[(N,)](
        logits, targets, lse, dloss, out, logits.stride(0), dloss.stride(0) if dloss.dim() else 0,
        out.stride(0), vocab_size, width, ignore_index, **_tile(logits.device),
    )  # fmt: skip


@operator
def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """loss and lse, each (N,), of logits (N, V)."""
    N, V = logits.shape
    loss, lse = (logits.new_empty((N,), dtype=torch.float32) for _ in range(2))
    yield loss, lse
    loss_rows(logits, targets, loss, lse, ignore_index, V)


@operator
def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Iterator[Tensor]:
    """The gradient of logits (N, V), with the padding of their rows: it keeps their alignment."""
    (N, V), stride = logits.shape, logits.stride(0)
    out = logits.new_empty((N, stride if V <= stride <= 2 * V else V))
    yield out[:, :V]
    gradient_rows(dloss, logits, targets, lse, out, ignore_index, V)


def reduce_loss(
    loss: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """loss (N,) as reduction asks, and for "mean" the rows that count: () fp32, on the device."""
    if reduction == "none":
        return loss, None
    if reduction == "sum":
        return loss.sum(), None
    n_valid = (targets != ignore_index).sum(dtype=torch.float32)
    return loss.sum() / n_valid, n_valid


class _CrossEntropy(torch.autograd.Function):
    """Overwrites logits in the backward where in_place, and tells autograd's version counter, so
    whoever else saved the logits, and a second backward, get torch's error about a modified tensor
    instead of wrong numbers.
    """

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, reduction, in_place):
        loss, lse = cross_entropy_fwd(logits, targets, ignore_index)
        loss, n_valid = reduce_loss(loss, targets, ignore_index, reduction)
        ctx.save_for_backward(logits, targets, lse, n_valid)
        ctx.ignore_index, ctx.in_place = ignore_index, in_place
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, lse, n_valid = ctx.saved_tensors
        dloss = dloss.contiguous() if n_valid is None else dloss / n_valid
        if not ctx.in_place:
            dlogits = cross_entropy_bwd(dloss, logits, targets, lse, ctx.ignore_index)
            return dlogits, None, None, None, None
        dlogits, V = logits.detach(), logits.shape[1]
        with on_device(dlogits):
            gradient_rows(dloss, dlogits, targets, lse, dlogits, ctx.ignore_index, V)
        torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None, None


def check_rows(op: str, name: str, rows: Tensor, targets: Tensor, reduction: str) -> None:
    """Raise ValueError unless rows (N, .) and targets (N,) can go into a cross entropy."""
    if rows.dim() != 2 or rows.shape[1] < 1:
        raise ValueError(
            f"{op}: {name} has shape {tuple(rows.shape)}; it must be (N,"
            f" {'V' if name == 'logits' else 'C'})"
        )
    check_tensor(op, name, rows)
    if targets.shape != rows.shape[:1]:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)}, but {name} has {rows.shape[0]} rows;"
            " flatten both"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: targets is {targets.dtype}; class indices must be int64 or int32")
    check_same_device(op, "targets", targets, name, rows)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}"
        )


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    """Cross entropy of logits against class indices, in fp32.

    logits (N, V) fp32 | fp16 | bf16, any row stride; rows that start 16 bytes apart or a multiple
        of it are read widest.
    targets (N,) int64 | int32; ignore_index marks rows that do not count: their loss and gradient
        are 0, and what their logits hold, NaN included, is not read. A target out of range reads
        nothing and makes its row's loss and gradient NaN.
    inplace_backward: let the backward write the gradient over the logits: they are not read after
        it, and it is called once. No effect under torch.compile, where only buffers that an
        operator allocated may be overwritten safely.
    Returns a scalar fp32, or (N,) for reduction "none". With no row that counts the mean is NaN and
    the gradient 0.

    Raises ValueError where shapes, dtypes, devices or numbers do not fit.
    Source: torch.nn.functional.cross_entropy.
    """
    check_rows("cross_entropy", "logits", logits, targets, reduction)
    V = logits.shape[1]
    if V > VOCABULARY_LIMIT:
        raise ValueError(
            f"cross_entropy: logits has {V:,} columns; at most {VOCABULARY_LIMIT:,} are supported"
        )
    in_place = inplace_backward and not torch.compiler.is_compiling()
    # rows that overlap cannot be written
    if logits.stride(1) != 1 or (in_place and logits.stride(0) < V):
        logits = logits.contiguous()
    return _CrossEntropy.apply(logits, targets.contiguous(), ignore_index, reduction, in_place)
