"""A small share of `make chaos`: runs killed, stopped, poisoned and damaged at random moments."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "chaos.py"


def attempts(*words: str) -> str:
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ddp
def test_killed_at_random_moments():
    assert "kill         6 of 6 " in attempts("kill", "--count", "6")


def test_stopped_and_damaged_at_random_moments():
    out = attempts("term", "flip", "--count", "5")
    assert "term         5 of 5 " in out and "flip         5 of 5 " in out


@pytest.mark.ddp
def test_poisoned_rows_and_lost_ranks():
    out = attempts("nan", "lost", "--count", "2")
    assert "nan          2 of 2 " in out and "lost         2 of 2 " in out


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_killed_under_torchrun():
    assert "restart      1 of 1 " in attempts("restart", "--count", "1")
