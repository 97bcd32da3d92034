"""triton_kernels.attention against the fp64 oracle, through Triton's interpreter on a CPU."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_rule import SAME_BITS, check_attention, packed_documents, results
from triton_kernels import launch, reference
from triton_kernels.attention import INTERPRETED, attention

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="compiled kernels: tests/gpu has the same checks on a GPU"
)
DTYPES = pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)


def make_qkv(B, T, H, D, dtype=torch.float32, seed=0):
    return torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def out_and_dqkv(qkv, doc_start=None):
    return results(lambda qkv: attention(qkv, doc_start=doc_start), [qkv], [1.0])


@DTYPES
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
    check_attention(make_qkv(1, T, 2, D, dtype))


@DTYPES
def test_packed_documents(dtype):
    check_attention(make_qkv(2, 150, 1, 32, dtype), doc_start=packed_documents(2, 150))


@pytest.mark.parametrize(
    "starts",
    [
        [0, 75],  # two long documents: masked tiles, then unmasked ones, then the diagonal
        [0, 33, 97],  # the last query that sees a tile of keys stands alone in its own tile
        None,  # in no order, which is only slower
    ],
    ids=str,
)
def test_document_boundaries(starts):
    T = 400 if starts == [0, 75] else 129
    doc_start = torch.randint(0, 40, (T,), generator=torch.Generator().manual_seed(0))
    if starts:
        lengths = torch.tensor([*starts[1:], T]) - torch.tensor(starts)
        doc_start = torch.tensor(starts).repeat_interleave(lengths)
    check_attention(make_qkv(1, T, 1, 16), doc_start=doc_start[None].int())


def test_left_padding_sees_nothing_and_gives_no_gradient():
    padding, T = 70, 100
    qkv = make_qkv(2, T, 2, 16)
    doc_start = torch.tensor([[padding], [3]], dtype=torch.int32).expand(2, T)  # stride 0 along T
    check_attention(qkv, doc_start=doc_start)
    out, dqkv = out_and_dqkv(qkv, doc_start)
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
    a, b = ([r[:, cut:] for r in out_and_dqkv(x, doc_start)] for x in (qkv, other))
    torch.testing.assert_close(a, b, **SAME_BITS)


@pytest.mark.parametrize("scale, limit", [(10, 4e2), (15, 1e3), (70, 1e4)])
def test_large_scores_lose_their_size_in_eps_and_no_more(scale, limit):
    """exp of scores near 1e4 overflows; differences lose eps * 1e4."""
    qkv = make_qkv(1, 80, 1, 16) * scale
    largest = (qkv[:, :, 0, 0] @ qkv[:, :, 1, 0].mT).abs().max().item() / 4
    assert largest > limit
    exact = results(reference.attention, [qkv], [1.0], torch.float64)
    for a, b in zip(out_and_dqkv(qkv), exact, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < torch.finfo(torch.float32).eps * largest


def test_nan_stays_with_its_tile_and_the_queries_after_it():
    qkv = make_qkv(1, 200, 1, 16)
    qkv[0, 130, 2] = float("nan")
    out = attention(qkv)[0, :, 0]
    assert out[:128].isfinite().all() and out[130:].isnan().all()


@pytest.mark.parametrize("tiny", [2.0**-24, -(2.0**-24)])
def test_operands_reach_registers_exactly(tiny):
    """fp16's smallest number and its largest survive the product with the identity."""
    qkv = torch.zeros(1, 20, 3, 1, 16, dtype=torch.float16)
    qkv[0, 3, 2], qkv[0, 4, 2] = tiny, 65504.0
    dout = torch.zeros(1, 20, 1, 16, dtype=torch.float16)
    dout[0, 5] = tiny
    _, dqkv = results(attention, [qkv], [dout])
    check_attention(qkv, dout)
    assert dqkv.isfinite().all()


@pytest.mark.parametrize("layout", ["heads before parts", "padded rows", "one head for all"])
def test_strides(layout):
    """Storage read where it lies; time-major and others are in kernel_contract.py."""
    base = make_qkv(2, 66, 2, 16)
    qkv = {
        "heads before parts": base.transpose(2, 3).contiguous().transpose(2, 3),
        "padded rows": torch.nn.functional.pad(base, (0, 3))[..., :16],
        "one head for all": base[:, :, :, :1].expand(-1, -1, -1, 2, -1),
    }[layout]
    assert not qkv.is_contiguous()
    check_attention(qkv, torch.randn(2, 66, 16, 2).transpose(2, 3))


@pytest.mark.parametrize("tiles", [(16, 16, 16, 16), (128, 32, 16, 128), (64, 64, 64, 16)])
def test_any_tile_sizes(tiles, monkeypatch):
    """fwd and dq (BLOCK_M, BLOCK_N), then dkv: the answer does not depend on the tile table."""
    rows, columns = (launch.AttentionTiles(*tiles[i : i + 2], 4, 1) for i in (0, 2))
    monkeypatch.setattr(
        sys.modules["triton_kernels.attention"],
        "attention_tiles",
        lambda name, *_: columns if name == "dkv" else rows,
    )
    qkv = make_qkv(1, 150, 1, 16)
    check_attention(qkv)
    check_attention(qkv, doc_start=packed_documents(1, 150, seed=2))


@settings(max_examples=15)
@given(
    B=st.integers(1, 2), T=st.integers(1, 140), H=st.integers(1, 2),
    D=st.sampled_from([3, 16, 24, 64]), dtype=st.sampled_from(launch.DTYPES[:2]),
    documents=st.none() | st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(B, T, H, D, dtype, documents):
    doc_start = None if documents is None else packed_documents(B, T, documents)
    check_attention(make_qkv(B, T, H, D, dtype, seed=T), doc_start=doc_start)


def test_sums_are_not_kept_in_fp16():
    """The mean of equal values is that value, but for sums that are rounded to fp16 on the way."""
    qkv = torch.zeros(1, 300, 3, 1, 16, dtype=torch.float16)
    qkv[:, :, 2] = 1 / 3
    assert torch.equal(attention(qkv), qkv[:, :, 2])


@pytest.mark.parametrize("value", [5, -1])
def test_doc_start_must_lie_in_its_row(value):
    doc_start = torch.full((2, 5), value, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"doc_start holds {value}, the limit is 0 to T - 1 = 4"):
        attention(torch.zeros(2, 5, 3, 2, 16), doc_start=doc_start)
