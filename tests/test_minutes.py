"""max_minutes, by a clock that the tests set: no test depends on how fast the machine is."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2.checkpoint import list_checkpoints, load_model, read_checkpoint
from gpt2.cli import parse
from gpt2.config import SFTConfig, TrainConfig
from gpt2.dist import Distributed
from gpt2.train import minutes, size
from gpt2.train.between import learning_rate
from gpt2.train.pretrain import pretrain

from .conftest import interrupt, losses


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) makes each look at the clock come so many seconds after the one before."""

    def set_clock(seconds: float) -> None:
        ticks = itertools.count()
        monkeypatch.setattr(minutes, "clock", lambda: next(ticks) * seconds)

    set_clock(1.0)
    return set_clock


@pytest.fixture
def timed(train_config, clock) -> TrainConfig:
    """Every look at the clock is a second later, so each step and all else takes one: of 36 seconds
    9 are gone before step 0, and 3 are for a sample and copies at the end."""
    return replace(
        train_config, max_minutes=0.6, warmup_steps=None, eval_every=0, save_every=0, log_every=1
    )


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    path = list_checkpoints(config.folder)[-1]
    return dict(load_model(path, kernels="torch").named_parameters())


def same(a: TrainConfig, b: TrainConfig) -> bool:
    one, other = weights(a), weights(b)
    return all(torch.equal(one[name], other[name]) for name in one) and all(
        losses(a.folder, key) == losses(b.folder, key) for key in ("train/loss", "train/lr")
    )


@pytest.mark.parametrize(
    "max_steps, given, found",
    [(1000, None, 40), (19073, None, 700), (32000, None, 700), (6, None, 0), (1000, 100, 100)],
)
def test_warmup_follows_max_steps_unless_it_is_given(max_steps, given, found):
    config = TrainConfig(max_steps=max_steps, warmup_steps=given)
    assert config.warmup == found
    assert learning_rate(found, config) == config.lr
    assert SFTConfig(max_steps=1000).warmup == 0


@pytest.mark.parametrize(
    "seconds, step_s, others, steps",
    [
        (100, 2, [], 50),
        (100, 2, [(0, 10)], 45),  # only at the end
        (110, 2, [(10, 10)], 33),  # three times, and at the end: 66 + 40 seconds
        (106, 2, [(10, 10), (0, 6)], 30),
        (-5, 2, [], -2),
    ],
)
def test_steps_that_fit_leave_room_for_what_comes_between(seconds, step_s, others, steps):
    assert minutes.steps_within(seconds, step_s, others) == steps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "dropout": 0.2, "guard": "rollback"},
        {"eval_every": 5, "sample_every": 5, "save_every": 5, "exact_reduction": True},
    ],
)
def test_what_is_timed_leaves_no_trace_but_max_steps(timed, changes):
    config = replace(timed, max_minutes=1.0, **changes)
    pretrain(config)
    saved = read_checkpoint(list_checkpoints(config.folder)[-1])
    steps = saved.step
    assert steps == saved.train["max_steps"] > minutes.LEAST_STEPS
    assert parse(TrainConfig, "", [str(config.folder / "config.yaml")]).max_steps == steps
    given = replace(config, max_minutes=0.0, max_steps=steps, run_name="given")
    pretrain(given)
    assert same(config, given)
    assert losses(config.folder, "val/loss") == losses(given.folder, "val/loss")
    # The rate has come to its end.
    assert losses(config.folder, "train/lr")[-1] < 0.02 * config.lr


def test_everything_that_takes_time_is_counted(timed, clock, capsys):
    pretrain(timed)
    plain = read_checkpoint(list_checkpoints(timed.folder)[-1]).step
    assert plain == 36 - 9 - 3
    every = replace(timed, run_name="every", max_minutes=2.0, eval_every=10, sample_every=20)
    clock(1.0)
    pretrain(every)
    # A validation or a sample takes a second, with a copy for a checkpoint two.
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("minutes  "))
    assert "24 steps of 1,000.0 ms" in line
    found = read_checkpoint(list_checkpoints(every.folder)[-1]).step
    assert found == int((120 - 15 - 1 - 2 - 2) / (1 + 2 / 10 + 2 / 20))


def test_a_resumed_run_keeps_its_steps(timed, clock, at_step):
    """However fast the machine is then; before the first checkpoint there is nothing to keep."""
    pretrain(timed)
    cut = replace(timed, run_name="cut", save_every=10)
    at_step(0, interrupt)  # while steps are timed
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut)
    assert not list_checkpoints(cut.folder)
    cut = replace(cut, resume="auto")
    at_step(13, interrupt)
    clock(1.0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut)
    clock(0.01)
    pretrain(cut)
    whole = replace(timed, run_name="whole", max_minutes=0, max_steps=len(losses(cut.folder)))
    pretrain(whole)
    assert same(cut, whole)
    # The launch before had taken 10 steps and what is before step 0.
    assert read_checkpoint(list_checkpoints(cut.folder)[-1]).state["spent_s"] > 17


def test_a_run_that_gets_slower_keeps_its_steps_and_says_when_it_ends(
    timed, clock, at_step, capsys
):
    at_step(5, lambda trainer: setattr(trainer, "spent_s", 100.0))
    pretrain(timed)
    lines = [x for x in capsys.readouterr().out.splitlines() if "after max_minutes" in x]
    assert len(lines) == 19 and "step      6/24" in lines[0]
    # Of 36 seconds 100 and more than 9 are gone; steps take none by the true clock.
    assert re.search(r"ETA 0:00:00, 0:01:[12]\d after max_minutes$", lines[0])
    assert len(losses(timed.folder)) == 24


def test_max_minutes_that_cannot_be_met_are_refused(timed, clock):
    clock(2.0)
    with pytest.raises(ValueError, match="max_minutes 0.6 holds 6 steps of 2 s .*a schedule"):
        pretrain(timed)
    assert not list_checkpoints(timed.folder)
    slow = replace(timed, tokens_per_step=1 << 26, max_minutes=0.001)
    with pytest.raises(ValueError, match="max_minutes 0.001 holds 0 steps of"):
        pretrain(slow)
    clock(1.0)
    with pytest.raises(ValueError, match="warmup_steps 25 must not be above max_steps 24"):
        pretrain(replace(timed, warmup_steps=25, max_steps=30))
    pretrain(timed)
    with pytest.raises(ValueError, match="max_minutes 2: the run began with 0.6 and the max_steps"):
        pretrain(replace(timed, max_minutes=2.0, resume="auto"))
    pretrain(replace(timed, max_minutes=0.0, max_steps=26, resume="auto"))
    assert len(losses(timed.folder)) == 26


def test_old_checkpoints_keep_their_warmup(train_config):
    pretrain(train_config)
    pretrain(replace(train_config, warmup_steps=None, max_steps=8, resume="auto"))
    saved = json.loads((list_checkpoints(train_config.folder)[-1] / "checkpoint.json").read_text())
    assert saved["train"]["warmup_steps"] == train_config.warmup_steps
    assert Path(train_config.folder / "config.yaml").read_text().count("warmup_steps: 2\n") == 1


@pytest.fixture
def machine(monkeypatch):
    """machine(flops) makes every matmul run at that rate."""

    def set_rate(flops: float) -> None:
        monkeypatch.setattr(size, "measure_rates", lambda *args: (flops, 1e9))

    set_rate(1e11)
    return set_rate


@pytest.mark.parametrize(
    "max_minutes, flops, n_tokens, vocab_size, width",
    [
        (30, 1e11, 1 << 40, 65, 128),
        (30, 1e11, 100_000, 65, 64),  # less text
        (600, 1e11, 1 << 40, 65, 192),  # more time
        (30, 1e11, 1 << 40, 50257, 64),  # as many numbers in the embedding alone
        (0.01, 1e9, 1 << 40, 65, 64),  # never less
        (600, 4e14, 1 << 40, 50257, 768),
    ],
)
def test_auto_takes_the_largest_model_that_gets_enough_tokens(
    machine, monkeypatch, max_minutes, flops, n_tokens, vocab_size, width
):
    machine(flops)
    monkeypatch.setattr(size, "open_split", lambda *_: SimpleNamespace(n_tokens=n_tokens))
    monkeypatch.setattr(size, "find_tokenizer", lambda _: SimpleNamespace(vocab_size=vocab_size))
    config = TrainConfig(preset="auto", max_minutes=max_minutes)
    group = Distributed(0, 1, torch.device("cpu"))
    found, lines = size.choose_size(config, group)
    assert found.n_embd == width and f"auto: {found.n_layer} layers, {width} wide" in lines[0]
    assert found.optimizer == "muon" and found.lr == pytest.approx(6e-3 * (128 / width) ** 0.5)
    # What is given holds.
    given = replace(config, optimizer="adamw", lr=1e-3, tokens_per_step=4096, block_size=32)
    found, _ = size.choose_size(given, group)
    kept = found.optimizer, found.lr, found.tokens_per_step, found.block_size
    assert kept == ("adamw", 1e-3, 4096, 32)


def test_auto_is_chosen_once(timed, machine, capsys):
    config = replace(
        timed, preset="auto", n_layer=None, n_head=None, n_embd=None, lr=None, optimizer=None,
        tokens_per_step=None,
    )  # fmt: skip
    pretrain(config)
    assert "auto: 2 layers, 64 wide" in capsys.readouterr().out
    written = parse(TrainConfig, "", [str(config.folder / "config.yaml")])
    assert (written.n_embd, written.optimizer, written.preset) == (64, "muon", "auto")
    machine(1e15)
    pretrain(replace(config, resume="auto"))
    assert "auto: " not in (out := capsys.readouterr().out) and "64 wide" in out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "gpt2", "max_minutes": 1, "lr_range_test": True}, "leave max_minutes out"),
        ({}, "preset auto chooses a size for the minutes"),
        ({"max_minutes": 1, "n_embd": 64}, "give all of them or none, not only n_embd"),
    ],
)
def test_options_that_contradict_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"preset": "auto"} | changes)
