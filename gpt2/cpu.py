"""The operations of a model on a CPU: torch's, and those of csrc/ where they are faster.

Attention, GELU, what follows the head's logits, and a token of generation are C++
(csrc/cpu_kernels.h) on float32 and bfloat16, wherever the module is built; torch's operations are
the fallback, and the oracle of the tests. The matrix products of float32 have two homes in torch:
F.linear goes to a BLAS (MKL, which is slow on some processors), while bfloat16 goes to oneDNN,
which has float32 products too. Which is faster depends on processor and shape, so choose() times
both once, before a run's first step. The choice is part of the run: it lies in its checkpoints and
its receipt.

N rows, C channels, V vocabulary; B, T, H, D as in gpt2.model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gpt2.device import NOT_BUILT, check_built
from triton_kernels import reference

LOGITS = 1 << 24  # that many at a time, 64 MB: 333 rows of GPT-2's vocabulary
DECODE_ROWS = 32  # up to so many rows a decode step is C++; see docs/LOG.md
LARGE = 1 << 20  # entries of an embedding from which on its gradient is better sparse
SMALL = 1 << 22  # multiplications; a product of fewer is not timed
TIMED_ROWS, TIMED_SIZE = 1024, 5 << 30  # at most so many rows and multiplications in a timed call
TIMED_S = 0.02  # that long, or three calls
WORTH = 0.85  # of the default's time: what is slower than that is not chosen instead
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

try:
    from gpt2 import _cpu_kernels as kernels

    check_built(kernels)
except ImportError:
    kernels = None


def why_not() -> str:
    """Empty where the C++ operations can run, else the reason why they cannot."""
    return "" if kernels else f"gpt2._cpu_kernels {NOT_BUILT}"


def _call(name: str, dtype: torch.dtype, *arguments) -> None:
    """A function of the module; tensors become addresses, None becomes 0."""
    plain = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(kernels, f"{name}_{DTYPES[dtype]}")(*plain, torch.get_num_threads())


def _takes(*tensors: Tensor) -> bool:
    """Whether the C++ operations take them; a compiler is given torch's."""
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype in DTYPES for t in tensors
    )


# -- between the products --------------------------------------------------------------------------


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _call("gelu", x.dtype, x, y, x.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        _call("gelu_backward", x.dtype, x, dy, dx, x.numel())
        return dx


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape. Source: torch.nn.functional.gelu."""
    return _Gelu.apply(x) if _takes(x) else F.gelu(x, approximate="tanh")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, doc_start):
        B, T, _, H, D = qkv.shape
        out, lse = qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)
        _call("attention", qkv.dtype, qkv, doc_start, out, lse, B, T, H, D)
        ctx.save_for_backward(qkv, doc_start, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, doc_start, out, lse = ctx.saved_tensors
        B, T, _, H, D = qkv.shape
        dqkv, dout = torch.empty_like(qkv), dout.contiguous()
        _call(
            "attention_backward", qkv.dtype, qkv, doc_start, out, dout, lse, dqkv, B, T, H, D
        )  # fmt: skip
        return dqkv, None


def attention(qkv: Tensor, *, doc_start: Tensor | None = None) -> Tensor:
    """reference.attention: qkv (B, T, 3, H, D), doc_start (B, T) int32; returns (B, T, H, D)."""
    B, _, _, H, D = qkv.shape
    if not _takes(qkv) or D % 16 or B * H < torch.get_num_threads() or qkv.numel() == 0:
        return reference.attention(qkv, doc_start=doc_start)
    if doc_start is not None:
        doc_start = doc_start.to(torch.int32).expand(qkv.shape[:2]).contiguous()
    return _Attention.apply(qkv.contiguous(), doc_start)


def embedding(idx: Tensor, weight: Tensor) -> Tensor:
    """F.embedding, whose gradient touches only the rows that idx has.

    The gradient of a tied head is dense and comes first, so autograd adds these rows to it.
    """
    sparse = weight.numel() >= LARGE and not torch.compiler.is_compiling()
    return F.embedding(idx, weight, sparse=sparse)


# -- the products ----------------------------------------------------------------------------------


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The three products of a linear layer with weight (n_out, n_in): y, dx and dweight.
PRODUCTS = {
    "forward": {"torch": F.linear, "onednn": _onednn},
    "dx": {"torch": torch.mm, "onednn": lambda dy, weight: _onednn(dy, weight.t())},
    "dweight": {
        "torch": lambda dy, x: torch.mm(dy.t(), x),
        "onednn": lambda dy, x: _onednn(dy.t(), x.t()),
    },
}


@dataclass
class Choice:
    """What a run computes with.

    cpp: the kernels of csrc/.  products: which of PRODUCTS a weight's shape takes, as choose()
    found: {"768x2304 dx": "onednn", ...}, n_out x n_in; what is not there is torch's.
    """

    cpp: bool
    products: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        homes = list(self.products.values())
        return f"of {len(homes)} kinds of matrix products {homes.count('onednn')} by oneDNN"

    def of(self, kind: str, weight: Tensor) -> Callable:
        n_out, n_in = weight.shape
        name = "torch"
        if weight.dtype == torch.float32:
            name = self.products.get(f"{n_out}x{n_in} {kind}", name)
        return PRODUCTS[kind][name if has_onednn() else "torch"]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear."""
        if not self.products or not self._applies(x, weight, bias):
            return F.linear(x, weight, bias)
        if not torch.is_grad_enabled():
            return self.of("forward", weight)(x, weight, bias)
        return _Linear.apply(x, weight, bias, self)

    def _applies(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether this is a plain product of float32; of anything else F.linear says what comes
        out, or what is wrong."""
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return (
            not torch.is_autocast_enabled("cpu")
            and all(t.dtype == torch.float32 for t in tensors)
            and _takes(*tensors)
            and all(t.layout == torch.strided for t in tensors)
            and weight.dim() == 2
            and weight.numel() > 0
            and x.numel() > 0
            and x.shape[-1:] == weight.shape[1:]
            and (bias is None or bias.shape == weight.shape[:1])
            and all(t.is_contiguous() for t in tensors[1:])
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, choice):
        ctx.save_for_backward(x, weight)
        ctx.choice = choice
        return choice.of("forward", weight)(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        rows = dy.reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[0]:
            dx = ctx.choice.of("dx", weight)(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = ctx.choice.of("dweight", weight)(rows, x.reshape(-1, weight.shape[1]))
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias, None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's linear layer and it is switched on."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def choose(model: torch.nn.Module, rows: int) -> dict[str, str]:
    """Times the products of a model's linear layers in float32, with as many rows as a run has.

    Returns what is to be taken for each; "torch" unless the other one is right and clearly faster.
    Takes about as long as a step with TIMED_ROWS rows.
    """
    found = {}
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    for n_out, n_in in sorted(shapes) if has_onednn() else ():
        n = min(rows, TIMED_ROWS, max(TIMED_SIZE // (n_out * n_in), 1))
        if n * n_out * n_in < SMALL:
            continue
        generator = torch.Generator().manual_seed(0)
        x, dy, weight = (
            torch.randn(shape, generator=generator)  # a layer's own weight may be shared out
            for shape in ((n, n_in), (n, n_out), (n_out, n_in))
        )
        for kind, pair in (("forward", (x, weight)), ("dx", (dy, weight)), ("dweight", (dy, x))):
            found[f"{n_out}x{n_in} {kind}"] = fastest(PRODUCTS[kind], pair)
    return found


def fastest(candidates: dict[str, Callable], arguments: tuple) -> str:
    """The name of the fastest candidate, by calls of each in turns; the first is the default.

    Another one has to give the default's result to float32's rounding, and to be faster in the
    median and at its best, so that other work on the machine decides nothing absurd.
    """
    best = default = next(iter(candidates))
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        right = candidates[default](*arguments)
        for name, candidate in candidates.items():
            if (candidate(*arguments) - right).abs().max() <= 1e-5 * right.abs().max():
                times[name] = []
        usual = times[default]
        while len(times) > 1 and (len(usual) < 3 or sum(usual) < TIMED_S and len(usual) < 50):
            for name in times:
                started = time.perf_counter()
                candidates[name](*arguments)
                times[name].append(time.perf_counter() - started)
    for name, taken in times.items():
        usual = times[best]
        if name != default and median(taken) < WORTH * median(usual):
            best = name if min(taken) < WORTH * min(usual) else best
    return best


def keep_memory() -> None:
    """For a process that trains: freed memory is used again, and not given back to the system."""
    if kernels:
        kernels.keep_memory()


# -- the head and the loss -------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    choice: Choice,
    chunk_rows: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """reference.linear_cross_entropy, holding the logits of chunk_rows rows at a time, and with the
    gradients computed while they are at hand: the logits of all rows would be gigabytes.

    Rows that do not count are left out. torch.compile gets the reference itself.
    """
    options = dict(ignore_index=ignore_index, vocab_size=vocab_size)
    chunk_rows = chunk_rows or max(LOGITS // weight.shape[0], 1)
    in_one_piece = chunk_rows >= x.shape[0] and not (choice.cpp and reduction != "none")
    if in_one_piece or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return reference.linear_cross_entropy(x, weight, targets, reduction=reduction, **options)
    counted = targets != ignore_index
    if 0 < int(counted.sum()) < len(x):  # in SFT most of the work would be for nothing
        kept = counted.nonzero()[:, 0]
        losses = linear_cross_entropy(
            x.index_select(0, kept), weight, targets[kept], choice=choice,
            chunk_rows=chunk_rows, reduction=reduction, **options,
        )  # fmt: skip
        if reduction != "none":
            return losses
        return losses.new_zeros(len(x)).index_copy(0, kept, losses)
    if reduction == "none" and torch.is_grad_enabled():
        # Each row has its own incoming gradient: the gradients are computed in backward.
        def rows(x: Tensor, targets: Tensor) -> Tensor:
            return reference.linear_cross_entropy(x, weight, targets, reduction="none", **options)

        pairs = zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat([checkpoint(rows, *pair, use_reentrant=False) for pair in pairs])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    targets = targets.where(counted, -1)
    if bool((targets >= vocab_size).any()):
        raise IndexError(f"target {int(targets.max())} is out of bounds for {vocab_size} classes")
    if reduction == "none":
        return _losses(x, weight, targets, vocab_size, chunk_rows, choice)
    total = _LossSum.apply(
        x, weight, targets, vocab_size, chunk_rows, choice, torch.is_grad_enabled()
    )
    return total if reduction == "sum" else total / counted.sum()


def _row_losses(
    logits: Tensor, targets: Tensor, vocab_size: int, choice: Choice, gradient: bool
) -> Tensor:
    """The losses (rows,) of logits (rows, V), contiguous, which become their gradient if asked for.

    For a row with logits z and target t: loss = lse(z) - z_t, dz = softmax(z) - [j = t]. A target
    of -1 does not count.
    """
    losses = torch.empty(len(logits))
    if choice.cpp and logits.dtype in DTYPES:
        _call(
            "cross_entropy", logits.dtype, logits, targets, losses, len(logits), vocab_size,
            logits.shape[1], gradient,
        )  # fmt: skip
        return losses
    counted = (targets >= 0)[:, None]
    index = targets[:, None].clamp(min=0)
    z = logits[:, :vocab_size].float()  # a view where logits are float32
    z_target, top = z.gather(1, index), z.amax(1, keepdim=True)
    norm = z.sub_(top).exp_().sum(1, keepdim=True)
    losses = (norm.log() + top - z_target).where(counted, 0.0)[:, 0]
    if gradient:
        z.div_(norm).scatter_add_(1, index, torch.full_like(norm, -1.0))
        z.masked_fill_(~counted, 0.0)
        if z.dtype != logits.dtype:
            logits[:, :vocab_size] = z
        logits[:, vocab_size:] = 0.0
    return losses


def _losses(x, weight, targets, vocab_size, chunk_rows, choice) -> Tensor:
    """Each row's loss, (N,) float32, without gradients."""
    losses = []
    with torch.autocast(x.device.type, enabled=False):
        for x_c, targets_c in zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True):
            logits = choice.of("forward", weight)(x_c, weight)
            losses.append(_row_losses(logits, targets_c, vocab_size, choice, gradient=False))
    return torch.cat(losses)


def _add_product(total: Tensor | None, product: Callable, dy: Tensor, x: Tensor) -> Tensor:
    """total + product(dy, x) in float32; in place, and where torch can, without a second buffer."""
    if total is None:
        return product(dy, x).float()
    if product is PRODUCTS["dweight"]["torch"] and x.dtype == total.dtype:
        return total.addmm_(dy.t(), x)
    return total.add_(product(dy, x))


class _LossSum(torch.autograd.Function):
    """Sum of the losses, with dx and dweight computed while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk_rows, choice, has_gradient):
        dx = torch.empty_like(x) if has_gradient and ctx.needs_input_grad[0] else None
        needs_dw = has_gradient and ctx.needs_input_grad[1]
        dw = None
        total = x.new_zeros((), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                x_c, targets_c = x[start : start + chunk_rows], targets[start : start + chunk_rows]
                logits = choice.of("forward", weight)(x_c, weight)
                losses = _row_losses(
                    logits, targets_c, vocab_size, choice, dx is not None or needs_dw
                )
                total += losses.sum()
                if dx is not None:
                    dx[start : start + chunk_rows] = choice.of("dx", weight)(logits, weight)
                if needs_dw:
                    dw = _add_product(dw, choice.of("dweight", weight), logits, x_c)
        ctx.gradients, ctx.weight_dtype = (dx, dw), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before: its gradients are used up")
        (dx, dw), ctx.gradients = ctx.gradients, None
        dx = None if dx is None else dx.mul_(dloss.to(dx.dtype))
        dw = None if dw is None else dw.mul_(dloss).to(ctx.weight_dtype)
        return (dx, dw, *[None] * 5)


# -- generation ------------------------------------------------------------------------------------


def decoder(model: nn.Module) -> Callable | None:
    """For a GPT, a function that appends a token to at most DECODE_ROWS rows, in one call of C++.

    (cache, token (B,), doc_start (B, 1) or None) -> logits (B, V) float32, as the model's forward,
    with all activations in float32. It holds as long as the weights stay where they are. None for
    what csrc/decode.cpp does not know: adapters, the exact GELU, or weights of other kinds.
    """
    c, dtype = model.config, model.lm_head.weight.dtype
    wte, wpe, *layers = (m for m in model.modules() if m._parameters)  # in the order of csrc

    def is_known(module: nn.Module) -> bool:
        expected = dtype if isinstance(module, nn.Linear) else torch.float32
        parameters = list(module.parameters(recurse=False))
        return _takes(*parameters) and all(
            p.dtype == expected and p.is_contiguous() for p in parameters
        )

    is_plain = len(layers) == 6 * c.n_layer + 2 and not c.exact_gelu
    if model.ops.name != "cpp" or not is_plain or not all(map(is_known, [wte, wpe, *layers])):
        return None
    pairs = [(layer.weight, layer.bias) for layer in layers]
    weights = torch.tensor([0 if p is None else p.data_ptr() for pair in pairs for p in pair])

    def decode(cache, token: Tensor, doc_start: Tensor | None) -> Tensor:
        position = cache.length if doc_start is None else cache.length - doc_start[:, 0]
        x = wte.weight[token] + wpe.weight[position]  # (B, C)
        logits = x.new_empty(len(x), c.vocab_size)
        _call(
            "decode", dtype, weights, x, cache.keys_values, doc_start, logits, c.n_layer, len(x),
            c.n_head, c.n_embd, cache.capacity, cache.length, c.vocab_size,
        )  # fmt: skip
        cache.advance(1)
        return logits

    return decode
