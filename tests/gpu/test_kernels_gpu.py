"""The contract of every operation of triton_kernels, compiled.

TRITON_INTERPRET=0 pytest -m gpu tests/gpu
"""

import pytest
import torch

from tests.kernel_contract import *  # noqa: F403 - its tests run here
from triton_kernels import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or launch.INTERPRETED,
        reason="needs a CUDA or ROCm device and TRITON_INTERPRET=0",
    ),
]


@pytest.fixture
def device() -> str:
    return "cuda"
