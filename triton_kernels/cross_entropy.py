"""Cross entropy over a large vocabulary, with the gradient written over logits that may go.

N rows, V classes. For a row x with target t, label smoothing a and z-loss weight z:
    lse  = log(sum(exp(x)))
    loss = lse - (1 - a) x_t - (a / V) sum(x) + z lse^2
    dx_j = dloss (exp(x_j - lse) (1 + 2 z lse) - (1 - a) [j = t] - a / V)
and both are 0 where t is ignore_index. "mean" divides by the number of rows that count, which
stays on the device.

One program walks over one row. Each lane keeps a running maximum m and s = sum(exp(x - m)) of its
own columns, so the walk needs no reduction across lanes until its end. There are two ways to the
gradient:
  - inplace_backward: the forward walks over the row a second time and writes the gradient over the
    logits. A row is 100 kB, so the second read is served by the caches, and HBM sees one read and
    one write for forward and backward.
  - otherwise the forward only reads, and the backward computes the gradient from the logits and
    lse into a new buffer: one more read, but nothing is allocated in the forward and any dloss
    costs the same.
Columns come in whole tiles, unmasked, and then in masked tail tiles. Where the row stride divides
by 16 bytes (a padded vocabulary, 50257 in 50304) whole tiles move 16 bytes a lane; rows of 50257
without a gap move 2. Rounding happens once, when the gradient, with the 1 of the target already
subtracted in fp32, is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.launch import (
    CROSS_ENTROPY,
    StaticConfig,
    architecture,
    device_guard,
    for_architecture,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Times LOG2E it is still finite; a row with no logit above it counts as all -inf.
LOWEST = tl.constexpr(-2.3e38)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")
SCALE_WARPS = 8
VOCABULARY_LIMIT = 2**31 - 2**16  # columns are int32


@triton.jit
def _online(m, s, x):
    """One more logit a lane: m running maximum, s = sum(exp(x - m)), with one exp.

    m starts at LOWEST, not at -inf: then -inf - m is never -inf - -inf.
    """
    e = tl.exp2(-tl.abs(x - m) * LOG2E)
    return tl.maximum(m, x), tl.where(x > m, s * e + 1.0, s + e)


@triton.jit
def _gradient(x, lse, cols, target, p_scale, target_part, smooth_part):
    """p_scale exp(x - lse) - target_part [col = target] - smooth_part."""
    g = tl.exp2((x - lse) * LOG2E) * p_scale - smooth_part
    return tl.where(cols == target, g - target_part, g)


@triton.jit
def _write_gradient(
    x_row,  # (V,) of this row
    dx_row,  # (WIDTH,) of this row; may be x_row
    lse,
    target,
    scale,
    V,
    READABLE,  # columns of x_row that may be read: V or more
    WIDTH,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The gradient of one row times scale, and zeros from column V up to WIDTH."""
    p_scale = scale * (1.0 + 2.0 * Z_LOSS * lse)
    target_part = scale * (1.0 - SMOOTHING)
    smooth_part = scale * SMOOTHING / V
    whole = V // BLOCK * BLOCK
    cols = tl.arange(0, BLOCK)
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
        g = _gradient(x, lse, start + cols, target, p_scale, target_part, smooth_part)
        tl.store(dx_row + start + cols, g, cache_modifier=".cs")
    for start in range(whole, WIDTH, TAIL):
        tail_cols = start + tl.arange(0, TAIL)
        in_vocabulary = tail_cols < V
        x = tl.load(x_row + tail_cols, mask=tail_cols < READABLE, other=0.0).to(tl.float32)
        x = tl.where(in_vocabulary, x, 0.0)  # the padding may hold anything
        g = _gradient(x, lse, tail_cols, target, p_scale, target_part, smooth_part)
        tl.store(
            dx_row + tail_cols,
            tl.where(in_vocabulary, g, 0.0),
            mask=tail_cols < WIDTH,
            cache_modifier=".cs",
        )


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
    n_valid_ptr,  # () fp32: divides the gradient; None unless MEAN
    stride_n,
    V,
    WIDTH,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
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
        m = tl.full((BLOCK,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK,), tl.float32)
        x_sum = tl.zeros((BLOCK,), tl.float32)
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
            if SMOOTHING > 0.0:
                x_sum += x
        m_tail = tl.full((TAIL,), LOWEST, tl.float32)
        s_tail = tl.zeros((TAIL,), tl.float32)
        x_sum_tail = tl.zeros((TAIL,), tl.float32)
        for start in range(whole, V, TAIL):
            tail_cols = start + tl.arange(0, TAIL)
            in_vocabulary = tail_cols < V
            # Masked by the padded width, which divides by 16 where the row stride does, the loads
            # stay wide.
            x = tl.load(x_row + tail_cols, mask=tail_cols < WIDTH, other=0.0).to(tl.float32)
            m_tail, s_tail = _online(m_tail, s_tail, tl.where(in_vocabulary, x, float("-inf")))
            if SMOOTHING > 0.0:
                x_sum_tail += tl.where(in_vocabulary, x, 0.0)

        top = tl.maximum(tl.max(m, axis=0), tl.max(m_tail, axis=0))
        total = tl.sum(s * tl.exp2((m - top) * LOG2E), axis=0)
        total += tl.sum(s_tail * tl.exp2((m_tail - top) * LOG2E), axis=0)
        log_total = tl.log2(total) * LN2
        lse = top + log_total
        # Not lse - x_target, which loses log_total's digits to a large top.
        loss = log_total + (top - x_target)
        if SMOOTHING > 0.0:
            x_mean = (tl.sum(x_sum, axis=0) + tl.sum(x_sum_tail, axis=0)) / V
            loss = (1.0 - SMOOTHING) * loss + SMOOTHING * (log_total + (top - x_mean))
        if Z_LOSS > 0.0:
            loss += Z_LOSS * lse * lse
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)

        if WRITE_GRADIENT:
            scale = tl.where(in_range, 1.0, float("nan"))
            if MEAN:
                scale = scale / tl.load(n_valid_ptr)
            # every lane has read x_target and its columns before one is overwritten
            tl.debug_barrier()
            _write_gradient(
                x_row, x_row, lse, target, scale, V, WIDTH, WIDTH, SMOOTHING, Z_LOSS, BLOCK, TAIL
            )


@triton.jit(do_not_specialize=("V", "ignore_index"))
def _cross_entropy_bwd_kernel(
    logits_ptr,  # (N, V), row stride stride_n
    targets_ptr,  # (N,) integer
    lse_ptr,  # (N,) fp32
    dloss_ptr,  # (N,), or () with stride_d = 0
    n_valid_ptr,  # () fp32; None unless MEAN
    dlogits_ptr,  # (N, WIDTH), row stride stride_dn; may be logits_ptr
    stride_n,
    stride_d,
    stride_dn,
    V,
    WIDTH,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The gradient of one row from its lse; grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    dx_row = dlogits_ptr + row * stride_dn
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        _write_zeros(dx_row, WIDTH, BLOCK)
    else:
        lse = tl.load(lse_ptr + row)
        scale = tl.load(dloss_ptr + row * stride_d).to(tl.float32)
        scale = tl.where((target >= 0) & (target < V), scale, float("nan"))
        if MEAN:
            scale = scale / tl.load(n_valid_ptr)
        x_row = logits_ptr + row * stride_n
        _write_gradient(
            x_row, dx_row, lse, target, scale, V, V, WIDTH, SMOOTHING, Z_LOSS, BLOCK, TAIL
        )


@triton.jit(do_not_specialize=("V",))
def _scale_kernel(
    x_ptr,  # (N, V), row stride stride_n
    scale_ptr,  # ()
    stride_n,
    V,
    BLOCK: tl.constexpr,
):
    """x *= scale in place, or nothing at all where scale is 1, which the host need not know; grid
    (N,).
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        x_row = x_ptr + tl.program_id(0).to(tl.int64) * stride_n
        whole = V // BLOCK * BLOCK
        cols = tl.arange(0, BLOCK)
        for start in range(0, whole, BLOCK):
            x = tl.load(x_row + start + cols).to(tl.float32)
            tl.store(x_row + start + cols, x * scale)
        in_tail = whole + cols < V
        x = tl.load(x_row + whole + cols, mask=in_tail, other=0.0).to(tl.float32)
        tl.store(x_row + whole + cols, x * scale, mask=in_tail)


def _tile(device: torch.device) -> tuple[dict[str, int], int]:
    """Tile sizes as kernel arguments, and the number of warps."""
    tile = for_architecture(CROSS_ENTROPY, architecture(device))
    return {"BLOCK": tile.block, "TAIL": tile.tail}, tile.warps


def count_valid(targets: Tensor, ignore_index: int) -> Tensor:
    """() fp32: the rows that count, on the device."""
    return (targets != ignore_index).sum(dtype=torch.float32)


def loss_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    write_gradient: bool,
    n_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward on logits (N, WIDTH >= vocab_size): loss (N,) and lse (N,).

    write_gradient: overwrite logits by their gradient, divided by n_valid where given, 0 beyond
    vocab_size.
    """
    N, width = logits.shape
    loss, lse = (logits.new_empty((N,), dtype=torch.float32) for _ in range(2))
    if N == 0:
        return loss, lse
    blocks, warps = _tile(logits.device)
    with device_guard(_cross_entropy_fwd_kernel, "logits", logits):
        _cross_entropy_fwd_kernel[(N,)](
            logits,
            targets,
            loss,
            lse,
            n_valid,
            logits.stride(0),
            vocab_size,
            width,
            ignore_index,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            WRITE_GRADIENT=write_gradient,
            MEAN=n_valid is not None,
            num_warps=warps,
            **blocks,
        )
    return loss, lse


def gradient_rows(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    out: Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    n_valid: Tensor | None = None,
) -> None:
    """Launch the backward: the gradient of logits (N, .) into out (N, WIDTH), 0 beyond vocab_size.

    dloss () or (N,); out may be logits.
    """
    N, width = out.shape
    if N == 0:
        return
    blocks, warps = _tile(logits.device)
    with device_guard(_cross_entropy_bwd_kernel, "logits", logits):
        _cross_entropy_bwd_kernel[(N,)](
            logits,
            targets,
            lse,
            dloss,
            n_valid,
            out,
            logits.stride(0),
            dloss.stride(0) if dloss.dim() else 0,
            out.stride(0),
            vocab_size,
            width,
            ignore_index,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            MEAN=n_valid is not None,
            num_warps=warps,
            **blocks,
        )


def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    return loss_rows(
        logits,
        targets,
        vocab_size=logits.shape[1],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        write_gradient=False,
    )


def _fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    loss, lse = (logits.new_empty((logits.shape[0],), dtype=torch.float32) for _ in range(2))
    return loss, lse


def _gradient_buffer(logits: Tensor) -> Tensor:
    """(N, >= V) uninitialised, with the padding of logits' rows, so that their 16-byte alignment is
    kept.
    """
    (N, V), stride = logits.shape, logits.stride(0)
    return logits.new_empty((N, stride if V <= stride <= 2 * V else V))


def _backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    n_valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    V = logits.shape[1]
    out = _gradient_buffer(logits)
    gradient_rows(
        dloss,
        logits,
        targets,
        lse,
        out,
        vocab_size=V,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        n_valid=n_valid,
    )
    return out[:, :V]


def _fake_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    n_valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return _gradient_buffer(logits)[:, : logits.shape[1]]


# Opaque operators, so that torch.compile keeps the kernels whole and a CPU can trace and test them.
_lib = torch.library.Library("gpt2_triton", "FRAGMENT")
_lib.define(
    "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, "
    "float z_loss)"
    " -> (Tensor, Tensor)"
)
_lib.define(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, Tensor? n_valid, "
    "int ignore_index,"
    " float label_smoothing, float z_loss) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _lib.impl("cross_entropy_fwd", _forward, _key)
    _lib.impl("cross_entropy_bwd", _backward, _key)
torch.library.register_fake("gpt2_triton::cross_entropy_fwd", _fake_forward, lib=_lib)
torch.library.register_fake("gpt2_triton::cross_entropy_bwd", _fake_backward, lib=_lib)


def reduce_loss(loss: Tensor, n_valid: Tensor | None, reduction: str) -> Tensor:
    """loss (N,) as reduction asks; n_valid () is used by "mean" alone."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / n_valid


class _CrossEntropy(torch.autograd.Function):
    """Leaves logits as they are; the backward may run any number of times."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, label_smoothing, z_loss, reduction):
        ctx.numbers = (ignore_index, label_smoothing, z_loss)
        n_valid = count_valid(targets, ignore_index) if reduction == "mean" else None
        loss, lse = torch.ops.gpt2_triton.cross_entropy_fwd(logits, targets, *ctx.numbers)
        ctx.save_for_backward(logits, targets, lse, n_valid)
        return reduce_loss(loss, n_valid, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dlogits = torch.ops.gpt2_triton.cross_entropy_bwd(
            dloss.contiguous(), *ctx.saved_tensors, *ctx.numbers
        )
        return dlogits, None, None, None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """Overwrites logits with their gradient, in the forward ("mean", "sum") or in the backward
    ("none"). Eager only.

    Each overwriting is told to autograd's version counter, so whoever else saved the logits, and a
    second backward, get torch's error about a modified tensor instead of wrong numbers.
    """

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, label_smoothing, z_loss, reduction):
        ctx.numbers = dict(
            vocab_size=logits.shape[1],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        ctx.written = reduction != "none"
        n_valid = count_valid(targets, ignore_index) if reduction == "mean" else None
        loss, lse = loss_rows(
            logits, targets, **ctx.numbers, write_gradient=ctx.written, n_valid=n_valid
        )
        if ctx.written:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits, targets, lse)
        return reduce_loss(loss, n_valid, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, lse = ctx.saved_tensors
        dlogits = logits.detach()
        if not ctx.written:
            gradient_rows(dloss.contiguous(), dlogits, targets, lse, dlogits, **ctx.numbers)
        elif dlogits.shape[0] > 0:
            block = _tile(dlogits.device)[0]["BLOCK"]
            with device_guard(_scale_kernel, "logits", dlogits):
                _scale_kernel[(dlogits.shape[0],)](
                    dlogits,
                    dloss,
                    dlogits.stride(0),
                    dlogits.shape[1],
                    BLOCK=block,
                    num_warps=SCALE_WARPS,
                )
        torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None, None, None


def check_rows(name: str, rows: Tensor, targets: Tensor, reduction: str) -> None:
    """Raise ValueError unless rows (N, .) and targets (N,) can go into a cross entropy."""
    if rows.dim() != 2 or rows.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}: it must be (N, "
            f"{'V' if name == 'logits' else 'C'})"
        )
    if rows.dtype not in DTYPES:
        raise ValueError(f"{name} is {rows.dtype}: cast it to float32, float16 or bfloat16")
    if targets.shape != rows.shape[:1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, but {name} has {rows.shape[0]} rows: "
            f"flatten both"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype}: class indices must be int64 or int32")
    if targets.device != rows.device:
        raise ValueError(
            f"targets is on {targets.device} and {name} on {rows.device}: move them to one device"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: it must be one of {', '.join(REDUCTIONS)}")


def check_targets(targets: Tensor, vocab_size: int, *, ignore_index: int = -100) -> None:
    """Raise ValueError unless every target is ignore_index or a class from 0 to vocab_size - 1.

    For debugging: it waits for the device, which the operations themselves never do. Without it a
    target out of range reads nothing out of bounds and makes the loss NaN.
    """
    outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if outside.any():  # waits for the device
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets.flatten()[row])}: it must be in 0..{vocab_size - 1} "
            f"or be ignore_index "
            f"{ignore_index}; {int(outside.sum())} of {targets.numel()} targets are out of range"
        )


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

    logits (N, V) fp32 | fp16 | bf16, any row stride; rows that start 16 bytes apart or a multiple
    of it are read widest.
    targets (N,) int64 | int32; ignore_index marks rows that do not count. One out of range makes
    its loss NaN; check_targets finds it.
    label_smoothing 0 to 1; z_loss >= 0: weight of logsumexp(logits)^2, added per counted row.
    inplace_backward: let the gradient take the logits' memory: the caller does not read logits
    after this call, and
        calls backward once. "mean" and "sum" compute it in the forward and read and write the
        logits once in all, if the loss itself is what backward starts from; otherwise the backward
        multiplies it in place. With fp16, "mean" and a loss scaler leave it off: the gradient is
        rounded before the scale arrives. No effect without a gradient to compute, nor under
        torch.compile, where only buffers that an operator allocated may be overwritten safely.
    Returns a scalar fp32, or (N,) for reduction "none". With no row that counts the mean is NaN and
    the gradient 0.

    Raises ValueError where shapes, dtypes, devices or numbers do not fit.
    Source: torch.nn.functional.cross_entropy.
    """
    check_rows("logits", logits, targets, reduction)
    V = logits.shape[1]
    if V > VOCABULARY_LIMIT:
        raise ValueError(f"logits has {V:,} columns: at most {VOCABULARY_LIMIT:,} are supported")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in 0..1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss is {z_loss}: it must be 0 or more")
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    in_place = inplace_backward and has_gradient and not torch.compiler.is_compiling()
    if logits.stride(1) != 1 or (
        in_place and logits.stride(0) < V
    ):  # rows that overlap cannot be written
        logits = logits.contiguous()
    function = _CrossEntropyInPlace if in_place else _CrossEntropy
    return function.apply(
        logits, targets.contiguous(), ignore_index, label_smoothing, z_loss, reduction
    )


def static_configs(arch: str) -> list[StaticConfig]:
    """Every configuration that GPT-2's padded vocabulary uses on arch, bf16."""
    N, V, width = 32768, 50257, 50304
    tile = for_architecture(CROSS_ENTROPY, arch)
    blocks = {"BLOCK": tile.block, "TAIL": tile.tail}
    plain = {"SMOOTHING": 0.0, "Z_LOSS": 0.0}
    numbers = dict.fromkeys(("V", "ignore_index"), "i32")  # never specialised
    fwd = dict(
        logits_ptr="*bf16",
        targets_ptr="*i64",
        loss_ptr="*fp32",
        lse_ptr="*fp32",
        stride_n="i32",
        WIDTH="i32",
    )
    bwd = dict(
        logits_ptr="*bf16",
        targets_ptr="*i64",
        lse_ptr="*fp32",
        dloss_ptr="*fp32",
        dlogits_ptr="*bf16",
        stride_n="i32",
        stride_d="i32",
        stride_dn="i32",
        WIDTH="i32",
    )
    scale = dict(x_ptr="*bf16", scale_ptr="*fp32", stride_n="i32")
    row = N * V * 2  # bytes of one reading or writing of the logits

    def config(op, kernel, arguments, numbers, constants, warps, n_bytes):
        return StaticConfig(
            op=op,
            shape=f"{N} x {V} in rows of {width}",
            kernel=kernel,
            signature=arguments | numbers | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            divisible_by_16=tuple(arguments),
            num_warps=warps,
            num_stages=3,
            bytes=n_bytes,
        )

    configs = []
    for is_mean in (True, False):
        n_valid = {"n_valid_ptr": "*fp32"} if is_mean else {}
        constants = plain | blocks | {"MEAN": is_mean} | ({} if is_mean else {"n_valid_ptr": None})
        suffix = " mean" if is_mean else " sum"
        configs += [
            config(
                "cross_entropy fwd+bwd in place" + suffix,
                _cross_entropy_fwd_kernel,
                fwd | n_valid,
                numbers,
                constants | {"WRITE_GRADIENT": True},
                tile.warps,
                2 * row,
            ),
            config(
                "cross_entropy bwd" + suffix,
                _cross_entropy_bwd_kernel,
                bwd | n_valid,
                numbers,
                constants,
                tile.warps,
                2 * row,
            ),
        ]
    constants = plain | blocks | {"MEAN": False, "n_valid_ptr": None, "WRITE_GRADIENT": False}
    configs.append(
        config(
            "cross_entropy fwd", _cross_entropy_fwd_kernel, fwd, numbers, constants, tile.warps, row
        )
    )
    extras = {"SMOOTHING": 0.1, "Z_LOSS": 1e-4, "WRITE_GRADIENT": True}
    configs.append(
        config(
            "cross_entropy fwd+bwd in place, smoothing, z-loss",
            _cross_entropy_fwd_kernel,
            fwd,
            numbers,
            constants | extras,
            tile.warps,
            2 * row,
        )
    )
    configs.append(
        config(
            "cross_entropy scale",
            _scale_kernel,
            scale,
            {"V": "i32"},
            {"BLOCK": tile.block},
            SCALE_WARPS,
            2 * row,
        )
    )
    return configs
