"""The contract of every operation of triton_kernels, compiled."""

import pytest

from tests.kernel_contract import *  # noqa: F403 - its tests run here


@pytest.fixture
def device() -> str:
    return "cuda"
