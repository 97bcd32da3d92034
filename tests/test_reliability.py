"""A run that is stopped, poisoned or damaged: nothing is lost, nothing bad is learnt."""

import json
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import checkpoint
from gpt2.checkpoint import list_checkpoints, load_model
from gpt2.config import TrainConfig
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.train.between import HANDLED, Interrupted, StopSignals
from gpt2.train.guard import ENOUGH, PATIENCE, Guard
from gpt2.train.layouts import TreeSum
from gpt2.train.metrics import read_metrics
from gpt2.train.objectives import LanguageModeling
from gpt2.train.optim import make_optimizer
from gpt2.train.pretrain import open_data, pretrain
from gpt2.train.run_folder import RunFolder
from gpt2.train.trainer import Trainer

from .conftest import losses

ALONE = Distributed()


@pytest.fixture
def config(train_config) -> TrainConfig:
    """6 steps with a checkpoint at the end alone."""
    return replace(train_config, eval_every=0, save_every=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in load_model(run, kernels="torch").named_parameters()}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def saved_steps(config: TrainConfig) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(config.folder)]


def test_a_signal_saves_the_step_and_the_same_command_goes_on(train_config, at_step, capfd):
    whole = replace(train_config, run_name="whole", resume="auto")
    cut = replace(whole, run_name="cut")
    pretrain(whole)
    at_step(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        pretrain(cut)
    assert left.value.code == 75 and saved_steps(cut)[-1] == 5  # the step it came in
    out, err = capfd.readouterr()
    assert "stopped at step 5" in out and "go on with --resume auto" in out
    assert "SIGTERM: saving after this step" in err
    pretrain(cut)
    assert losses(cut.folder) == losses(whole.folder)
    assert equal(weights(cut.folder), weights(whole.folder))


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_noted_and_one_that_was_ignored_stays_ignored(number):
    """nohup, and jobs in the background of a script, start with signals ignored."""
    for handler, noted in ((signal.getsignal(number), number.name), (signal.SIG_IGN, None)):
        before = signal.signal(number, handler)
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), number)
                assert signals.received == noted
            assert signal.getsignal(number) == handler
        finally:
            signal.signal(number, before)


def test_a_second_interrupt_stops_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gpt2.train.between.time.monotonic", lambda: now[0])
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # torchrun passes on what its terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        now[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_validation_keeps_the_checkpoint_before_it(config, monkeypatch):
    config = replace(config, eval_steps=0, eval_every=3)
    real, calls = LanguageModeling.forward, []

    def forward(self, batch):
        if not self.training:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(LanguageModeling, "forward", forward)
        pretrain(config)
    assert len(calls) == 2  # it did not go through the rest of the split
    assert saved_steps(config) == [3]
    pretrain(replace(config, resume="auto"))
    assert len(losses(config.folder, "val/loss")) == 2


def test_running_out_of_memory_in_validation_costs_nothing(config, monkeypatch):
    def mean_losses(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "mean_losses", mean_losses)
    with pytest.raises(ValueError, match="lower micro_batch_size"):
        pretrain(replace(config, eval_every=2))
    assert saved_steps(config) == [2]


@pytest.fixture
def poison(config, monkeypatch):
    """poison(step, row) makes the loss and gradients of each batch with that row NaN."""
    rows = []

    class Poisoned(LanguageModeling):
        def forward(self, batch):
            loss_sum, metrics = super().forward(batch)
            is_bad = any((batch["idx"] == row).all(1).any() for row in rows)
            return loss_sum * (math.nan if is_bad else 1.0), metrics

    def add(step: int, row: int) -> None:
        data = open_data(config, "train", config.block_size)
        batch = data.batch(step, config.tokens_per_step // config.block_size)[0]
        rows.append(batch[row].clone())

    monkeypatch.setattr("gpt2.train.pretrain.LanguageModeling", Poisoned)
    add.rows = rows
    return add


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_nan_costs_one_step_and_the_document_is_named(config, poison, capsys, optimizer):
    poison(3, 5)
    pretrain(replace(config, optimizer=optimizer, save_every=1, keep_last=0, max_steps=8))
    before, after, later = list_checkpoints(config.folder)[2:5]
    assert equal(weights(before), weights(after)) and not equal(weights(after), weights(later))
    moments = [load_file(path / checkpoint.OPTIMIZER) for path in (before, after)]
    assert equal(*moments) and all(v.isfinite().all() for v in moments[1].values())
    lines = read_metrics(config.folder / "metrics.jsonl")
    (event,) = [line for line in lines if "guard/skipped" in line]
    assert event["step"] == 4 and event["guard/reason"].startswith("not finite")
    (named,) = event["guard/rows"]
    assert (named["rank"], named["row"], named["loss"]) == (0, 5, "nan")
    assert "train_000000.bin token" in named["documents"][0]
    assert len(losses(config.folder)) == 7 and all(map(math.isfinite, losses(config.folder)))
    assert "step      3  skipped: not finite" in capsys.readouterr().out


def test_only_nans_end_the_run(config, poison):
    for step in range(2, 30):
        poison(step, 0)
    with pytest.raises(ValueError, match="10 steps in a row were not finite, the last one step 11"):
        pretrain(replace(config, max_steps=3 * PATIENCE))
    assert saved_steps(config) == [12]  # the good steps before are not lost
    assert all(p.isfinite().all() for p in weights(config.folder).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rollback_goes_back_and_skips_the_data(config, poison, at_step, optimizer):
    """What follows equals a run that never had those batches."""
    config = replace(
        config, optimizer=optimizer, max_steps=12, guard="rollback", snapshot_every=3,
        schedule="constant", warmup_steps=0,
    )  # fmt: skip
    poison(7, 2)
    pretrain(config)
    events = read_metrics(config.folder / "metrics.jsonl")
    (skipped,) = [line for line in events if "guard/skipped" in line]
    assert (skipped["step"], skipped["guard/step"]) == (3, 8)  # the steps between are trained anew
    assert [line["step"] for line in events if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in events if "guard/rolled_back_from" in line] == [3]
    state = checkpoint.read_checkpoint(config.folder).state
    assert state["offset"] == 5 * 8  # rows: step 3 has the batch of step 8
    # By hand: three steps, then on with an offset.
    poison.rows.clear()
    by_hand = replace(config, run_name="by_hand", max_steps=3)
    pretrain(by_hand)
    at_step(3, lambda trainer: setattr(trainer, "offset", 5 * 8))
    pretrain(replace(by_hand, max_steps=12, resume="auto"))
    assert equal(weights(config.folder), weights(by_hand.folder))


def test_rollback_right_after_a_resume(config, poison):
    """Before the first snapshot that is due there is that of the launch."""
    config = replace(config, max_steps=3, guard="rollback")
    pretrain(config)
    poison(4, 1)
    pretrain(replace(config, resume="auto", max_steps=6))
    found = checkpoint.read_checkpoint(config.folder)
    assert found.step == 6 and found.state["offset"] == 2 * 8  # back to step 3, past step 4's rows
    lines = read_metrics(config.folder / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # of what was left, none


@pytest.mark.parametrize(
    "save_every, snapshot_every, offsets",
    [(1, 3, [0, 0, 5, 5, 5, 5, 5, 5, 5]), (3, 2, [0, 4, 4])],  # back to step 3, and to step 4
)
def test_what_was_left_by_a_rollback_is_saved_anew(
    config, poison, save_every, snapshot_every, offsets
):
    options = dict(guard="rollback", save_every=save_every, snapshot_every=snapshot_every)
    poison(7, 2)
    pretrain(replace(config, keep_last=0, max_steps=9, **options))
    saved = map(checkpoint.read_checkpoint, list_checkpoints(config.folder))
    assert [found.state["offset"] for found in saved] == [8 * steps for steps in offsets]


def test_stop_policy_saves_and_says_which_step(config, poison):
    config = replace(config, guard="stop")
    poison(3, 0)
    with pytest.raises(ValueError, match="step 3 was skipped as not finite"):
        pretrain(config)
    assert saved_steps(config) == [4]
    pretrain(replace(config, resume="auto"))
    assert saved_steps(config) == [4, 6]


def judge(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    skip = guard.judge(step, torch.tensor(loss), torch.tensor(norm))
    guard.verdicts()
    return bool(skip)


def test_spikes_are_skipped_and_a_new_level_is_learnt():
    guard = Guard(ALONE)
    noise = [3.0 + 0.1 * math.sin(7 * i) for i in range(400)]
    assert not any(judge(guard, i, noise[i]) for i in range(100))
    assert judge(guard, 100, 4.0)
    assert judge(guard, 101, math.nan) and judge(guard, 102, math.inf)
    assert judge(guard, 103, 3.0, norm=math.nan)
    assert not judge(guard, 104, 3.05)
    # None of it entered the statistics.
    assert guard.limit(106) < 3.6
    level = [judge(guard, 110 + i, 5.0 + noise[i] / 100) for i in range(ENOUGH + 40)]
    # One more than PATIENCE, since limits follow two steps later.
    assert level == [True] * (PATIENCE + 1) + [False] * (ENOUGH + 39 - PATIENCE)
    assert 5.0 < guard.limit(110 + len(level)) < 5.5


def test_a_resumed_guard_decides_as_the_uninterrupted_one():
    values = [3.0 + 0.01 * math.sin(i * i) + (i % 50 == 40) for i in range(200)]
    values[141:] = [2.0 * value for value in values[141:]]  # a new level, and a spike above it
    whole, cut = Guard(ALONE), Guard(ALONE)
    expected = [judge(whole, i, v) for i, v in enumerate(values)]
    decided = []
    for i, v in enumerate(values):
        if i % 7 == 3:  # reading at a save comes earlier than it would
            cut.verdicts(all_steps=True)
            state, cut = json.loads(json.dumps(cut.state_dict())), Guard(ALONE)
            cut.load_state_dict(state)
        decided.append(judge(cut, i, v))
    assert decided == expected and True in expected


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 6, 8, 12])
def test_tree_sum_is_the_same_for_every_split(micro_batches):
    torch.manual_seed(1)
    leaves = [[torch.randn(50) * 10**i] for i in range(micro_batches)]

    def all_ranks(world_size: int) -> torch.Tensor:
        sums, per_rank = [], micro_batches // world_size
        for rank in range(world_size):
            tree = TreeSum(micro_batches, rank, world_size)
            for (leaf,) in leaves[rank * per_rank : (rank + 1) * per_rank]:
                tree.add([leaf.clone()])
            ((_, (total,)),) = tree.stack
            sums.append(total)
        while len(sums) > 1:
            sums = [x + y for x, y in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    power = micro_batches & -micro_batches
    expected = all_ranks(1)
    torch.testing.assert_close(expected, sum(leaf for (leaf,) in leaves), rtol=1e-5, atol=1e-8)
    for world_size in (2, 4, 8):
        if world_size <= power:
            assert torch.equal(all_ranks(world_size), expected)
        else:
            with pytest.raises(ValueError, match="exact_reduction"):
                all_ranks(world_size)


def test_exact_reduction_trains_as_the_plain_sum_does(config):
    exact = replace(config, run_name="exact", exact_reduction=True)
    pretrain(config)
    pretrain(exact)
    assert losses(exact.folder) == pytest.approx(losses(config.folder), rel=1e-5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(config, capsys):
    config = replace(config, save_every=3, keep_last=0)
    pretrain(config)
    newest = list_checkpoints(config.folder)[-1]
    flip(newest / "model.safetensors")
    capsys.readouterr()
    pretrain(replace(config, resume="auto"))
    out = capsys.readouterr().out
    assert "damaged, trying the one before it" in out and "model.safetensors" in out
    assert "from step 3" in out and "aside_step_00000006" in out
    assert checkpoint.newest_good(config.folder).step == 6
    assert (config.folder / "checkpoints" / "latest").resolve() == newest.resolve()
    for path in list_checkpoints(config.folder):
        flip(path / "optimizer.safetensors")
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        pretrain(replace(config, resume="auto"))


def test_a_full_disk_stops_training_only_if_asked_to(config, monkeypatch, capsys):
    config, real = replace(config, save_every=2), checkpoint.write_checkpoint

    def full_at_4(run, step, *args, **options):
        if step == 4:
            raise OSError(28, "No space left on device", "model.safetensors")
        return real(run, step, *args, **options)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full_at_4)
    pretrain(config)
    assert "NOT saved: No space left on device" in capsys.readouterr().out
    assert saved_steps(config) == [2, 6]
    stops = replace(config, run_name="stops", on_save_error="stop")
    last = replace(config, run_name="last", max_steps=4)  # with no later one
    for refused in (stops, last):
        with pytest.raises(OSError, match="No space left"):
            pretrain(refused)
        assert saved_steps(refused) == [2]


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch, capsys):
    """And what is written is the state of the step that was asked for."""
    model, config = GPT(tiny, "torch"), TrainConfig(warmup_steps=0)
    optimizer = make_optimizer(model, config)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    expected = {k: v.detach().clone() for k, v in model.named_parameters()}
    may_write, real = threading.Event(), checkpoint.write_checkpoint

    def slow(*args, **kwargs):
        assert may_write.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    with RunFolder(tmp_path) as folder:
        folder.begin(config, {"data": []}, None)
        folder.open(config, 0, ALONE, {}, {})
        options = dict(tokenizer={"name": "byte"}, state={}, chat_template=None)
        folder.save(7, model, optimizer, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        folder.poll()
        assert "saved" not in capsys.readouterr().out
        may_write.set()
        folder.close(7, "stopped")
    assert "step      7" in capsys.readouterr().out and equal(expected, weights(tmp_path))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.keys() == {"step", "checkpoint/held_ms", "checkpoint/write_ms"}
