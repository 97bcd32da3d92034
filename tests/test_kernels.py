"""The contract of every operation of triton_kernels, on a CPU."""

import pytest
import torch

import triton_kernels
from tests.kernel_contract import *  # noqa: F403 - its tests run here
from triton_kernels import launch

pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED, reason="kernels are compiled: tests/gpu has the same tests on a GPU"
)


@pytest.fixture
def device() -> str:
    return "cpu"


def test_compiled_kernels_refuse_a_cpu(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="qkv is on cpu.*TRITON_INTERPRET=1"):
        triton_kernels.attention(torch.zeros(2, 5, 3, 2, 16))
