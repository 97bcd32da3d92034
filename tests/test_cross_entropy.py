"""Cross entropy kernels through the interpreter, against the fp64 reference.

The interpreter's tiles are 4096 and 1024 columns, so V = 50257 walks over 12 whole tiles and 2 tail
tiles.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernel_rule import DEEP, EPS, assert_as_exact_as_torch, leaf, loss_bounds
from triton_kernels import reference
from triton_kernels.cross_entropy import check_targets, cross_entropy

NAN = float("nan")
INF = float("inf")
WITH_EXTRAS = {"label_smoothing": 0.1, "z_loss": 1e-3}


def make(N, V, dtype=torch.float32, *, stride=None, ignored=(), seed=0):
    """Leaf logits (N, stride) of which the first V columns count, and targets (N,)."""
    g = torch.Generator().manual_seed(seed)
    buffer = (3 * torch.randn(N, stride or V, generator=g)).to(dtype)
    targets = torch.randint(V, (N,), generator=g)
    for row in ignored:
        targets[row] = -100
    return buffer, targets


def loss_and_gradient(function, buffer, targets, V, dloss=1.0, dtype=None, **options):
    """The loss of buffer[:, :V] and the gradient of the whole buffer; dloss is a number or a tensor
    like the loss.
    """
    buffer = leaf(buffer, dtype)
    loss = function(
        (buffer * 1)[:, :V], targets, **options
    )  # an intermediate, which may be overwritten
    loss.backward(torch.as_tensor(dloss, dtype=loss.dtype).expand(loss.shape))
    return loss.detach(), buffer.grad


def check(buffer, targets, V, dloss=1.0, **options):
    ours = loss_and_gradient(cross_entropy, buffer, targets, V, dloss, **options)
    theirs = loss_and_gradient(reference.cross_entropy, buffer, targets, V, dloss, **options)
    exact = loss_and_gradient(
        exact_cross_entropy, buffer, targets, V, dloss, dtype=torch.float64, **options
    )
    assert ours[0].dtype == torch.float32
    reduction, z_loss = options.get("reduction", "mean"), options.get("z_loss", 0.0)
    loss, dlogits = loss_bounds(buffer[:, :V], targets, dloss, reduction=reduction)
    if z_loss or options.get("label_smoothing"):
        loss = loss + DEEP * (1 + 4 * z_loss * buffer.double().square().sum(-1).amax())
        dlogits = dlogits * (1 + 4 * z_loss * buffer.double().norm()) + EPS
    assert_as_exact_as_torch(ours[0], theirs[0], exact[0], "loss", loss)
    dlogits = torch.nn.functional.pad(dlogits, (0, buffer.shape[1] - V))
    assert_as_exact_as_torch(ours[1], theirs[1], exact[1], "dlogits", dlogits)
    assert torch.equal(ours[1][:, V:], torch.zeros_like(ours[1][:, V:]))


def exact_cross_entropy(
    logits, targets, *, z_loss=0.0, reduction="mean", ignore_index=-100, **options
):
    """The reference, which computes in fp32, in fp64."""
    options.pop("inplace_backward", None)
    options |= {"ignore_index": ignore_index}
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none", **options)
    counted = targets != ignore_index
    if z_loss:
        loss = loss + torch.where(counted, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("stride", [50304, 50257])
def test_gpt2_vocabulary(stride, in_place, dtype):
    buffer, targets = make(3, 50257, dtype, stride=stride, ignored=[2])
    targets[0], targets[1] = 50256, 0
    check(buffer, targets, 50257, inplace_backward=in_place)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("V, stride", [(1, 1), (7, 64), (4096, 4096), (9001, 9024)])
def test_label_smoothing_and_z_loss(V, stride, in_place, reduction):
    buffer, targets = make(3, V, stride=stride, ignored=[1])
    dloss = torch.tensor([1.0, -2.0, 0.5]) if reduction == "none" else 0.7
    check(buffer, targets, V, dloss, inplace_backward=in_place, reduction=reduction, **WITH_EXTRAS)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 6),
    V=st.integers(1, 6000),
    padding=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    in_place=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(N, V, padding, dtype, reduction, label_smoothing, z_loss, in_place, seed):
    buffer, targets = make(N, V, dtype, stride=V + padding, seed=seed)
    targets[1::3] = -100
    options = dict(
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inplace_backward=in_place,
    )
    check(buffer, targets, V, 0.25, **options)


@pytest.mark.parametrize("in_place", [False, True])
def test_padding_is_neither_read_nor_written_but_zero_in_the_gradient(in_place):
    V, stride = 5000, 5056
    storage = torch.full((3, stride), NAN)
    storage[:, :V] = torch.randn(3, V)
    logits = storage[:, :V].requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, V - 1, 17]), inplace_backward=in_place)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert dlogits.isfinite().all()
    assert storage[:, V:].isnan().all()
    if in_place:
        assert dlogits.data_ptr() == storage.data_ptr()
    else:
        assert dlogits.stride() == (stride, 1)
        assert torch.equal(
            torch.as_strided(dlogits, (3, stride - V), (stride, 1), V), torch.zeros(3, stride - V)
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("in_place", [False, True])
def test_all_targets_ignored(in_place, reduction):
    buffer, targets = make(3, 100, ignored=[0, 1, 2])
    loss, dlogits = loss_and_gradient(
        cross_entropy, buffer, targets, 100, reduction=reduction, inplace_backward=in_place
    )
    expected, _ = loss_and_gradient(
        reference.cross_entropy, buffer, targets, 100, reduction=reduction
    )
    assert torch.equal(dlogits, torch.zeros(3, 100))
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()


@pytest.mark.parametrize("reduction, expected", [("mean", NAN), ("sum", 0.0), ("none", None)])
@pytest.mark.parametrize("in_place", [False, True])
def test_empty_batch(in_place, reduction, expected):
    logits = torch.empty(0, 10, requires_grad=True)
    loss = cross_entropy(
        logits * 1,
        torch.empty(0, dtype=torch.int64),
        reduction=reduction,
        inplace_backward=in_place,
    )
    loss.sum().backward()
    assert logits.grad.shape == (0, 10)
    expected = torch.empty(0) if expected is None else torch.tensor(expected)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)


@pytest.mark.filterwarnings(
    "ignore:divide by zero|invalid value:RuntimeWarning"
)  # numpy's, of log(0) and inf - inf
@pytest.mark.parametrize("V", [40, 5000])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", ["first tile", "all but target", "target", "everything"])
def test_infinite_logits(case, in_place, V):
    buffer, _ = make(2, V)
    targets = torch.tensor([V - 2, V - 1])
    if case == "first tile":
        buffer[0, : V - 5] = -INF
    elif case == "all but target":
        buffer[0] = -INF
        buffer[0, targets[0]] = 2.0
    elif case == "target":
        buffer[0, targets[0]] = -INF
    else:
        buffer[0] = -INF
    for reduction in ("none", "sum"):
        check(buffer, targets, V, reduction=reduction, inplace_backward=in_place)


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_large_logits_keep_their_digits(scale):
    buffer, targets = make(4, 700)
    check(buffer * scale + scale, targets, 700, reduction="none")


def test_confident_prediction_keeps_a_gradient():
    """p of the target is 1 - 2^-13: in fp16 the 1 must be subtracted before p is rounded to 1."""
    logits = torch.tensor([[9.0109, 0.0]], dtype=torch.float16, requires_grad=True)
    for in_place in (False, True):
        loss = cross_entropy(logits * 1, torch.tensor([0]), inplace_backward=in_place)
        (dlogits,) = torch.autograd.grad(loss, logits)
        assert dlogits[0, 0] < 0
        torch.testing.assert_close(dlogits[0, 0], -dlogits[0, 1], rtol=5e-3, atol=0)


@pytest.mark.parametrize("bad", [-1, 50, -99, 2**40])
def test_target_out_of_range_reads_nothing_and_is_loud(bad):
    buffer, targets = make(3, 50)
    targets[1] = bad
    for in_place in (False, True):
        loss, dlogits = loss_and_gradient(
            cross_entropy, buffer, targets, 50, reduction="none", inplace_backward=in_place
        )
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False]))
        assert torch.equal(dlogits.isnan().any(1), torch.tensor([False, True, False]))
    with pytest.raises(ValueError, match=rf"targets\[1\] is {bad}: it must be in 0..49"):
        check_targets(targets, 50)


def test_check_targets_accepts_the_ignored():
    check_targets(torch.tensor([0, 49, -100]), 50)
    check_targets(torch.tensor([0, 49, 77]), 50, ignore_index=77)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_targets_of_any_layout(dtype):
    """A shifted view starts 8 bytes off a 16-byte boundary; a column is strided."""
    logits = torch.randn(6, 33)
    matrix = torch.randint(33, (6, 3), dtype=dtype)
    shifted = torch.randint(33, (7,), dtype=dtype)[1:]
    for targets in (shifted, matrix[:, 1], matrix[:1, 0].expand(6)):
        ours = cross_entropy(logits, targets, ignore_index=5)
        torch.testing.assert_close(
            ours, reference.cross_entropy(logits, targets.long(), ignore_index=5)
        )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "layout", ["transposed", "expanded", "every other column", "every other row"]
)
def test_logits_of_any_layout(layout, in_place):
    base = torch.randn(40, 40)
    view = {
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:1].expand(40, 40),
        "every other column": lambda t: t[:, ::2],
        "every other row": lambda t: t[::2],
    }[layout]
    targets = torch.randint(20, (view(base).shape[0],))

    def run(function):
        x = leaf(base)
        loss = function(view(x * 1), targets, inplace_backward=in_place)
        loss.backward()
        return loss.detach(), x.grad

    torch.testing.assert_close(
        run(cross_entropy), run(reference.cross_entropy), rtol=1e-5, atol=1e-6
    )


def test_expanded_dloss():
    buffer, targets = make(5, 60)
    for in_place in (False, True):
        x, y = leaf(buffer), leaf(buffer)
        cross_entropy(x * 1, targets, reduction="none", inplace_backward=in_place).sum().backward()
        reference.cross_entropy(y, targets, reduction="sum").backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_beyond_int32(in_place, reduction):
    """Row 2 of this view starts 2^31 elements into its buffer; only the pages that are touched take
    memory.
    """
    logits = torch.empty(3, 2**30, dtype=torch.float16)[:, :48]
    logits.copy_(torch.randn(3, 48))
    small = leaf(logits)
    targets = torch.tensor([3, 0, 47])
    far = logits.requires_grad_()
    loss = cross_entropy(far, targets, reduction=reduction, inplace_backward=in_place)
    expected = cross_entropy(small, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    (dfar,) = torch.autograd.grad(loss.sum(), far)
    (dsmall,) = torch.autograd.grad(expected.sum(), small)
    torch.testing.assert_close(dfar, dsmall, rtol=0, atol=0)


def test_gradcheck():
    buffer, targets = make(2, 5)

    def function(logits, reduction):
        return cross_entropy(logits, targets, label_smoothing=0.2, z_loss=0.01, reduction=reduction)

    with (
        warnings.catch_warnings()
    ):  # gradcheck would rather have fp64, which the kernels do not take
        warnings.filterwarnings("ignore", message="Input #", category=UserWarning)
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                function, (leaf(buffer), reduction), eps=1e-2, atol=1e-2, rtol=1e-2
            )


def test_deterministic():
    buffer, targets = make(3, 5000, stride=5056)
    for in_place in (False, True):
        options = dict(label_smoothing=0.1, inplace_backward=in_place)
        first = loss_and_gradient(cross_entropy, buffer, targets, 5000, **options)
        second = loss_and_gradient(cross_entropy, buffer, targets, 5000, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    buffer, targets = make(4, 90)
    logits = leaf(buffer)
    loss = cross_entropy(logits, targets, reduction=reduction)
    loss.backward(torch.full_like(loss, 2.0), retain_graph=True)
    once = logits.grad.clone()
    loss.backward(torch.full_like(loss, 2.0))
    assert torch.equal(logits.grad, 2 * once)
    assert torch.equal(logits.detach(), buffer)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_in_place_is_refused(reduction):
    buffer, targets = make(4, 90)
    loss = cross_entropy(
        leaf(buffer) * 1, targets, reduction=reduction, inplace_backward=True
    ).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_tells_whoever_saved_the_logits():
    buffer, targets = make(4, 90)
    logits = leaf(buffer).tanh()  # tanh's backward needs its own output
    loss = cross_entropy(logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_gradient_leaves_logits_alone():
    buffer, targets = make(4, 90)
    logits = buffer.clone()
    cross_entropy(logits, targets, inplace_backward=True)
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), targets, inplace_backward=True)
    assert torch.equal(logits, buffer)


def test_leaf_in_place():
    buffer, targets = make(4, 90)
    x, y = leaf(buffer), leaf(buffer)
    cross_entropy(x, targets, inplace_backward=True).backward()
    reference.cross_entropy(y, targets).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_equals_eager(in_place):
    buffer, targets = make(4, 96)

    def function(buffer):
        logits = (buffer * 2)[:, :90]
        return cross_entropy(logits, targets % 90, inplace_backward=in_place, **WITH_EXTRAS) * 3

    def run(function):
        x = leaf(buffer)
        loss = function(x)
        loss.backward()
        return loss.detach(), x.grad

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(function), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("in_place", [False, True])
def test_checkpointed_equals_plain(in_place):
    buffer, targets = make(4, 90)

    def function(logits, targets):
        return cross_entropy(logits * 2, targets, inplace_backward=in_place)

    def again(logits, targets):
        return checkpoint(function, logits, targets, use_reentrant=False)

    plain = loss_and_gradient(function, buffer, targets, 90)
    for a, b in zip(loss_and_gradient(again, buffer, targets, 90), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_place", [False, True])
def test_bfloat16_logits_under_autocast(in_place):
    """The interpreter truncates to bf16 where a GPU rounds, hence two more ulps."""
    buffer, targets = make(4, 300, torch.bfloat16, stride=320)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradient(cross_entropy, buffer, targets, 300, inplace_backward=in_place)
    exact = loss_and_gradient(exact_cross_entropy, buffer, targets, 300, dtype=torch.float64)
    assert ours[0].dtype == torch.float32
    loss, dlogits = loss_bounds(buffer[:, :300], targets, 1.0)
    dlogits = torch.nn.functional.pad(dlogits, (0, 20))
    assert_as_exact_as_torch(ours[0], exact[0].float(), exact[0], "loss", loss)
    assert_as_exact_as_torch(ours[1], exact[1].bfloat16(), exact[1], "dlogits", dlogits)


def test_operators_pass_opcheck():
    buffer, targets = make(3, 50, torch.float16, stride=64)
    numbers = (-100, 0.1, 1e-3)
    ops = torch.ops.gpt2_triton
    for logits in (buffer[:, :50], torch.randn(3, 50)):
        torch.library.opcheck(ops.cross_entropy_fwd.default, (logits, targets, *numbers))
        _, lse = ops.cross_entropy_fwd(logits, targets, *numbers)
        for dloss, n_valid in ((torch.tensor(0.5), torch.tensor(3.0)), (torch.rand(3), None)):
            arguments = (dloss, logits, targets, lse, n_valid, *numbers)
            torch.library.opcheck(ops.cross_entropy_bwd.default, arguments)


LOGITS, TARGETS = torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "logits, targets, options, message",
    [
        (LOGITS[None], TARGETS, {}, r"logits has shape \(1, 4, 9\)"),
        (LOGITS[:, :0], TARGETS, {}, r"logits has shape \(4, 0\)"),
        (LOGITS.double(), TARGETS, {}, "logits is torch.float64: cast"),
        (LOGITS, TARGETS[:3], {}, r"targets has shape \(3,\), but logits has 4 rows"),
        (LOGITS, LOGITS[:, 0], {}, "targets is torch.float32: class indices"),
        (LOGITS, TARGETS.to("meta"), {}, "targets is on meta and logits on cpu"),
        (
            LOGITS,
            TARGETS,
            {"reduction": "avg"},
            "reduction is 'avg': it must be one of mean, sum, none",
        ),
        (LOGITS, TARGETS, {"label_smoothing": 1.5}, "label_smoothing is 1.5: it must be in 0..1"),
        (LOGITS, TARGETS, {"z_loss": -1.0}, "z_loss is -1.0: it must be 0 or more"),
    ],
)
def test_bad_input(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets, **options)
