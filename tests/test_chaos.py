"""A small share of `make chaos`: runs killed, stopped and damaged at random moments."""

import subprocess
import sys
from pathlib import Path

import pytest

DDP, SLOW = pytest.mark.ddp, pytest.mark.slow


@pytest.mark.parametrize(
    "name, count",
    [
        pytest.param("kill", 6, marks=DDP), ("term", 5), ("flip", 100),
        pytest.param("lost", 2, marks=DDP), pytest.param("restart", 1, marks=[DDP, SLOW]),
    ],
)  # fmt: skip
def test_runs_survive(name, count):
    script = Path(__file__).with_name("chaos.py")
    command = [sys.executable, str(script), name, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name:<9} {count:>4} of {count:<4} " in done.stdout
