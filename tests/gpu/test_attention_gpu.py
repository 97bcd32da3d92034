"""triton_kernels.attention on a GPU, compiled: bf16, full size, the tiles that are shipped.

TRITON_INTERPRET=0 pytest -m gpu tests/gpu. The rule is tests/kernel_rule.py's. The fp64
reference runs on one batch row at a time, since it holds (H, T, T).
"""

import pytest
import torch

from tests.kernel_rule import (
    assert_as_exact_as_torch,
    attention_bounds,
    by_name,
    packed_documents,
)
from triton_kernels import reference
from triton_kernels.attention import INTERPRETED, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or INTERPRETED,
        reason="needs a CUDA or ROCm device and TRITON_INTERPRET=0",
    ),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def exact_torch():
    """PyTorch's side in full fp32: no TF32 in its products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(B, T, H, D, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    make_one = dict(device="cuda", generator=generator)
    return (
        torch.randn(B, T, 3, H, D, **make_one).to(dtype),
        torch.randn(B, T, H, D, **make_one).to(dtype),
    )


def gradients(op, qkv, dout, doc_start=None):
    qkv = qkv.detach().requires_grad_()
    out = op(qkv, doc_start=doc_start)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def assert_as_good_as_torch(qkv, dout, doc_start=None, rows=None):
    ours = gradients(attention, qkv, dout, doc_start)
    for b in range(qkv.shape[0]) if rows is None else rows:
        row = slice(b, b + 1)
        first = None if doc_start is None else doc_start[row]
        torchs = gradients(reference.attention, qkv[row], dout[row], first)
        exact = gradients(reference.attention, qkv[row].double(), dout[row].double(), first)
        bounds = attention_bounds(qkv[row], dout[row], first)
        mine = ours[0][row], ours[1][row]
        for name, *results in zip(bounds, *map(by_name, (mine, torchs, exact)), strict=True):
            assert_as_exact_as_torch(*results, name, bounds[name])


@pytest.mark.parametrize("D", [5, 16, 32, 64, 80, 128])
@pytest.mark.parametrize("T", [63, 257, 1024])
def test_matches_reference(T, D):
    assert_as_good_as_torch(*make(2, T, 3, D, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, H, D", [(1, 1, 64), (257, 3, 64), (1000, 2, 128)])
def test_matches_reference_in_every_dtype(T, H, D, dtype):
    assert_as_good_as_torch(*make(2, T, H, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, mean", [(257, 20), (1024, 100), (1000, 700), (4096, 500)])
def test_packed_documents(T, mean, dtype):
    assert_as_good_as_torch(*make(2, T, 2, 64, dtype), packed_documents(2, T, mean=mean).cuda())


def test_left_padding():
    padding = torch.tensor([[0], [100], [999]], dtype=torch.int32, device="cuda").expand(3, 1000)
    assert_as_good_as_torch(*make(3, 1000, 2, 64, torch.bfloat16), padding)


@pytest.mark.parametrize(
    "B, T, H, D",
    [
        (32, 1024, 12, 64),
        (8, 1024, 25, 64),
        (4, 4096, 12, 64),
        (1, 16384, 4, 64),
        (2, 2048, 6, 128),
    ],
)
def test_full_size(B, T, H, D):
    assert_as_good_as_torch(*make(B, T, H, D, torch.bfloat16), rows=[0, B - 1])


def test_offsets_beyond_int32():
    """The last rows of a packed batch of more than 2^31 elements."""
    B = 2**31 // (1024 * 3 * 12 * 64) + 2
    qkv = torch.empty(B, 1024, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    few, dout = make(2, 1024, 12, 64, torch.bfloat16)
    qkv[-2:] = few
    qkv[:-2] = few[:1]
    whole = attention(qkv)
    assert torch.equal(whole[-2:], attention(few))
    del whole
    dout = torch.cat([dout[:1].expand(B - 2, -1, -1, -1), dout])
    dqkv = gradients(attention, qkv, dout)[1]
    assert torch.equal(dqkv[-2:], gradients(attention, few, dout[-2:])[1])


def test_strides_and_expanded_gradients():
    qkv, dout = make(4, 300, 2, 64, torch.bfloat16)
    time_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    expected = gradients(attention, qkv, dout)
    for a, b in zip(gradients(attention, time_first, dout), expected, strict=True):
        assert torch.equal(a, b)
    assert_as_good_as_torch(qkv, torch.ones((), dtype=dout.dtype, device="cuda").expand_as(dout))


def test_same_bits_every_time():
    qkv, dout = make(8, 1024, 12, 64, torch.bfloat16)
    first = gradients(attention, qkv, dout)
    for _ in range(5):
        again = gradients(attention, qkv, dout)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_compiles_whole_with_autocast():
    layer = torch.nn.Linear(128, 384, device="cuda")

    def step(x):
        with torch.autocast("cuda", torch.bfloat16):
            return attention(layer(x).view(*x.shape[:2], 3, 2, 64)).float().square().sum()

    x = torch.randn(2, 200, 128, device="cuda")
    (eager,) = torch.autograd.grad(step(x), layer.weight)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), layer.weight)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


def test_doc_start_is_read_in_anomaly_mode_only():
    qkv, _ = make(1, 20, 1, 64, torch.bfloat16)
    beyond = torch.full((1, 20), 20, dtype=torch.int32, device="cuda")
    assert attention(qkv, doc_start=beyond).eq(0).all()
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(ValueError, match="doc_start holds 20"):
            attention(qkv, doc_start=beyond)
