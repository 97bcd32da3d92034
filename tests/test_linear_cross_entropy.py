"""Linear + cross entropy: its kernels through the interpreter and torch's matmuls, against the fp64
oracle.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_rule import check_linear_cross_entropy, results
from triton_kernels import launch
from triton_kernels.linear_cross_entropy import linear_cross_entropy

REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def make(N, C, V, dtype=torch.float32, *, W=None, seed=0):
    """x (N, C), weight (W, C) and targets (N,) of V classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g).to(dtype)
    weight = (torch.randn(W or V, C, generator=g) / C**0.5 * 2).to(dtype)
    return x, weight, torch.randint(V, (N,), generator=g)


@REDUCTION
@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("W", [1000, 1010])
def test_matches_reference(W, reduction, dtype):
    x, weight, targets = make(11, 48, 1000, dtype, W=W)
    targets[[2, 7]] = -100
    dloss = torch.linspace(-1, 2, 11) if reduction == "none" else 0.7
    check_linear_cross_entropy(x, weight, targets, dloss, vocab_size=1000, reduction=reduction)


@pytest.mark.parametrize("W, vocab_size", [(50304, 50257), (50257, None)])
def test_gpt2_vocabulary(W, vocab_size):
    x, weight, targets = make(5, 32, 50257, W=W)
    targets[0] = 50256
    check_linear_cross_entropy(x, weight, targets, vocab_size=vocab_size)


@settings(max_examples=12)
@given(
    N=st.integers(1, 9), C=st.integers(1, 40), V=st.integers(2, 700), padding=st.integers(0, 70),
    reduction=st.sampled_from(["mean", "sum", "none"]), ignore_index=st.sampled_from([-100, 0]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(N, C, V, padding, reduction, ignore_index, seed):
    x, weight, targets = make(N, C, V, W=V + padding, seed=seed)
    targets[0] = 1  # one that counts
    options = dict(vocab_size=V, reduction=reduction, ignore_index=ignore_index)
    check_linear_cross_entropy(x, weight, targets, 0.25, **options)


@REDUCTION
def test_autocast(reduction):
    """bf16 matmuls, an fp32 loss, and gradients of the dtype of what they belong to."""
    x, weight, targets = make(7, 64, 200)
    with torch.autocast("cpu", torch.bfloat16):
        check_linear_cross_entropy(x, weight, targets, reduction=reduction)
        loss = linear_cross_entropy(x, weight.requires_grad_(), targets, reduction=reduction)
    loss.sum().backward()
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())  # its sums were not rounded


@REDUCTION
def test_all_targets_ignored(reduction):
    x, weight, targets = make(4, 16, 50)
    targets[:] = -100
    loss, dx, dweight = results(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction), [x, weight], [1.0]
    )
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert not dx.any() and not dweight.any()


def test_mean_in_fp16_survives_a_loss_scaler():
    """p / N underflows in fp16 before the scale arrives, unless the division waits for it."""
    N, V, scale = 128, 8, 65536.0
    x, weight = torch.ones(N, 1, dtype=torch.float16), torch.zeros(V, 1, dtype=torch.float16)
    # p of the other classes is exp(-12.5) = 3.7e-6; over 128 half of fp16's smallest number
    weight[0] = 12.5
    targets = torch.zeros(N, dtype=torch.int64)
    _, _, dweight = results(
        lambda x, weight: linear_cross_entropy(x, weight, targets), [x, weight], [scale]
    )
    p = torch.softmax(weight[:, 0].double(), 0)[1:, None]
    torch.testing.assert_close(dweight[1:].double(), p * scale, rtol=2e-2, atol=0)
