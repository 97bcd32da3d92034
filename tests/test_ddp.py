"""Several processes on one machine, over gloo, started by torchrun as a user would."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gpt2.train.pretrain import pretrain

from .conftest import losses

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_gpt2.py"


def torchrun(n: int, port: int, config) -> subprocess.CompletedProcess:
    options = [f"--{k}={v}" for k, v in asdict(config).items() if v is not None and v != ""]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
        "--master-port", str(port), str(SCRIPT), *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.ddp
def test_two_ranks_give_the_losses_of_one(train_config, free_port):
    """Same global batch: equal to the order of additions, in training and validation."""
    one, two = replace(train_config, run_name="one"), replace(train_config, run_name="two")
    one = replace(one, micro_batch_size=2)
    two = replace(two, micro_batch_size=2)
    pretrain(one)
    done = torchrun(2, free_port, two)
    assert done.returncode == 0, done.stderr
    assert "2 ranks x 2 micro steps x 2 rows x 32" in done.stdout
    out = Path(train_config.out_dir)
    assert losses(out / "two") == pytest.approx(losses(out / "one"), rel=1e-5)
    assert losses(out / "two", "val/loss") == pytest.approx(
        losses(out / "one", "val/loss"), rel=1e-5
    )
    assert losses(out / "two", "train/grad_norm") == pytest.approx(
        losses(out / "one", "train/grad_norm"), rel=1e-4
    )
    # One rank goes on where two stopped.
    pretrain(replace(one, run_name="two", resume="auto", max_steps=8))
    pretrain(replace(one, resume="auto", max_steps=8))
    assert losses(out / "two") == pytest.approx(losses(out / "one"), rel=1e-5)


@pytest.mark.ddp
def test_bad_input_ends_all_ranks_with_one_line_each(train_config, free_port):
    done = torchrun(2, free_port, replace(train_config, tokens_per_step=384))
    assert done.returncode != 0
    assert done.stderr.count("error (rank 0): tokens_per_step 384 does not divide") == 1
    assert not Path(train_config.out_dir).exists()
