"""Shared fixtures. Data are consecutive integers or real Shakespeare, models are tiny."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import signal
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from gpt2.config import GPTConfig, TrainConfig
from gpt2.data import write_shard
from gpt2.data.prepare import prepare
from gpt2.options import PrepareConfig

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=65, bias=True)


# A job in the background of a script is started with SIGINT ignored, one under nohup with SIGHUP;
# programs that the tests start would inherit that.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)
):  # fmt: skip
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
# Tiny tensors gain nothing from a second thread, and on a busy machine lose by waiting for it.
torch.set_num_threads(1)


# The same examples each time, so that a failure is the change's; run
# `pytest --hypothesis-profile=default` to look for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture
def tiny() -> GPTConfig:
    return TINY


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory) -> Path:
    """tiny Shakespeare as characters: 1,003,854 train and 111,540 val tokens."""
    out = tmp_path_factory.mktemp("data") / "shakespeare_char"
    return prepare(PrepareConfig(name="shakespeare_char", out=str(out)))


@pytest.fixture
def counting(tmp_path) -> Path:
    """Shards of consecutive integers: train 0..999 in two shards, val 1000..1199."""
    folder = tmp_path / "counting"
    folder.mkdir()
    write_shard(folder / "train_000000.bin", np.arange(0, 600))
    write_shard(folder / "train_000001.bin", np.arange(600, 1000))
    write_shard(folder / "val_000000.bin", np.arange(1000, 1200))
    return folder


@pytest.fixture
def train_config(shakespeare, tmp_path) -> TrainConfig:
    """A run of a few seconds on a CPU."""
    return TrainConfig(
        preset="char", n_layer=2, n_head=2, n_embd=32, block_size=32, data=str(shakespeare),
        tokens_per_step=256, micro_batch_size=4, max_steps=6, warmup_steps=2, lr=1e-2,
        eval_every=3, eval_steps=2, save_every=3, log_every=1, run_name="run",
        out_dir=str(tmp_path / "runs"), device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; skips where it is not."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("GPT2_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"needs the real data in {default} (GPT2_SHARED_DATA names another folder)")
    return path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, act) makes runs call act(trainer) before they start on a step, once."""
    from gpt2.train.trainer import Trainer

    real, acts = Trainer.train_step, {}

    def train_step(self, step):
        acts.pop(step, lambda trainer: None)(self)
        return real(self, step)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return acts.__setitem__


def interrupt(trainer) -> None:
    raise KeyboardInterrupt


def losses(run: Path, key: str = "train/loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def write_rows(path: Path, rows: list) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def equal(a, b) -> bool:
    """Whether two batches are."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def command_line(config) -> list[str]:
    """A config as the options of its script."""
    words = []
    for key, value in asdict(config).items():
        if isinstance(value, tuple):
            words += [f"--{key}", *map(str, value)]
        elif value is not None and value != "":
            words.append(f"--{key}={value}")
    return words


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
