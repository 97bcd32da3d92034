"""triton_kernels.attention on a GPU, compiled: bf16, full size, the tiles that are shipped.

The rule is tests/kernel_rule.py's.
"""

import pytest
import torch
from torch.testing import assert_close

from tests.kernel_rule import SAME_BITS, check_attention, packed_documents, results
from triton_kernels import launch
from triton_kernels.attention import attention


@pytest.fixture(autouse=True)
def exact_torch():
    """PyTorch's side in full fp32: no TF32 in its products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(B, T, H, D, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(
        torch.randn(shape, device="cuda", generator=generator).to(dtype)
        for shape in ((B, T, 3, H, D), (B, T, H, D))
    )


@pytest.mark.parametrize("D", [5, 16, 32, 64, 80, 128])
@pytest.mark.parametrize("T", [63, 257, 1024])
def test_matches_reference(T, D):
    check_attention(*make(2, T, 3, D))


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("T, H, D", [(1, 1, 64), (257, 3, 64), (1000, 2, 128)])
def test_matches_reference_in_every_dtype(T, H, D, dtype):
    check_attention(*make(2, T, H, D, dtype))


@pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
@pytest.mark.parametrize("T, mean", [(257, 20), (1024, 100), (1000, 700), (4096, 500)])
def test_packed_documents(T, mean, dtype):
    check_attention(*make(2, T, 2, 64, dtype), packed_documents(2, T, mean=mean).cuda())


def test_left_padding():
    padding = torch.tensor([[0], [100], [999]], dtype=torch.int32, device="cuda").expand(3, 1000)
    check_attention(*make(3, 1000, 2, 64), padding)


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
    check_attention(*make(B, T, H, D), rows={0, B - 1})


def test_offsets_beyond_int32():
    """The last rows of a packed batch of more than 2^31 elements."""
    B = 2**31 // (1024 * 3 * 12 * 64) + 2
    qkv = torch.empty(B, 1024, 3, 12, 64, dtype=torch.bfloat16, device="cuda")
    few, dout = make(2, 1024, 12, 64)
    qkv[-2:] = few
    qkv[:-2] = few[:1]
    dout = torch.cat([dout[:1].expand(B - 2, -1, -1, -1), dout])
    expected = results(attention, [few], [dout[-2:]])
    assert_close([r[-2:] for r in results(attention, [qkv], [dout])], expected, **SAME_BITS)


def test_same_bits_every_time():
    qkv, dout = make(8, 1024, 12, 64)
    first = results(attention, [qkv], [dout])
    for _ in range(5):
        assert_close(results(attention, [qkv], [dout]), first, **SAME_BITS)


def test_doc_start_is_read_in_anomaly_mode_only():
    qkv, _ = make(1, 20, 1, 64)
    beyond = torch.full((1, 20), 20, dtype=torch.int32, device="cuda")
    assert attention(qkv, doc_start=beyond).eq(0).all()
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(ValueError, match="doc_start holds 20"):
            attention(qkv, doc_start=beyond)
