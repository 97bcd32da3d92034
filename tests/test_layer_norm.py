"""Layer norm kernels through the interpreter, against the fp64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_rule import check_layer_norm
from triton_kernels import launch, reference
from triton_kernels.layer_norm import layer_norm


def make(shape, dtype=torch.float32, *, residual=False, bias=True, seed=0, stream=None):
    """x, weight, bias and residual with entries of different scale and a mean away from 0.

    stream: the dtype of weight, bias and residual, where it is another than x's.
    """
    g, (*_, C), stream = torch.Generator().manual_seed(seed), shape, stream or dtype
    x = (torch.randn(shape, generator=g) * 2 + 0.5).to(dtype)
    weight = (1 + 0.3 * torch.randn(C, generator=g)).to(stream)
    b = (0.2 * torch.randn(C, generator=g)).to(stream) if bias else None
    r = (torch.randn(shape, generator=g) - 1).to(stream) if residual else None
    return x, weight, b, r


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 768), (37, 768), (2, 5, 100), (3, 1600), (13, 1023), (50, 64), (9, 1), (2, 2049)],
    ids=str,
)
def test_matches_reference(shape, residual, dtype):
    check_layer_norm(*make(shape, dtype, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_branch_on_fp32_stream(dtype):
    tensors = make((7, 80), dtype, residual=True, stream=torch.float32)
    check_layer_norm(*tensors)
    y, summed = layer_norm(*tensors[:3], residual=tensors[3])
    assert y.dtype == summed.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, summed = layer_norm(*tensors[:3], residual=tensors[3])
    assert (y.dtype, summed.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(summed, tensors[0] + tensors[3])


def test_far_mean_keeps_its_digits():
    x, *rest = make((6, 256))
    check_layer_norm(x + 1000.0, *rest)


def test_constant_rows_and_large_eps():
    x = torch.full((3, 48), 2.0)
    y = layer_norm(x, torch.ones(48), torch.full((48,), 0.5))
    assert torch.equal(y, torch.full_like(x, 0.5))
    x = torch.randn(3, 48)
    expected = reference.layer_norm(x, torch.ones(48), eps=0.1)
    torch.testing.assert_close(layer_norm(x, torch.ones(48), eps=0.1), expected, rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40), C=st.integers(1, 300), dtype=st.sampled_from(launch.DTYPES[:2]),
    residual=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(rows, C, dtype, residual, bias, seed):
    check_layer_norm(*make((rows, C), dtype, residual=residual, bias=bias, seed=seed), seed=seed)


def test_only_the_sum_is_used():
    x, weight, bias, residual = make((5, 40), residual=True)
    x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    layer_norm(x, weight, bias, residual=residual)[1].square().sum().backward()
    assert torch.equal(x.grad, 2 * (x + residual)) and torch.equal(residual.grad, x.grad)
    assert weight.grad is None
