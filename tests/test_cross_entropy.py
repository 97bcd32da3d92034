"""Cross entropy kernels through the interpreter, against the fp64 oracle.

The interpreter's tiles are 4096 and 1024 columns, so V = 50257 walks over 12 whole tiles and 2 tail
tiles.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_rule import check_cross_entropy, results
from triton_kernels import launch, reference
from triton_kernels.cross_entropy import cross_entropy

NAN, INF = float("nan"), float("inf")
IN_PLACE = pytest.mark.parametrize("in_place", [False, True])
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def make(N, V, dtype=torch.float32, *, stride=None, ignored=(), seed=0):
    """Logits (N, stride) of which the first V columns count, and targets (N,)."""
    g = torch.Generator().manual_seed(seed)
    buffer = (3 * torch.randn(N, stride or V, generator=g)).to(dtype)
    targets = torch.randint(V, (N,), generator=g)
    targets[list(ignored)] = -100
    return buffer, targets


def of(targets, **options):
    """Cross entropy of logits that are intermediate and may be overwritten."""
    return lambda logits: cross_entropy(logits * 1, targets, **options)


@IN_PLACE
@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("stride", [50304, 50257])
def test_gpt2_vocabulary(stride, in_place, dtype):
    buffer, targets = make(3, 50257, dtype, stride=stride, ignored=[2])
    targets[0], targets[1] = 50256, 0
    check_cross_entropy(buffer, targets, 50257, inplace_backward=in_place)


@IN_PLACE
@REDUCTION
@pytest.mark.parametrize("V, stride", [(1, 1), (7, 64), (4096, 4096), (9001, 9024)])
def test_sizes(V, stride, in_place, reduction):
    buffer, targets = make(3, V, stride=stride, ignored=[1])
    dloss = torch.tensor([1.0, -2.0, 0.5]) if reduction == "none" else 0.7
    options = dict(inplace_backward=in_place, reduction=reduction)
    check_cross_entropy(buffer, targets, V, dloss, **options)


@settings(max_examples=25)
@given(
    N=st.integers(1, 6), V=st.integers(1, 6000), padding=st.integers(0, 70),
    dtype=st.sampled_from(launch.DTYPES[:2]), reduction=st.sampled_from(["mean", "sum", "none"]),
    in_place=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(N, V, padding, dtype, reduction, in_place, seed):
    buffer, targets = make(N, V, dtype, stride=V + padding, seed=seed)
    targets[1::3] = -100
    options = dict(reduction=reduction, inplace_backward=in_place)
    check_cross_entropy(buffer, targets, V, 0.25, **options)


@IN_PLACE
def test_padding_is_neither_read_nor_written_but_zero_in_the_gradient(in_place):
    V, stride = 5000, 5056
    storage = torch.full((3, stride), NAN)
    storage[:, :V] = torch.randn(3, V)
    logits = storage[:, :V].requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, V - 1, 17]), inplace_backward=in_place)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and dlogits.isfinite().all()
    assert storage[:, V:].isnan().all()
    if in_place:
        assert dlogits.data_ptr() == storage.data_ptr()
        return
    assert dlogits.stride() == (stride, 1)
    assert not torch.as_strided(dlogits, (3, stride - V), (stride, 1), V).any()


@IN_PLACE
@REDUCTION
def test_all_targets_ignored(in_place, reduction):
    """Whatever the logits hold."""
    buffer, targets = make(3, 100, ignored=[0, 1, 2])
    buffer[1] = NAN
    options = dict(reduction=reduction, inplace_backward=in_place)
    loss, dlogits = results(of(targets, **options), [buffer], [1.0])
    assert not dlogits.any()
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()


@pytest.mark.filterwarnings(
    "ignore:divide by zero|invalid value:RuntimeWarning"
)  # numpy's, of log(0) and inf - inf
@IN_PLACE
@pytest.mark.parametrize("V", [40, 5000])
@pytest.mark.parametrize("case", ["first tile", "groups", "all but target", "target", "everything"])
def test_infinite_logits(case, in_place, V):
    buffer, _ = make(2, V)
    targets = torch.tensor([V - 2, V - 1])
    if case == "first tile":
        buffer[0, : V - 5] = -INF
    elif case == "groups":  # of 8 neighbours, which share a maximum, and of 4 in the tail
        buffer[0, : V - 16] = -INF
        buffer[0, 20:24] = 1.0
    elif case == "all but target":
        buffer[0] = -INF
        buffer[0, targets[0]] = 2.0
    else:
        buffer[0, targets[0] if case == "target" else slice(None)] = -INF
    for reduction in ("none", "sum"):
        options = dict(reduction=reduction, inplace_backward=in_place)
        check_cross_entropy(buffer, targets, V, **options)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4])
def test_large_logits_keep_their_digits(scale):
    buffer, targets = make(4, 700)
    check_cross_entropy(buffer * scale + 1e4, targets, 700, reduction="none")


@IN_PLACE
def test_confident_prediction_keeps_a_gradient(in_place):
    """p of the target is 1 - 2^-13: in fp16 the 1 must be subtracted before p is rounded to 1."""
    logits = torch.tensor([[9.0109, 0.0]], dtype=torch.float16)
    _, dlogits = results(of(torch.tensor([0]), inplace_backward=in_place), [logits], [1.0])
    assert dlogits[0, 0] < 0
    torch.testing.assert_close(dlogits[0, 0], -dlogits[0, 1], rtol=5e-3, atol=0)


@IN_PLACE
@pytest.mark.parametrize("bad", [-1, 50, -99, 2**40])
def test_target_out_of_range_reads_nothing_and_is_loud(bad, in_place):
    buffer, targets = make(3, 50)
    targets[1] = bad
    options = dict(reduction="none", inplace_backward=in_place)
    loss, dlogits = results(of(targets, **options), [buffer], [1.0])
    assert loss.isnan().tolist() == dlogits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_targets_of_any_layout(dtype):
    """A shifted view starts 8 bytes off a 16-byte boundary; a column is strided."""
    logits = torch.randn(6, 33)
    matrix = torch.randint(33, (6, 3), dtype=dtype)
    shifted = torch.randint(33, (7,), dtype=dtype)[1:]
    for targets in (shifted, matrix[:, 1], matrix[:1, 0].expand(6)):
        ours = cross_entropy(logits, targets, ignore_index=5)
        theirs = reference.cross_entropy(logits, targets.long(), ignore_index=5)
        torch.testing.assert_close(ours, theirs)


def test_in_place_writes_nothing_before_the_backward():
    buffer, targets = make(4, 90)
    logits = buffer.clone().requires_grad_()
    loss = cross_entropy(logits, targets, inplace_backward=True)
    with torch.no_grad():
        cross_entropy(logits, targets, inplace_backward=True)
    assert torch.equal(logits, buffer)
    loss.backward()  # of a leaf
    expected = results(of(targets), [buffer], [1.0])[1]
    assert torch.equal(logits.grad, expected) and torch.equal(logits, expected)
