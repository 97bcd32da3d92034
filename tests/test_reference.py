"""triton_kernels.cpu: the head and the loss in chunks, as a CPU trains, against the reference."""

import pytest
import torch
from torch.testing import assert_close

from gpt2.ops import CPU_LOGITS, select_ops
from tests.kernel_rule import results
from triton_kernels import cpu, reference

CHUNK_ROWS = pytest.mark.parametrize("chunk_rows", [1, 8, 49, 50])


def run(x, weight, targets, chunk_rows=None, **options):
    """Loss, dx and dweight; chunk_rows None: of the reference."""
    options |= dict(vocab_size=65)
    if chunk_rows:
        options |= dict(chunk_rows=chunk_rows)
    function = (cpu if chunk_rows else reference).linear_cross_entropy
    return results(lambda x, w: function(x, w, targets, **options), [x, weight], [0.7])


@pytest.fixture
def problem():
    targets = torch.randint(0, 65, (50,))
    targets[::7] = -100
    return torch.randn(50, 16), torch.randn(72, 16), targets


@CHUNK_ROWS
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_same_loss_and_gradients(problem, reduction, chunk_rows):
    whole = run(*problem, reduction=reduction)
    chunked = run(*problem, chunk_rows, reduction=reduction)
    assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    assert not chunked[2][65:].any()  # the vocabulary's padding


def test_bf16_autocast(problem):
    with torch.autocast("cpu", torch.bfloat16):
        whole, chunked = (run(*problem, n, reduction="sum") for n in (None, 8))
    for a, b in zip(chunked, whole, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.01 * b.norm()


def test_only_what_needs_a_gradient(problem):
    x, weight, targets = problem
    expected = run(*problem, reduction="sum")
    options = dict(vocab_size=65, chunk_rows=8)
    weight.requires_grad_()
    (0.7 * cpu.linear_cross_entropy(x, weight, targets, reduction="sum", **options)).backward()
    assert_close(weight.grad, expected[2])
    for reduction in ("sum", "none"):
        with torch.no_grad():
            loss = cpu.linear_cross_entropy(x, weight, targets, reduction=reduction, **options)
        assert_close(loss.sum(), expected[0])
        assert loss.grad_fn is None


def test_a_large_vocabulary_is_chunked_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        cpu, "linear_cross_entropy", lambda *_, chunk_rows, **__: asked.append(chunk_rows)
    )
    select_ops("torch", "cpu").linear_cross_entropy(None, torch.empty(50304, 1), None)
    assert asked == [CPU_LOGITS // 50304]
