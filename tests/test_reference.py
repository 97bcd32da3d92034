"""What a CPU runs instead of the reference: the head and the loss in chunks, in triton_kernels.cpu,
and the C++ linear layer for few rows.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gpt2.ops import CPU_LOGITS, DECODE_ROWS, _decode_linear, select_ops
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


@pytest.fixture
def linear():
    return _decode_linear() or pytest.skip("gpt2._decode_linear is not built, or lacks AVX2 here")


@pytest.mark.parametrize("n_in, n_out", [(8, 4), (17, 9), (768, 50), (64, 3), (5, 1)])
def test_linear_of_few_rows(linear, n_in, n_out):
    """Torch's numbers, and a row does not depend on those beside it."""
    weight, bias = torch.randn(n_out, n_in), torch.randn(n_out)
    for n_rows in range(1, DECODE_ROWS + 1):
        x = torch.randn(n_rows, 1, n_in)
        with torch.inference_mode():
            y = linear(x, weight, bias)
            exact = F.linear(x.double(), weight.double(), bias.double())
            assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
            assert all(torch.equal(linear(x[r], weight, bias), y[r]) for r in range(n_rows))
            assert_close(linear(x, weight) + bias, y)
            two = linear(x.expand(n_rows, 2, n_in), weight, bias)
            assert_close(two[:, 1], y[:, 0], rtol=1e-5, atol=1e-4)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert_close(weight.grad, x.sum(0).expand(n_out, n_in))


UNUSUAL = {
    "bias too short": ((1, 8), (64, 8), torch.zeros(4)),
    "bias of bfloat16": ((1, 8), (64, 8), torch.zeros(64).bfloat16()),
    "bias of 2 dimensions": ((1, 8), (64, 8), torch.zeros(1, 32)),
    "weight of 1 dimension": ((1, 8), (8,), None),
    "no channels": ((2, 0), (3, 0), None),
    "no outputs": ((2, 8), (0, 8), None),
    "no rows": ((0, 8), (3, 8), None),
    "x too narrow": ((2, 7), (3, 8), None),
    "x of no dimension": ((), (3, 1), None),
}


@pytest.mark.parametrize("x, weight, bias", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_linear_layers_are_torchs(linear, x, weight, bias):
    """Results and errors."""

    def of(function):
        try:
            with torch.no_grad():
                return function(torch.ones(x), torch.ones(weight), bias)
        except Exception as error:
            return type(error), str(error)

    ours, theirs = of(linear), of(F.linear)
    if isinstance(theirs, torch.Tensor):
        assert_close(ours, theirs)
    else:
        assert ours == theirs
