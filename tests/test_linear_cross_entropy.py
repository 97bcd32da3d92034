"""Linear + cross entropy: its kernels through the interpreter and torch's matmuls, against the fp64
reference.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernel_rule import assert_as_exact_as_torch, leaf, linear_loss_bounds
from triton_kernels import reference
from triton_kernels.linear_cross_entropy import linear_cross_entropy


def make(N, C, V, dtype=torch.float32, *, W=None, seed=0):
    """x (N, C), weight (W, C) and targets (N,) of V classes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g).to(dtype)
    weight = (torch.randn(W or V, C, generator=g) / C**0.5 * 2).to(dtype)
    return x, weight, torch.randint(V, (N,), generator=g)


def run(function, x, weight, targets, dloss=1.0, dtype=None, **options):
    x, weight = leaf(x, dtype), leaf(weight, dtype)
    loss = function(x, weight, targets, **options)
    loss.backward(torch.as_tensor(dloss, dtype=loss.dtype).expand(loss.shape))
    return {"loss": loss.detach(), "dx": x.grad, "dweight": weight.grad}


def exact_linear_cross_entropy(x, weight, targets, *, vocab_size=None, chunk_rows=None, **options):
    """The reference, which computes the loss in fp32, in fp64."""
    return torch.nn.functional.cross_entropy((x @ weight.t())[:, :vocab_size], targets, **options)


def check(x, weight, targets, dloss=1.0, **options):
    ours = run(linear_cross_entropy, x, weight, targets, dloss, **options)
    theirs = run(reference.linear_cross_entropy, x, weight, targets, dloss, **options)
    exact = run(exact_linear_cross_entropy, x, weight, targets, dloss, torch.float64, **options)
    assert ours["loss"].dtype == torch.float32
    options.pop("chunk_rows", None)
    bounds = linear_loss_bounds(x, weight, targets, dloss, **options)
    for name in exact:
        assert_as_exact_as_torch(ours[name], theirs[name], exact[name], name, bounds[name])
    pad = ours["dweight"][options.get("vocab_size") or len(weight) :]
    assert torch.equal(pad, torch.zeros_like(pad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("W", [1000, 1010])
def test_matches_reference(W, chunk_rows, reduction, dtype):
    x, weight, targets = make(11, 48, 1000, dtype, W=W)
    targets[[2, 7]] = -100
    dloss = torch.linspace(-1, 2, 11) if reduction == "none" else 0.7
    check(x, weight, targets, dloss, vocab_size=1000, chunk_rows=chunk_rows, reduction=reduction)


@pytest.mark.parametrize("W, vocab_size", [(50304, 50257), (50257, None)])
def test_gpt2_vocabulary(W, vocab_size):
    x, weight, targets = make(5, 32, 50257, W=W)
    targets[0] = 50256
    check(x, weight, targets, vocab_size=vocab_size, chunk_rows=3)


@settings(max_examples=12, deadline=None)
@given(
    N=st.integers(1, 9),
    C=st.integers(1, 40),
    V=st.integers(2, 700),
    padding=st.integers(0, 70),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignore_index=st.sampled_from([-100, 0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(N, C, V, padding, chunk_rows, reduction, ignore_index, seed):
    x, weight, targets = make(N, C, V, W=V + padding, seed=seed)
    targets[0] = 1  # one that counts
    options = dict(
        vocab_size=V, chunk_rows=chunk_rows, reduction=reduction, ignore_index=ignore_index
    )
    check(x, weight, targets, 0.25, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(reduction):
    x, weight, targets = make(4, 16, 50)
    ours = run(linear_cross_entropy, x, weight, targets * 0 - 100, reduction=reduction)
    theirs = run(reference.linear_cross_entropy, x, weight, targets * 0 - 100, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert (ours["dx"] == 0).all() and (ours["dweight"] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    ours = run(linear_cross_entropy, *make(0, 16, 50), reduction=reduction)
    assert ours["dx"].shape == (0, 16)
    assert torch.equal(ours["dweight"], torch.zeros(50, 16))
    assert ours["loss"].isnan() if reduction == "mean" else ours["loss"].sum() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_needed_gradients(frozen, reduction, monkeypatch):
    x, weight, targets = make(6, 16, 50)
    both = run(linear_cross_entropy, x, weight, targets, reduction=reduction)
    tensors = {"x": x.clone(), "weight": weight.clone()}
    learned = tensors["weight" if frozen == "x" else "x"].requires_grad_()
    calls = count_matmuls(monkeypatch)
    loss = linear_cross_entropy(**tensors, targets=targets, reduction=reduction).sum()
    loss.backward()
    assert len(calls) == (2 if reduction == "mean" else 3)
    torch.testing.assert_close(learned.grad, both["dweight" if frozen == "x" else "dx"])
    assert tensors[frozen].grad is None


def count_matmuls(monkeypatch):
    """A list that grows with each matmul that the operation asks torch for."""
    calls = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, _f=original, **k: calls.append(_f) or _f(*a, **k)
        )
    return calls


def test_no_gradient_work_without_gradients(monkeypatch):
    x, weight, targets = make(6, 16, 50)
    calls = count_matmuls(monkeypatch)
    with torch.no_grad():
        ours = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    assert len(calls) == 1
    torch.testing.assert_close(ours, reference.linear_cross_entropy(x, weight, targets).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(reduction):
    x, weight, targets = make(6, 16, 50)
    x, weight = leaf(x), leaf(weight)
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    (3 * loss).backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    (3 * loss).backward()
    assert torch.equal(x.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


def test_deterministic():
    x, weight, targets = make(9, 24, 300, torch.float16)
    first = run(linear_cross_entropy, x, weight, targets, chunk_rows=4)
    second = run(linear_cross_entropy, x, weight, targets, chunk_rows=4)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mean_in_fp16_survives_a_loss_scaler():
    """p / N underflows in fp16 before the scale arrives, unless the division waits for it."""
    N, V, scale = 128, 8, 65536.0
    x = torch.ones(N, 1, dtype=torch.float16)
    weight = torch.zeros(V, 1, dtype=torch.float16)
    weight[0] = (
        # p of the other classes is exp(-12.5) = 3.7e-6; over 128 half of fp16's smallest number
        12.5
    )
    dweight = run(linear_cross_entropy, x, weight, torch.zeros(N, dtype=torch.int64), scale)[
        "dweight"
    ]
    p = torch.softmax(weight[:, 0].double(), 0)[1:, None]
    torch.testing.assert_close(dweight[1:].double(), p * scale, rtol=2e-2, atol=0)


def test_strided_inputs():
    x, weight, targets = make(6, 16, 50)
    xs, ws = torch.randn(16, 6).t(), torch.randn(50, 32)[:, ::2]
    check(xs, weight, targets)
    check(x, ws, targets)
    check(x, weight, torch.randint(50, (6, 2))[:, 1])


def test_gradcheck():
    x, weight, targets = make(2, 3, 5, W=6)

    def function(x, weight, reduction):
        return linear_cross_entropy(x, weight, targets, vocab_size=5, reduction=reduction)

    with (
        warnings.catch_warnings()
    ):  # gradcheck would rather have fp64, which the kernels do not take
        warnings.filterwarnings("ignore", message="Input #", category=UserWarning)
        for reduction in ("mean", "none"):
            inputs = leaf(x), leaf(weight), reduction
            assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    """bf16 matmuls, an fp32 loss, and gradients of the dtype of what they belong to."""
    x, weight, targets = make(7, 64, 200)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(linear_cross_entropy, x, weight, targets, reduction=reduction)
        theirs = run(reference.linear_cross_entropy, x, weight, targets, reduction=reduction)
    exact = run(
        exact_linear_cross_entropy, x, weight, targets, dtype=torch.float64, reduction=reduction
    )
    bounds = linear_loss_bounds(x, weight, targets, 1.0, reduction=reduction, dtype=torch.bfloat16)
    for name in ours:
        assert ours[name].dtype == torch.float32
        assert_as_exact_as_torch(ours[name], theirs[name], exact[name], name, bounds[name])


def head(x, weight, targets, **options):
    return linear_cross_entropy(x.tanh(), weight, targets, **options) * 2


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own
@pytest.mark.parametrize(
    "options", [{}, {"chunk_rows": 3, "vocab_size": 90}, {"reduction": "none"}], ids=str
)
def test_compiled_equals_eager(options):
    x, weight, targets = make(7, 16, 90, W=96)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    ours, eager = (
        run(compiled, x, weight, targets, **options),
        run(head, x, weight, targets, **options),
    )
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_checkpointed_equals_plain():
    x, weight, targets = make(7, 16, 90)

    def again(*inputs):
        return checkpoint(head, *inputs, use_reentrant=False)

    plain, ours = run(head, x, weight, targets), run(again, x, weight, targets)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_operators_pass_opcheck():
    x, weight, targets = make(5, 16, 60, torch.float16, W=70)
    ops = torch.ops.gpt2_triton
    for needs in ((True, True), (False, True), (False, False)):
        numbers = (-100, 60, 2, torch.float16, *needs)
        torch.library.opcheck(ops.linear_cross_entropy_fwd.default, (x, weight, targets, *numbers))
    arguments = (
        torch.rand(5),
        x,
        weight,
        targets,
        torch.zeros(5),
        -100,
        60,
        2,
        torch.float16,
        True,
        True,
    )
    torch.library.opcheck(ops.linear_cross_entropy_bwd.default, arguments)
    torch.library.opcheck(ops.scaled.default, (x, torch.tensor(0.5), torch.float32))


X, WEIGHT, TARGETS = torch.zeros(4, 9), torch.zeros(20, 9), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X[0]}, r"x has shape \(9,\)"),
        ({"weight": WEIGHT.t()}, r"weight has shape \(9, 20\), but x is 9 wide"),
        ({"weight": WEIGHT.half()}, "weight is torch.float16 and x torch.float32: cast"),
        ({"weight": WEIGHT.to("meta")}, "weight is on meta and x on cpu"),
        ({"x": X.double()}, "x is torch.float64: cast"),
        ({"targets": TARGETS[:2]}, r"targets has shape \(2,\), but x has 4 rows"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"vocab_size": 21}, r"vocab_size is 21: it must be in 1..20"),
        ({"chunk_rows": 0}, "chunk_rows is 0: it must be 1 or more"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": X, "weight": WEIGHT, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
