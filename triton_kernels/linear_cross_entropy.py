"""The head and the loss of a language model as one: cross entropy of x @ weight.T.

N rows, C channels, V classes, W rows of the weight (V and padding), S = W rounded up to 64, which
is the logits' row stride.

    logits = x weight^T                   (N, W), matmul
    loss, g = cross_entropy(logits)       g = d sum(loss) / d logits takes the place of logits
    dx = g weight, dw = g^T x             matmuls; dw is accumulated in fp32, over chunks too

For "mean" and "sum" the forward computes dx and dw as well, while the logits are at hand, so that
nothing of size (N, V) outlives it; the backward multiplies both by dloss, and by 1 / n_valid for
"mean", out of place and on the device. g itself is never scaled: its entries are within [-1, 1]
and lose nothing in fp16 to a division by N. With "none" every row has its own dloss, which dw
needs before its sum: there the forward keeps only lse, and the backward computes the logits
again, one more matmul.

The matmuls are cuBLAS's. They run on whole rows of the padded buffer where the weight is padded
too, since the gradient's padding is exactly 0. chunk_rows bounds the logits buffer to
(chunk_rows, S); few large chunks, as each one reads the weight and reads and writes dw once more.
Left out: recomputing tiles of logits inside the loss kernel (cut cross-entropy), which costs a
fourth GEMM to save memory that GPT-2's head does not need.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.cross_entropy import (
    check_rows,
    count_valid,
    gradient_rows,
    loss_rows,
    reduce_loss,
)
from triton_kernels.launch import StaticConfig, device_guard

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


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale () in dtype; torch's own product would round scale to x's dtype first, or make an
    fp32 copy of x.
    """
    out = _fake_scaled(x, scale, dtype)
    if x.numel() > 0:
        with device_guard(_scaled_kernel, "x", x):
            _scaled_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
                x, scale, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
            )
    return out


def _fake_scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _chunks(
    x: Tensor,  # (N, C)
    weight: Tensor,  # (W, C), of x's dtype
    chunk_rows: int,
    overwrite: Callable[[slice, Tensor], None],
    dx: Tensor | None,  # (N, C)
    dw: Tensor | None,  # (W, C) fp32
) -> None:
    """For each chunk of rows: its logits (rows, S), overwrite(rows, logits) by their gradient, and
    from that dx and dw.
    """
    N, W = x.shape[0], weight.shape[0]
    buffer = x.new_empty((min(chunk_rows, N), triton.cdiv(W, ALIGN) * ALIGN))
    for start in range(0, N, chunk_rows):
        rows = slice(start, min(start + chunk_rows, N))
        chunk = buffer[: rows.stop - start]
        torch.mm(x[rows], weight.t(), out=chunk[:, :W])
        overwrite(rows, chunk)
        g = chunk[:, :W]
        if dx is not None:
            torch.mm(g, weight, out=dx[rows])
        if dw is not None:
            _accumulate(dw, g, x[rows], first=start == 0)


def _accumulate(dw: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    """dw (W, C) fp32 = g^T x for the first chunk, += for the others."""
    if g.dtype == torch.float32 or g.device.type == "cpu" or torch.version.hip:
        torch.addmm(dw, g.t().float(), x.float(), beta=0 if first else 1, out=dw)
    elif first:
        torch.ops.aten.mm.dtype_out(
            g.t(), x, torch.float32, out=dw
        )  # half precision in, fp32 to the last store
    else:
        torch.ops.aten.addmm.dtype_out(dw, g.t(), x, torch.float32, out=dw)


def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss and lse (N,), and of the sum of loss dx (N, C) in dtype and dw (W, C) in fp32, empty
    unless needed.
    """
    loss, lse, dx, dw = outputs = _fake_forward(
        x, weight, targets, ignore_index, vocab_size, chunk_rows, dtype, need_dx, need_dw
    )

    def overwrite(rows: slice, logits: Tensor) -> None:
        loss[rows], lse[rows] = loss_rows(
            logits,
            targets[rows],
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            write_gradient=need_dx or need_dw,
        )

    if x.shape[0] == 0:
        dw.zero_()
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        _chunks(
            x.to(dtype),
            weight.to(dtype),
            chunk_rows,
            overwrite,
            dx if need_dx else None,
            dw if need_dw else None,
        )
    return outputs


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse = (x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(2))
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=dtype)
    dw = weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    return loss, lse, dx, dw


def _backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx (N, C) in dtype and dw (W, C) in fp32 of the sum of dloss (N,) loss, from logits that are
    computed again.
    """
    dx, dw = outputs = _fake_backward(
        dloss,
        x,
        weight,
        targets,
        lse,
        ignore_index,
        vocab_size,
        chunk_rows,
        dtype,
        need_dx,
        need_dw,
    )

    def overwrite(rows: slice, logits: Tensor) -> None:
        gradient_rows(
            dloss[rows],
            logits,
            targets[rows],
            lse[rows],
            logits,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
        )

    if x.shape[0] == 0:
        dw.zero_()
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        _chunks(
            x.to(dtype),
            weight.to(dtype),
            chunk_rows,
            overwrite,
            dx if need_dx else None,
            dw if need_dw else None,
        )
    return outputs


def _fake_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,), dtype=dtype)
    return dx, weight.new_empty(weight.shape if need_dw else (0,), dtype=torch.float32)


# Opaque operators, so that torch.compile keeps the kernels whole and a CPU can trace and test them.
_lib = torch.library.Library("gpt2_triton", "FRAGMENT")
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor targets{lse}, int ignore_index, SymInt vocab_size, SymInt "
    "chunk_rows,"
    " ScalarType dtype, bool need_dx, bool need_dw"
)
_lib.define(
    f"linear_cross_entropy_fwd({_ARGUMENTS.format(lse='')}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_ARGUMENTS.format(lse=', Tensor lse')}) -> (Tensor, "
    f"Tensor)"
)
_lib.define("scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor")
for _key in ("CPU", "CUDA"):
    _lib.impl("linear_cross_entropy_fwd", _forward, _key)
    _lib.impl("linear_cross_entropy_bwd", _backward, _key)
    _lib.impl("scaled", _scaled, _key)
torch.library.register_fake("gpt2_triton::linear_cross_entropy_fwd", _fake_forward, lib=_lib)
torch.library.register_fake("gpt2_triton::linear_cross_entropy_bwd", _fake_backward, lib=_lib)
torch.library.register_fake("gpt2_triton::scaled", _fake_scaled, lib=_lib)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients in the forward: "mean" and "sum"."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_valid, has_gradient, *numbers):
        needs = (has_gradient and needed for needed in ctx.needs_input_grad[:2])
        loss, _, dx, dw = torch.ops.gpt2_triton.linear_cross_entropy_fwd(
            x, weight, targets, *numbers, *needs
        )
        ctx.save_for_backward(dx, dw, n_valid)
        ctx.dtypes, ctx.n_numbers = (x.dtype, weight.dtype), len(numbers)
        return reduce_loss(loss, n_valid, "sum" if n_valid is None else "mean")

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw, n_valid = ctx.saved_tensors
        # Where no row counts the gradient is 0, and 0 / 0 would make it NaN.
        scale = dloss if n_valid is None else dloss / n_valid.clamp(min=1.0)
        # Out of place: the saved gradients must be whole for another backward.
        dx, dw = (
            torch.ops.gpt2_triton.scaled(d, scale, dtype) if needed else None
            for d, dtype, needed in zip((dx, dw), ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        )
        return (dx, dw, None, None, None) + (None,) * ctx.n_numbers


class _LinearCrossEntropyRows(torch.autograd.Function):
    """Gradients in the backward, from logits computed again: "none"."""

    @staticmethod
    def forward(ctx, x, weight, targets, *numbers):
        loss, lse, _, _ = torch.ops.gpt2_triton.linear_cross_entropy_fwd(
            x, weight, targets, *numbers, False, False
        )
        ctx.save_for_backward(x, weight, targets, lse)
        ctx.numbers = numbers
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, _, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        dx, dw = torch.ops.gpt2_triton.linear_cross_entropy_bwd(
            dloss.contiguous(), *ctx.saved_tensors, *ctx.numbers, *needs
        )
        dx, dw = dx.to(x.dtype) if needs[0] else None, dw.to(weight.dtype) if needs[1] else None
        return (dx, dw, None) + (None,) * len(ctx.numbers)


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
    """Cross entropy of x @ weight.T against class indices: the head and the loss of a language
    model as one.

    x (N, C) and weight (V, C) fp32 | fp16 | bf16, of one dtype unless autocast is on, which casts
    both to its own.
    targets (N,) int64 | int32; ignore_index marks rows that do not count. One out of range makes
    its loss NaN;
        triton_kernels.cross_entropy.check_targets finds it.
    vocab_size: classes beyond it are padding of the weight and take no part; their rows of dw are
    0. Default V.
    chunk_rows: hold this many rows of logits at a time; a few thousand save memory and cost little.
    Default all.
    Returns a scalar fp32, or (N,) for reduction "none". Gradients have the dtype of their tensor,
    and dw is fp32 until it is stored, so an fp32 weight under autocast gets an fp32 gradient.
    Backward may run any number of times.

    Raises ValueError where shapes, dtypes, devices or numbers do not fit.
    Source: torch.nn.functional.cross_entropy(x @ weight.T, targets).
    """
    check_rows("x", x, targets, reduction)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    chunk_rows = max(x.shape[0], 1) if chunk_rows is None else chunk_rows
    dtype = _check(x, weight, vocab_size, chunk_rows)
    targets = targets.contiguous()
    numbers = (ignore_index, vocab_size, chunk_rows, dtype)
    if reduction == "none":
        return _LinearCrossEntropyRows.apply(x, weight, targets, *numbers)
    n_valid = count_valid(targets, ignore_index) if reduction == "mean" else None
    return _LinearCrossEntropy.apply(x, weight, targets, n_valid, torch.is_grad_enabled(), *numbers)


def _check(x: Tensor, weight: Tensor, vocab_size: int, chunk_rows: int) -> torch.dtype:
    """Raise ValueError unless the arguments fit; returns the dtype of the matmuls."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but x is {x.shape[1]} wide: it must be (V, "
            f"{x.shape[1]})"
        )
    if weight.device != x.device:
        raise ValueError(
            f"weight is on {weight.device} and x on {x.device}: move them to one device"
        )
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size is {vocab_size}: it must be in 1..{weight.shape[0]}, the rows of weight"
        )
    if chunk_rows < 1:
        raise ValueError(
            f"chunk_rows is {chunk_rows}: it must be 1 or more, or None for all rows at once"
        )
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {weight.dtype} and x {x.dtype}: cast one, or call under torch.autocast"
        )
    return x.dtype


def static_configs(arch: str) -> list[StaticConfig]:
    """The scaling of dx and dw in the backward; the same everywhere. The matmuls are torch's."""
    del arch
    configs = []
    for name, rows, given, made, n_bytes in (
        ("dx", 32768, "bf16", "bf16", 4),
        ("dw", 50304, "fp32", "fp32", 8),
        ("dw", 50304, "fp32", "bf16", 6),
    ):
        arguments = dict(x_ptr=f"*{given}", scale_ptr="*fp32", out_ptr=f"*{made}", n="i32")
        configs.append(
            StaticConfig(
                op=f"linear_cross_entropy scale {name}",
                shape=f"{rows} x 768, {given} to {made}",
                kernel=_scaled_kernel,
                signature=arguments | {"BLOCK": "constexpr"},
                constexprs={"BLOCK": SCALE_BLOCK},
                divisible_by_16=tuple(arguments),
                num_warps=SCALE_WARPS,
                num_stages=3,
                bytes=rows * 768 * n_bytes,
            )
        )
    return configs
