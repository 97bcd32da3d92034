"""Layer norm, cross entropy and linear + cross entropy on a GPU: bf16, GPT-2's sizes, compiled by
Inductor.
"""

import pytest
import torch

from tests.kernel_rule import (
    SAME_BITS,
    check_cross_entropy,
    check_layer_norm,
    check_linear_cross_entropy,
    results,
)
from triton_kernels import launch
from triton_kernels.attention import attention
from triton_kernels.cross_entropy import cross_entropy
from triton_kernels.layer_norm import layer_norm
from triton_kernels.linear_cross_entropy import linear_cross_entropy

V, PADDED_V = 50257, 50304
DTYPES = pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@DTYPES
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600, 100, 4097, 16384])
@pytest.mark.parametrize("M", [1, 1037])
def test_layer_norm(M, C, dtype):
    x, residual = torch.randn(2, M, C, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, C, device="cuda", dtype=dtype)
    check_layer_norm(x, weight, bias, residual)


def test_layer_norm_full_size_is_deterministic():
    tensors = [torch.randn(65536, 768, device="cuda").bfloat16() for _ in range(2)]
    tensors += [torch.randn(768, device="cuda") for _ in range(2)]

    def norm(x, residual, w, b):
        return layer_norm(x, w, b, residual=residual)

    again = results(norm, tensors, [0.5, 2.0])
    torch.testing.assert_close(results(norm, tensors, [0.5, 2.0]), again, **SAME_BITS)


@DTYPES
@REDUCTION
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("width, stride", [(V, PADDED_V), (V, V), (1, 1), (100, 128)])
def test_cross_entropy(width, stride, in_place, reduction, dtype):
    buffer = 3 * torch.randn(61, stride, device="cuda").to(dtype)
    targets = torch.randint(width, (61,), device="cuda")
    targets[5] = -100
    options = dict(reduction=reduction, inplace_backward=in_place)
    check_cross_entropy(buffer, targets, width, 0.75, **options)


def test_cross_entropy_beyond_int32():
    """65,536 rows of 50,304: the last rows against the same rows alone."""
    logits = torch.randn(65536, PADDED_V, device="cuda", dtype=torch.bfloat16)[:, :V]
    targets = torch.randint(V, (65536,), device="cuda")
    tail = slice(-64, None)
    loss, expected = results(
        lambda x: cross_entropy(x, targets[tail], reduction="sum"), [logits[tail].clone()], [1.0]
    )
    logits.requires_grad_()
    ours = cross_entropy(logits, targets, reduction="none", inplace_backward=True)
    torch.testing.assert_close(ours[tail].sum(), loss)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    assert torch.cuda.max_memory_allocated() - before < 2**24  # no second logits buffer
    torch.testing.assert_close(gradient[tail], expected, rtol=0, atol=0)


@DTYPES
@REDUCTION
@pytest.mark.parametrize("rows", [V, PADDED_V])
def test_linear_cross_entropy(rows, reduction, dtype):
    x = torch.randn(256, 768, device="cuda").to(dtype)
    weight = (0.05 * torch.randn(rows, 768, device="cuda")).to(dtype)
    targets = torch.randint(V, (256,), device="cuda")
    check_linear_cross_entropy(x, weight, targets, 0.75, vocab_size=V, reduction=reduction)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning"
)  # torch.compile's own
def test_compiled_under_autocast_equals_eager():
    x, residual = torch.randn(2, 4, 256, 768, device="cuda")
    norm, bias = torch.ones(768, device="cuda"), torch.zeros(768, device="cuda")
    head = 0.05 * torch.randn(PADDED_V, 768, device="cuda")
    c_attn = 0.05 * torch.randn(3 * 768, 768, device="cuda")
    targets = torch.randint(V, (1024,), device="cuda")

    def model(x, residual, norm, bias, c_attn, head):
        with torch.autocast("cuda", torch.bfloat16):
            y, summed = layer_norm(torch.nn.functional.gelu(x), norm, bias, residual=residual)
            qkv = torch.nn.functional.linear(y, c_attn).view(4, 256, 3, 12, 64)
            y, summed = layer_norm(attention(qkv).flatten(2), norm, bias, residual=summed)
            loss = linear_cross_entropy(y.view(-1, 768), head, targets, vocab_size=V)
            return loss + summed.mean()

    tensors = [x, residual, norm, bias, c_attn, head]
    eager = results(model, tensors, [1.0])
    compiled = results(torch.compile(model, fullgraph=True), tensors, [1.0])
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
