"""A small share of `make chaos`: runs killed, stopped, poisoned and damaged at random moments."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "chaos.py"
DDP, SLOW = pytest.mark.ddp, pytest.mark.slow


@pytest.mark.parametrize(
    "names, count",
    [
        pytest.param(["kill"], 6, marks=DDP), (["term"], 5), (["flip"], 200),
        pytest.param(["nan", "lost"], 2, marks=DDP),
        pytest.param(["restart"], 1, marks=[DDP, SLOW]),
    ],
)  # fmt: skip
def test_runs_survive(names, count):
    command = [sys.executable, str(SCRIPT), *names, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert f"{name:<9} {count:>4} of {count:<4} " in done.stdout
