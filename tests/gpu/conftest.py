"""What the tests of this folder have in common: they need a GPU, and kernels that are compiled.

TRITON_INTERPRET=0 python -m pytest -m gpu tests/gpu
"""

from pathlib import Path

import pytest
import torch

from triton_kernels import launch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    able = torch.cuda.is_available() and not launch.INTERPRETED
    reason = "needs a CUDA or ROCm device and TRITON_INTERPRET=0"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not able, reason=reason))
