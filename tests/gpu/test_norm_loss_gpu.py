"""Layer norm, cross entropy and linear + cross entropy on a CUDA GPU: bf16, GPT-2's sizes, compiled
by Inductor.

Run: TRITON_INTERPRET=0 python -m pytest -m gpu tests/gpu
"""

import pytest
import torch
import triton

from tests.kernel_rule import (
    assert_as_exact_as_torch,
    layer_norm_bounds,
    leaf,
    linear_loss_bounds,
    loss_bounds,
)
from triton_kernels import reference
from triton_kernels.cross_entropy import cross_entropy
from triton_kernels.layer_norm import _layer_norm_fwd_kernel, layer_norm
from triton_kernels.linear_cross_entropy import linear_cross_entropy

V, PADDED_V = 50257, 50304
IS_COMPILED = isinstance(_layer_norm_fwd_kernel, triton.JITFunction)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(
        not IS_COMPILED, reason="kernels are interpreted: run with TRITON_INTERPRET=0"
    ),
]
HALVES = [torch.bfloat16, torch.float16, torch.float32]


def run(function, tensors, dtype=None):
    """Outputs of function(*tensors) and the gradients of all tensors, under a fixed upstream."""
    leaves = [leaf(t, dtype) for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = []
    for o in outputs:
        wave = torch.linspace(-1, 1, max(o.numel(), 2), device=o.device)[: o.numel()]
        # representable in any dtype, so that the fp64 oracle gets the same
        upstream.append((2 * wave + 0.5).bfloat16().half().view(o.shape).to(o.dtype))
    kept = [o.detach().clone() for o in outputs]
    return kept + list(torch.autograd.grad(outputs, leaves, upstream))


def check(ours, plain, tensors, bounds):
    found, theirs, exact = (
        run(ours, tensors),
        run(plain, tensors),
        run(plain, tensors, torch.float64),
    )
    for i, (a, b, c) in enumerate(zip(found, theirs, exact, strict=True)):
        assert_as_exact_as_torch(a, b, c.double(), f"result {i}", bounds[i])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600, 100, 4097, 16384])
@pytest.mark.parametrize("M", [1, 1037])
def test_layer_norm(M, C, dtype):
    x, residual = torch.randn(2, M, C, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, C, device="cuda", dtype=dtype)

    def norm(function):
        return lambda x, residual, w, b: function(x, w, b, residual=residual)

    wave = torch.linspace(-1, 1, M * C, device="cuda").view(M, C)
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    bounds = layer_norm_bounds(tensors, [2 * wave + 0.5] * 2)
    names = ("y", "sum", "dx", "dresidual", "dweight", "dbias")
    check(
        norm(layer_norm), norm(reference.layer_norm), list(tensors.values()),
        [bounds[name] for name in names],
    )  # fmt: skip


def test_layer_norm_full_size_is_deterministic():
    tensors = [torch.randn(65536, 768, device="cuda").bfloat16() for _ in range(2)]
    tensors += [torch.randn(768, device="cuda") for _ in range(2)]

    def norm(x, residual, w, b):
        return layer_norm(x, w, b, residual=residual)

    assert all(
        torch.equal(a, b) for a, b in zip(run(norm, tensors), run(norm, tensors), strict=True)
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options", [{}, {"inplace_backward": True}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width, stride", [(V, PADDED_V), (V, V), (1, 1), (100, 128)])
def test_cross_entropy(width, stride, reduction, options, dtype):
    buffer = 3 * torch.randn(61, stride, device="cuda").to(dtype)
    targets = torch.randint(width, (61,), device="cuda")
    targets[5] = -100

    def loss(function):
        return lambda buffer: function(
            (buffer * 1)[:, :width], targets, reduction=reduction, **options
        )

    bound, dlogits = loss_bounds(buffer[:, :width], targets, 2.5, reduction=reduction)
    if options.get("z_loss"):
        bound, dlogits = 2 * bound + 1e-4, 2 * dlogits + 1e-5
    dlogits = torch.nn.functional.pad(dlogits, (0, stride - width))
    check(loss(cross_entropy), loss(reference.cross_entropy), [buffer], [bound, dlogits])


def test_cross_entropy_beyond_int32():
    """65,536 rows of 50,304: the last rows against the same rows alone."""
    logits = torch.randn(65536, PADDED_V, device="cuda", dtype=torch.bfloat16)[:, :V]
    targets = torch.randint(V, (65536,), device="cuda")
    tail = slice(-64, None)
    expected_loss, expected_gradient = run(
        lambda x: cross_entropy(x, targets[tail], reduction="sum"), [logits[tail].clone()]
    )
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss[tail].sum(), expected_loss)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = cross_entropy(logits, targets, reduction="sum", inplace_backward=True)
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.cuda.max_memory_allocated() - before < 2**24  # no second logits buffer
    # run's upstream of a scalar is -1.5
    torch.testing.assert_close(gradient[tail] * -1.5, expected_gradient, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 100])
@pytest.mark.parametrize("rows", [V, PADDED_V])
def test_linear_cross_entropy(rows, chunk_rows, reduction, dtype):
    x = torch.randn(256, 768, device="cuda").to(dtype)
    weight = (0.05 * torch.randn(rows, 768, device="cuda")).to(dtype)
    targets = torch.randint(V, (256,), device="cuda")

    def loss(function, **options):
        return lambda x, w: function(x, w, targets, vocab_size=V, reduction=reduction, **options)

    check(
        loss(linear_cross_entropy, chunk_rows=chunk_rows),
        loss(reference.linear_cross_entropy),
        [x, weight],
        list(
            linear_loss_bounds(
                x, weight, targets, 2.5, vocab_size=V, reduction=reduction
            ).values()
        ),
    )


def test_memory_mode():
    x = torch.randn(32768, 768, device="cuda", dtype=torch.bfloat16)
    weight = 0.05 * torch.randn(PADDED_V, 768, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(V, (32768,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(
        lambda x, w: linear_cross_entropy(x, w, targets, vocab_size=V, chunk_rows=8192), [x, weight]
    )
    assert torch.cuda.max_memory_allocated() - before < 1.5e9


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning"
)  # torch.compile's own
def test_compiled_under_autocast_equals_eager():
    x, residual = torch.randn(2, 4, 256, 768, device="cuda")
    norm, bias = torch.ones(768, device="cuda"), torch.zeros(768, device="cuda")
    head = 0.05 * torch.randn(PADDED_V, 768, device="cuda")
    targets = torch.randint(V, (1024,), device="cuda")

    def model(x, residual, norm, bias, head):
        with torch.autocast("cuda", torch.bfloat16):
            y, summed = layer_norm(torch.nn.functional.gelu(x), norm, bias, residual=residual)
            y, summed = layer_norm(y * 2, norm, bias, residual=summed)
            return (
                linear_cross_entropy(y.view(-1, 768), head, targets, vocab_size=V) + summed.mean()
            )

    tensors = [x, residual, norm, bias, head]
    eager, compiled = run(model, tensors), run(torch.compile(model, fullgraph=True), tensors)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
