"""Several processes on one machine, over gloo, started by torchrun as a user would."""

import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.checkpoint import load_model
from gpt2.data import TokenLoader, write_shard
from gpt2.train.pretrain import pretrain

from .conftest import losses

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_gpt2.py"


def torchrun(n: int, port: int, config) -> subprocess.CompletedProcess:
    options = [f"--{k}={v}" for k, v in asdict(config).items() if v is not None and v != ""]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
        "--master-port", str(port), str(SCRIPT), *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


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
def test_exact_reduction_is_bit_identical_for_any_number_of_ranks(train_config, free_port):
    config = replace(
        train_config, micro_batch_size=2, exact_reduction=True, dropout=0.1, schedule="constant"
    )
    pretrain(replace(config, run_name="one"))
    done = torchrun(2, free_port, replace(config, run_name="two", max_steps=4))
    assert done.returncode == 0, done.stderr
    out = Path(train_config.out_dir)
    # Two steps on one rank are left, after four on two.
    pretrain(replace(config, run_name="two", resume="auto"))
    assert losses(out / "two") == losses(out / "one")
    assert losses(out / "two", "train/grad_norm") == losses(out / "one", "train/grad_norm")
    one, two = (dict(load_model(out / run).named_parameters()) for run in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.ddp
def test_triton_kernels_under_ddp(train_config, free_port):
    """Interpreted (TRITON_INTERPRET is in the environment), against torch's on one rank."""
    config = replace(train_config, max_steps=2, micro_batch_size=2, eval_every=0)
    pretrain(replace(config, run_name="torch", kernels="torch"))
    done = torchrun(2, free_port, replace(config, run_name="triton", kernels="triton"))
    assert done.returncode == 0, done.stderr
    assert "kernels               triton (asked for)" in done.stdout
    out = Path(train_config.out_dir)
    assert losses(out / "triton") == pytest.approx(losses(out / "torch"), rel=1e-4)


@pytest.mark.ddp
def test_bad_input_ends_all_ranks(train_config, free_port):
    done = torchrun(2, free_port, replace(train_config, tokens_per_step=384))
    assert done.returncode != 0
    # The first rank to end may end the others before they have said the same.
    assert re.search(r"error \(rank \d\): tokens_per_step 384 does not divide", done.stderr)
    assert not Path(train_config.out_dir).exists()


@pytest.mark.ddp
def test_a_rank_that_fails_alone_ends_the_run(train_config, free_port, tmp_path):
    """Only rank 1 meets the bad token; rank 0 must not wait for it for ever."""
    data = tmp_path / "bad"
    data.mkdir()
    (data / "manifest.json").write_text('{"tokenizer": {"name": "byte"}}')
    tokens = np.arange(2000) % 250
    tokens[1000] = 300
    write_shard(data / "train_000000.bin", tokens)

    def first_to_meet_it(seed: int) -> int:
        loader = TokenLoader(data / "train_000000.bin", 32, seed)
        for step in range(100):
            ranks = [r for r in (0, 1) if (torch.stack(loader.batch(step, 8, r, 2)) == 300).any()]
            if ranks:
                return ranks[0] if len(ranks) == 1 else -1
        return -1

    seed = next(seed for seed in range(100) if first_to_meet_it(seed) == 1)
    done = torchrun(
        2, free_port, replace(train_config, data=str(data), seed=seed, max_steps=99, eval_every=0)
    )
    assert done.returncode != 0
    assert "error (rank 1): shard" in done.stderr and "token 1000 is 300" in done.stderr
