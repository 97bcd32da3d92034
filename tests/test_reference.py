"""reference.linear_cross_entropy in chunks, a CPU's way to train, against itself in one piece."""

import pytest
import torch
from torch.testing import assert_close

from gpt2.ops import CPU_LOGITS, select_ops
from triton_kernels import reference


def run(x, weight, targets, dloss=0.7, **options):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = reference.linear_cross_entropy(x, weight, targets, vocab_size=65, **options)
    loss.backward(torch.full_like(loss, dloss))
    return loss.detach(), x.grad, weight.grad


@pytest.fixture
def problem():
    x, weight = torch.randn(50, 16), torch.randn(72, 16)
    targets = torch.randint(0, 65, (50,))
    targets[::7] = -100
    return x, weight, targets


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 8, 49, 50])
def test_same_loss_and_gradients(problem, reduction, chunk_rows):
    whole = run(*problem, reduction=reduction)
    chunked = run(*problem, reduction=reduction, chunk_rows=chunk_rows)
    assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    assert not chunked[2][65:].any()  # the vocabulary's padding


def test_bf16_autocast(problem):
    with torch.autocast("cpu", torch.bfloat16):
        whole, chunked = (run(*problem, reduction="sum", chunk_rows=n) for n in (None, 8))
    for a, b in zip(chunked, whole, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.01 * b.norm()


def test_only_what_needs_a_gradient(problem):
    x, weight, targets = problem
    expected = run(x, weight, targets, 1.0, reduction="sum")
    options = dict(vocab_size=65, reduction="sum", chunk_rows=8)
    weight.requires_grad_()
    reference.linear_cross_entropy(x, weight, targets, **options).backward()
    assert_close(weight.grad, expected[2])
    with torch.no_grad():
        loss = reference.linear_cross_entropy(x, weight, targets, **options)
    assert_close(loss, expected[0])
    assert loss.grad_fn is None


def test_a_large_vocabulary_is_chunked_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        reference, "linear_cross_entropy", lambda *_, chunk_rows, **__: asked.append(chunk_rows)
    )
    select_ops("torch", "cpu").linear_cross_entropy(None, torch.empty(50304, 1), None)
    assert asked == [CPU_LOGITS // 50304]
