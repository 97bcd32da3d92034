"""Which precision a device is given."""

import pytest
import torch

from gpt2 import device


@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.parametrize(
    "dtype, expected",
    [("auto", False), ("fast", None), ("float32", False), ("bfloat16", True)],
)
def test_a_cpu_computes_in_bfloat16_only_where_asked(monkeypatch, dtype, expected, has_it):
    """fast asks for it where the processor has it, auto never; who could have it is told."""
    monkeypatch.setattr(device, "has_fast_bfloat16", lambda _: has_it)
    run = device.execution(torch.device("cpu"), dtype)
    in_bfloat16 = has_it if expected is None else expected
    assert run.dtype == (torch.bfloat16 if in_bfloat16 else torch.float32)
    assert ("--dtype fast" in run.describe()) == (has_it and not in_bfloat16)
