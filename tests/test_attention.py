"""triton_kernels.attention against the fp64 reference, through Triton's interpreter on a CPU.

The rule for every number: tests/kernel_rule.py.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernel_rule import (
    assert_as_exact_as_torch,
    attention_bounds,
    by_name,
    packed_documents,
)
from triton_kernels import launch, reference
from triton_kernels.attention import INTERPRETED, attention

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="compiled kernels: tests/gpu has the same checks on a GPU"
)
pytestmark = needs_interpreter
# Dynamo and Inductor call deprecated parts of PyTorch (instances of autograd.Function, torch.jit).
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
HALF_AND_FULL = [torch.float32, torch.float16, torch.bfloat16]


def make_qkv(B, T, H, D, dtype=torch.float32, seed=0):
    return torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(op, qkv, dout, **kwargs):
    qkv = qkv.detach().requires_grad_()
    out = op(qkv, **kwargs)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.to(out.dtype))
    return out.detach(), dqkv


def assert_as_good_as_torch(qkv, dout=None, **kwargs):
    """Output and the gradients of q, k and v, each by the rule above."""
    if dout is None:
        B, T, _, H, D = qkv.shape
        dout = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1)).to(qkv.dtype)
    ours = gradients(attention, qkv, dout, **kwargs)
    torchs = gradients(reference.attention, qkv, dout, **kwargs)
    exact = gradients(reference.attention, qkv.double(), dout.double(), **kwargs)
    assert ours[0].dtype == ours[1].dtype == qkv.dtype
    bounds = attention_bounds(qkv, dout, **kwargs)
    for name, *results in zip(bounds, *map(by_name, (ours, torchs, exact)), strict=True):
        assert_as_exact_as_torch(*results, name, bounds[name])


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize(
    "T, D",
    [
        (1, 64),  # one key: out = v
        (7, 16),  # less than a tile
        (64, 64),  # one tile exactly
        (129, 32),  # full tiles, a diagonal, one row left over
        (257, 64),
        (70, 80),  # a head dimension that is no power of two
        (96, 128),
        (33, 5),  # less than the 16 columns that a dot product needs
    ],
)
def test_matches_reference(T, D, dtype):
    assert_as_good_as_torch(make_qkv(1, T, 2, D, dtype))


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_packed_documents(dtype):
    assert_as_good_as_torch(make_qkv(2, 150, 1, 32, dtype), doc_start=packed_documents(2, 150))


def test_many_full_tiles_after_a_document_boundary():
    """Two long documents: masked tiles, then unmasked ones, then the diagonal."""
    doc_start = torch.zeros(1, 400, dtype=torch.int32)
    doc_start[:, 75:] = 75
    assert_as_good_as_torch(make_qkv(1, 400, 1, 16), doc_start=doc_start)


def test_documents_that_end_one_row_into_a_tile():
    """The last query that sees a tile of keys stands alone in its own tile."""
    position = torch.arange(129)[None]
    doc_start = torch.where(position < 33, 0, torch.where(position < 97, 33, 97)).int()
    assert_as_good_as_torch(make_qkv(1, 129, 1, 16), doc_start=doc_start)


def test_left_padding_sees_nothing_and_gives_no_gradient():
    padding, T = 70, 100
    qkv = make_qkv(2, T, 2, 16)
    doc_start = torch.tensor([[padding], [3]], dtype=torch.int32).expand(2, T)  # stride 0 along T
    assert_as_good_as_torch(qkv, doc_start=doc_start)
    out, dqkv = gradients(attention, qkv, torch.ones(2, T, 2, 16), doc_start=doc_start)
    assert out[0, :padding].eq(0).all() and dqkv[0, :padding].eq(0).all()
    alone = attention(qkv[:1, padding:])
    torch.testing.assert_close(out[:1, padding:], alone, rtol=0, atol=2e-6)


def test_documents_do_not_see_each_other():
    """A document's result does not depend, to the bit, on what stands in the others."""
    doc_start = packed_documents(1, 120, seed=3)
    cut = int(doc_start[0, -1])
    assert 0 < cut < 119
    qkv = make_qkv(1, 120, 1, 16)
    other = torch.cat([make_qkv(1, cut, 1, 16, seed=5), qkv[:, cut:]], dim=1)
    dout = torch.ones(1, 120, 1, 16)
    for a, b in zip(
        gradients(attention, qkv, dout, doc_start=doc_start),
        gradients(attention, other, dout, doc_start=doc_start),
        strict=True,
    ):
        assert torch.equal(a[:, cut:], b[:, cut:])


def test_unsorted_doc_start_is_only_slower():
    doc_start = torch.randint(0, 40, (1, 100), generator=torch.Generator().manual_seed(0)).int()
    assert_as_good_as_torch(make_qkv(1, 100, 1, 16), doc_start=doc_start)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.5])
def test_scale(scale):
    assert_as_good_as_torch(make_qkv(1, 80, 1, 16), scale=scale, doc_start=packed_documents(1, 80))


def test_large_scores_do_not_overflow():
    """Scores near 1e4: exp of them overflows; differences lose eps * 1e4, and no more."""
    qkv, dout = make_qkv(1, 80, 1, 16) * 70, torch.ones(1, 80, 1, 16)
    largest = (qkv[:, :, 0] @ qkv[:, :, 1].mT).abs().max().item() / 4
    assert largest > 1e4
    ours = gradients(attention, qkv, dout)
    exact = gradients(reference.attention, qkv.double(), dout.double())
    for a, b in zip(ours, exact, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 4 * torch.finfo(torch.float32).eps * largest


def test_strides():
    """Time-major, head-major and padded storage, read where it lies."""
    base = make_qkv(2, 66, 2, 16)
    layouts = {
        "time first": base.transpose(0, 1).contiguous().transpose(0, 1),
        "heads before parts": base.transpose(2, 3).contiguous().transpose(2, 3),
        "padded rows": torch.nn.functional.pad(base, (0, 3))[..., :16],
        "every other row": torch.stack([base, base], dim=2).flatten(1, 2)[:, ::2],
        "one head for all": base[:, :, :, :1].expand(-1, -1, -1, 2, -1),
    }
    for name, qkv in layouts.items():
        assert not qkv.is_contiguous(), name
        assert_as_good_as_torch(qkv)


def test_incoming_gradients_of_any_layout():
    qkv = make_qkv(2, 66, 2, 16)
    for dout in (
        torch.ones(()).expand(2, 66, 2, 16),
        torch.randn(2, 2, 66, 16).transpose(1, 2),
        torch.randn(2, 66, 16, 2).transpose(2, 3),
    ):
        assert not dout.is_contiguous()
        assert_as_good_as_torch(qkv, dout)
    qkv.requires_grad_()
    attention(qkv).sum().backward()
    expected = gradients(reference.attention, qkv, torch.ones(2, 66, 2, 16))[1]
    torch.testing.assert_close(qkv.grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16), (2, 5, 3, 0, 16)])
def test_empty(shape):
    qkv = torch.randn(shape, requires_grad=True)
    out = attention(qkv, doc_start=torch.zeros(shape[:2], dtype=torch.int32))
    assert out.shape == (shape[0], shape[1], *shape[3:])
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("tiles", [(16, 16, 16, 16), (128, 32, 16, 128), (64, 64, 64, 16)])
def test_any_tile_sizes(tiles, monkeypatch):
    """fwd and dq (BLOCK_M, BLOCK_N), then dkv: the answer does not depend on the tile table."""
    rows = launch.AttentionTiles(tiles[0], tiles[1], 4, 1)
    columns = launch.AttentionTiles(tiles[2], tiles[3], 4, 1)
    monkeypatch.setattr(
        sys.modules["triton_kernels.attention"],
        "attention_tiles",
        lambda name, *_: columns if name == "dkv" else rows,
    )
    qkv = make_qkv(1, 150, 1, 16)
    assert_as_good_as_torch(qkv)
    assert_as_good_as_torch(qkv, doc_start=packed_documents(1, 150, seed=2))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    H=st.integers(1, 2),
    D=st.sampled_from([3, 16, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    documents=st.none() | st.integers(0, 1000),
)
def test_any_shape(B, T, H, D, dtype, documents):
    doc_start = None if documents is None else packed_documents(B, T, documents)
    assert_as_good_as_torch(make_qkv(B, T, H, D, dtype, seed=T), doc_start=doc_start)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(T=st.integers(1, 100), seed=st.integers(0, 1000))
def test_equal_values_come_back(T, seed):
    """Softmax weights sum to one: where all v are 1, so are all outputs."""
    qkv = make_qkv(1, T, 1, 16, seed=seed)
    qkv[:, :, 2] = 1.0
    out = attention(qkv, doc_start=packed_documents(1, T, seed))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*not a double precision:UserWarning")
def test_gradient_by_finite_differences():
    qkv = make_qkv(1, 6, 1, 2).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: attention(x, doc_start=packed_documents(1, 6)),
        qkv, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=0.0,
    )  # fmt: skip


def test_same_bits_twice():
    qkv, doc_start = make_qkv(2, 130, 2, 16), packed_documents(2, 130)
    first = gradients(attention, qkv, torch.ones(2, 130, 2, 16), doc_start=doc_start)
    second = gradients(attention, qkv, torch.ones(2, 130, 2, 16), doc_start=doc_start)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# How it plugs in


def test_operators_are_registered_properly():
    qkv, doc_start = make_qkv(1, 20, 2, 16), packed_documents(1, 20)
    for documents in (None, doc_start):
        out, lse = torch.ops.gpt2_triton.attention_fwd(qkv, documents, 0.25)
        torch.library.opcheck(torch.ops.gpt2_triton.attention_fwd.default, (qkv, documents, 0.25))
        torch.library.opcheck(
            torch.ops.gpt2_triton.attention_bwd.default,
            (torch.ones_like(out), qkv, out, lse, documents, 0.25),
        )


class Layer(torch.nn.Module):
    """What GPT-2's attention does around the kernel."""

    def __init__(self, width=32, n_head=2):
        super().__init__()
        self.n_head = n_head
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)

    def forward(self, x, doc_start=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return self.c_proj(attention(qkv, doc_start=doc_start).flatten(2))


def layer_and_input():
    torch.manual_seed(0)
    return Layer(), torch.randn(2, 40, 32), packed_documents(2, 40)


def parameter_gradients(run, layer, *args):
    layer.zero_grad()
    loss = run(*args).square().sum()
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in layer.parameters()]


@compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    layer, x, doc_start = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for documents in (None, doc_start):
        eager = parameter_gradients(layer, layer, x, documents)
        traced = parameter_gradients(compiled, layer, x, documents)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@compiles
def test_compiles_for_any_length():
    layer, x, _ = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (40, 33, 17):
        torch.testing.assert_close(compiled(x[:, :T]), layer(x[:, :T]), rtol=1e-5, atol=1e-5)


def test_activation_checkpointing():
    layer, x, doc_start = layer_and_input()
    plain = parameter_gradients(layer, layer, x, doc_start)
    recomputed = parameter_gradients(
        lambda *args: checkpoint(layer, *args, use_reentrant=False), layer, x, doc_start
    )
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


@compiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    qkv = make_qkv(1, 40, 2, 16).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = attention(qkv)
        expected = reference.attention(qkv)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32
    layer, x, _ = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_second_derivatives_are_refused():
    qkv = make_qkv(1, 5, 1, 16).requires_grad_()
    (dqkv,) = torch.autograd.grad(attention(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dqkv.sum().backward()


# Bad input: a ValueError that names the argument, the value and the limit


@pytest.mark.parametrize(
    "qkv, says",
    [
        (torch.zeros(2, 5, 48), r"qkv must be \(B, T, 3, H, D\), got \(2, 5, 48\)"),
        (torch.zeros(2, 5, 2, 2, 16), r"got \(2, 5, 2, 2, 16\)"),
        (torch.zeros(2, 5, 3, 2, 16, dtype=torch.float64), "float64; use float16, bfloat16"),
        (torch.zeros(2, 5, 3, 2, 16, dtype=torch.int32), "int32"),
        (torch.zeros(2, 5, 3, 2, 129), "head dimension 129, the limit is 1 to 128"),
        (torch.zeros(2, 5, 3, 16, 2).transpose(3, 4), "stride 2 along D"),
        (torch.zeros(2, 5, 3, 2, 16, device="meta"), "qkv is on meta"),
    ],
    ids=lambda x: "" if isinstance(x, torch.Tensor) else x,
)
def test_bad_qkv(qkv, says):
    with pytest.raises(ValueError, match=says):
        attention(qkv)


@pytest.mark.parametrize(
    "doc_start, says",
    [
        (torch.zeros(2, 4, dtype=torch.int32), r"doc_start is \(2, 4\), it must be .* \(2, 5\)"),
        (torch.zeros(5, dtype=torch.int32), r"doc_start is \(5,\)"),
        (torch.zeros(2, 5, dtype=torch.int64), "doc_start is torch.int64"),
        (torch.zeros(2, 5, dtype=torch.int32, device="meta"), "on meta and qkv on cpu"),
        (torch.full((2, 5), 5, dtype=torch.int32), "holds 5, the limit is 0 to T - 1 = 4"),
        (torch.full((2, 5), -1, dtype=torch.int32), "holds -1, the limit"),
    ],
    ids=lambda x: "" if isinstance(x, torch.Tensor) else x,
)
def test_bad_doc_start(doc_start, says):
    with pytest.raises(ValueError, match=says):
        attention(torch.zeros(2, 5, 3, 2, 16), doc_start=doc_start)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="scale is .*positive and finite"):
        attention(torch.zeros(2, 5, 3, 2, 16), scale=scale)


def test_compiled_kernels_refuse_a_cpu(monkeypatch):
    monkeypatch.setattr(sys.modules["triton_kernels.attention"], "INTERPRETED", False)
    with pytest.raises(ValueError, match="qkv is on cpu.*TRITON_INTERPRET=1"):
        attention(torch.zeros(2, 5, 3, 2, 16))
