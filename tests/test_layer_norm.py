"""Layer norm kernels through the interpreter, against the fp64 reference."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernel_rule import assert_as_exact_as_torch, layer_norm_bounds, leaf
from triton_kernels import reference
from triton_kernels.layer_norm import MAX_WIDTH, layer_norm


def make(
    shape,
    dtype=torch.float32,
    *,
    residual=False,
    bias=True,
    seed=0,
    weight_dtype=None,
    residual_dtype=None,
):
    """x, weight, bias and residual with entries of different scale and a mean away from 0."""
    g = torch.Generator().manual_seed(seed)
    C = shape[-1]
    x = (torch.randn(shape, generator=g) * 2 + 0.5).to(dtype)
    weight = (1 + 0.3 * torch.randn(C, generator=g)).to(weight_dtype or dtype)
    b = (0.2 * torch.randn(C, generator=g)).to(weight_dtype or dtype) if bias else None
    r = (torch.randn(shape, generator=g) - 1).to(residual_dtype or dtype) if residual else None
    return {"x": x, "weight": weight, "bias": b, "residual": r}


def outputs_and_gradients(function, tensors, upstream, dtype=None):
    """Outputs of function and the gradients of sum(output * upstream), by name, in one
    dictionary.
    """
    t = {name: None if v is None else leaf(v, dtype) for name, v in tensors.items()}
    out = function(t["x"], t["weight"], t["bias"], residual=t["residual"])
    out = out if isinstance(out, tuple) else (out,)
    sum((o.double() * u).sum() for o, u in zip(out, upstream, strict=False)).backward()
    found = {"y": out[0].detach()}
    if len(out) == 2:
        found["sum"] = out[1].detach()
    return found | {"d" + name: v.grad for name, v in t.items() if v is not None}


def check(tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape, dtype = tensors["x"].shape, tensors["x"].dtype
    upstream = [torch.randn(shape, generator=g).to(dtype).double() for _ in range(2)]
    ours = outputs_and_gradients(layer_norm, tensors, upstream)
    theirs = outputs_and_gradients(reference.layer_norm, tensors, upstream)
    exact = outputs_and_gradients(reference.layer_norm, tensors, upstream, torch.float64)
    bounds = layer_norm_bounds(tensors, upstream)
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype, name
        assert_as_exact_as_torch(ours[name], theirs[name], exact[name], name, bounds[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 768), (37, 768), (2, 5, 100), (3, 1600), (13, 1023), (50, 64), (9, 1), (2, 2049)],
    ids=str,
)
def test_matches_reference(shape, residual, dtype):
    check(make(shape, dtype, residual=residual))


@pytest.mark.parametrize("residual", [False, True])
def test_without_bias(residual):
    check(make((11, 96), residual=residual, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_branch_on_fp32_stream(dtype):
    tensors = make(
        (7, 80), dtype, residual=True, weight_dtype=torch.float32, residual_dtype=torch.float32
    )
    upstream = [torch.randn(7, 80).to(dtype).double() for _ in range(2)]
    ours = outputs_and_gradients(layer_norm, tensors, upstream)
    exact = outputs_and_gradients(reference.layer_norm, tensors, upstream, torch.float64)
    assert ours["sum"].dtype == ours["dresidual"].dtype == torch.float32
    assert ours["dx"].dtype == dtype
    bounds = layer_norm_bounds(tensors, upstream)
    for name in exact:
        rounded = exact[name].to(ours[name].dtype)
        assert_as_exact_as_torch(ours[name], rounded, exact[name], name, bounds[name])


def test_far_mean_keeps_its_digits():
    tensors = make((6, 256))
    tensors["x"] += 1000.0
    check(tensors)


def test_constant_rows_and_large_eps():
    x = torch.full((3, 48), 2.0)
    y = layer_norm(x, torch.ones(48), torch.full((48,), 0.5))
    assert torch.equal(y, torch.full_like(x, 0.5))
    x = torch.randn(3, 48)
    expected = reference.layer_norm(x, torch.ones(48), eps=0.1)
    torch.testing.assert_close(layer_norm(x, torch.ones(48), eps=0.1), expected, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    C=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    residual=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(rows, C, dtype, residual, bias, seed):
    check(make((rows, C), dtype, residual=residual, bias=bias, seed=seed), seed)


@pytest.mark.parametrize(
    "layout", ["row stride", "column stride", "transposed batch", "expanded rows"]
)
def test_strided_inputs_and_gradients(layout):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, 96, generator=g)
    view = {
        "row stride": lambda t: t[:, 1, :],
        "column stride": lambda t: t[:, :, ::3],
        "transposed batch": lambda t: t.transpose(0, 1),
        "expanded rows": lambda t: t[:1].expand(5, 4, 96),
    }[layout]
    weight, bias = torch.randn(2, view(base).shape[-1], generator=g)
    upstream = torch.randn(view(base).transpose(0, -1).shape, generator=g).transpose(0, -1)

    def run(function):
        x, residual, w, b = leaf(base), leaf(base * 2), leaf(weight), leaf(bias)
        y, summed = function(view(x), w, b, residual=view(residual))
        torch.autograd.backward((y, summed), (upstream, upstream * 3))
        return y, summed, x.grad, residual.grad, w.grad, b.grad

    for ours, theirs in zip(run(layer_norm), run(reference.layer_norm), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)


def test_expanded_gradient():
    x, w = torch.randn(5, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    (layer_norm(x, w) * 1.0).sum().backward()
    ours = x.grad, w.grad
    x.grad = w.grad = None
    y = layer_norm(x, w)
    y.sum().backward()  # dy is one number, expanded
    torch.testing.assert_close((x.grad, w.grad), ours, rtol=0, atol=0)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    tensors = make((5, 40), residual=True)

    def run(function):
        t = {name: leaf(v) for name, v in tensors.items()}
        out = function(t["x"], t["weight"], t["bias"], residual=t["residual"])
        out[used].square().sum().backward()
        return [torch.zeros_like(v) if v.grad is None else v.grad for v in t.values()]

    for ours, theirs in zip(run(layer_norm), run(reference.layer_norm), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient():
    tensors = make((5, 40), residual=True)
    x = leaf(tensors["x"])
    y, summed = layer_norm(x, tensors["weight"], tensors["bias"], residual=tensors["residual"])
    (y + summed).square().sum().backward()
    ours, x.grad = x.grad, None
    y, summed = reference.layer_norm(
        x, tensors["weight"], tensors["bias"], residual=tensors["residual"]
    )
    (y + summed).square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-5, atol=1e-5)
    assert tensors["weight"].grad is None


def test_no_rows():
    x, w = torch.randn(0, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    y, summed = layer_norm(x, w, residual=x)
    (y + summed).sum().backward()
    assert y.shape == summed.shape == x.grad.shape == (0, 16)
    assert torch.equal(w.grad, torch.zeros(16))


def test_offsets_beyond_int32():
    """Row 2 of this view starts 2^31 elements into its buffer; only the pages that are touched take
    memory.
    """
    x = torch.empty(3, 2**30, dtype=torch.float16)[:, :32]
    x.copy_(torch.randn(3, 32))
    torch.testing.assert_close(
        layer_norm(x, torch.ones(32)), layer_norm(x.clone(), torch.ones(32)), rtol=0, atol=0
    )


def test_gradcheck():
    tensors = make((3, 4), residual=True)
    inputs = [leaf(v) for v in tensors.values()]

    def function(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual, eps=0.1)

    with (
        warnings.catch_warnings()
    ):  # gradcheck would rather have fp64, which the kernels do not take
        warnings.filterwarnings("ignore", message="Input #", category=UserWarning)
        assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-2, rtol=1e-2)


def test_deterministic():
    tensors = make((67, 96), residual=True)
    upstream = [torch.randn(67, 96, dtype=torch.float64) for _ in range(2)]
    first = outputs_and_gradients(layer_norm, tensors, upstream)
    second = outputs_and_gradients(layer_norm, tensors, upstream)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_backward_twice():
    tensors = make((5, 40), residual=True)
    t = {name: leaf(v) for name, v in tensors.items()}
    y, summed = layer_norm(t["x"], t["weight"], t["bias"], residual=t["residual"])
    loss = (y * summed).sum()
    loss.backward(retain_graph=True)
    once = {name: v.grad.clone() for name, v in t.items()}
    loss.backward()
    for name, v in t.items():
        assert torch.equal(v.grad, 2 * once[name]), name


def test_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    y = layer_norm(x, torch.ones(8))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def block(x, weight, bias, residual):
    y, summed = layer_norm(x * 2, weight, bias, residual=residual)
    return layer_norm(y.tanh(), weight) * summed


def loss_and_gradients(function, tensors):
    t = {name: leaf(v) for name, v in tensors.items()}
    loss = function(**t).float().square().mean()
    loss.backward()
    return [loss.detach(), *(v.grad for v in t.values())]


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(autocast):
    tensors = make((2, 5, 48), residual=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = loss_and_gradients(compiled, tensors)
        eager = loss_and_gradients(block, tensors)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_checkpointed_equals_plain():
    tensors = make((2, 5, 48), residual=True)
    plain = loss_and_gradients(block, tensors)
    again = loss_and_gradients(
        lambda **t: checkpoint(block, *t.values(), use_reentrant=False), tensors
    )
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_autocast_dtypes():
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, summed = layer_norm(x.bfloat16(), torch.ones(32), residual=x)
        alone = layer_norm(x, torch.ones(32))
    assert (y.dtype, summed.dtype, alone.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    torch.testing.assert_close(summed, x.bfloat16() + x, rtol=0, atol=0)
    torch.testing.assert_close(
        alone, reference.layer_norm(x, torch.ones(32)), rtol=1e-2, atol=1e-2, check_dtype=False
    )


def test_operators_pass_opcheck():
    t = make((5, 24), torch.float16, residual=True, residual_dtype=torch.float32)
    ops = torch.ops.gpt2_triton
    for bias, residual in ((t["bias"], t["residual"]), (None, None)):
        torch.library.opcheck(
            ops.layer_norm_fwd.default, (t["x"], t["weight"], bias, residual, 1e-5, torch.float16)
        )
    s, mean, rstd = t["residual"], torch.randn(5), torch.rand(5) + 0.5
    for ds, has_dw, bias_dtype in ((s, True, torch.float16), (None, False, None)):
        torch.library.opcheck(
            ops.layer_norm_bwd.default,
            (t["x"], ds, s, t["weight"], mean, rstd, torch.float16, has_dw, bias_dtype),
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(31)}, r"weight has shape \(31,\)"),
        ({"bias": torch.ones(1, 32)}, r"bias has shape \(1, 32\)"),
        ({"residual": torch.ones(3, 32)}, r"residual has shape \(3, 32\)"),
        ({"x": torch.ones(2, 32, dtype=torch.float64)}, "x is torch.float64: cast"),
        ({"weight": torch.ones(32, dtype=torch.int64)}, "weight is torch.int64: cast"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"x": torch.ones(2, MAX_WIDTH + 1)}, f"1 to {MAX_WIDTH} channels"),
        ({"bias": torch.ones(32, device="meta")}, "bias is on meta and x on cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "x": torch.ones(2, 32),
        "weight": torch.ones(32),
        "bias": None,
        "residual": None,
    } | change
    x, weight = arguments.pop("x"), arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, **arguments)
