"""A run that is stopped, poisoned or damaged: nothing is lost, nothing bad is learnt."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import checkpoint
from gpt2.checkpoint import list_checkpoints, load_model
from gpt2.dist import Distributed
from gpt2.train.guard import ENOUGH, PATIENCE, Guard
from gpt2.train.layouts import TreeSum
from gpt2.train.metrics import read_metrics
from gpt2.train.objectives import LanguageModeling
from gpt2.train.pretrain import pretrain
from gpt2.train.saver import Saver
from gpt2.train.signals import Interrupted, StopSignals

from .conftest import losses

ALONE = Distributed()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in load_model(run, kernels="torch").named_parameters()}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def at_step(stop: int, act):
    """Patches train_step to call act before it starts on a step, once."""
    from gpt2.train.trainer import Trainer

    real, done = Trainer.train_step, []

    def train_step(self, step):
        if step == stop and not done:
            done.append(step)
            act(self)
        return real(self, step)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "train_step", train_step)
    return patch


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(train_config, number, capfd):
    whole = replace(train_config, run_name="whole", resume="auto")
    pretrain(whole)
    cut = replace(whole, run_name="cut")
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with at_step(4, lambda _: os.kill(os.getpid(), number)).context():
        with pytest.raises(SystemExit) as left:
            pretrain(cut)
    assert left.value.code == 75
    assert handlers == [signal.getsignal(n) for n in SIGNALS]
    run = Path(cut.out_dir) / "cut"
    assert [p.name for p in list_checkpoints(run)][-1] == "step_00000005"  # the step it came in
    out, err = capfd.readouterr()
    assert "stopped at step 5" in out and "go on with --resume auto" in out
    assert f"{signal.Signals(number).name}: saving after this step" in err
    pretrain(cut)
    assert losses(run) == losses(Path(cut.out_dir) / "whole")
    assert equal(weights(run), weights(Path(cut.out_dir) / "whole"))


def test_what_is_ignored_at_the_start_stays_ignored():
    """nohup, and jobs in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_stops_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gpt2.train.signals.time.monotonic", lambda: now[0])
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5  # torchrun passes on what its terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        now[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_validation_keeps_the_checkpoint_before_it(train_config):
    config = replace(train_config, eval_steps=0, save_every=0, eval_every=3)
    real = LanguageModeling.forward
    calls = []

    def forward(self, batch):
        if not self.training:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModeling, "forward", forward)
        with pytest.raises(Interrupted):
            pretrain(config)
    assert len(calls) == 2  # it did not go through the rest of the split
    run = Path(config.out_dir) / "run"
    assert [p.name for p in list_checkpoints(run)] == ["step_00000003"]
    pretrain(replace(config, resume="auto"))
    assert len(losses(run, "val/loss")) == 2


def test_running_out_of_memory_in_validation_costs_nothing(train_config):
    config = replace(train_config, save_every=0, eval_every=2, max_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2.train.trainer.Trainer.mean_losses", raise_out_of_memory)
        with pytest.raises(ValueError, match="lower micro_batch_size"):
            pretrain(config)
    assert checkpoint.read_checkpoint(Path(config.out_dir) / "run").step == 2


def raise_out_of_memory(self):
    raise torch.OutOfMemoryError("CUDA out of memory")


class Poisoned(LanguageModeling):
    """A loss of NaN, with gradients of NaN, where a batch holds certain rows."""

    rows: list[torch.Tensor] = []
    factor = float("nan")

    def forward(self, batch):
        loss_sum, metrics = super().forward(batch)
        for row in self.rows:
            if (batch["idx"] == row).all(1).any():
                loss_sum = loss_sum * self.factor
        return loss_sum, metrics


@pytest.fixture
def poisoned(monkeypatch):
    """Makes pretrain use Poisoned; give it the rows."""
    monkeypatch.setattr("gpt2.train.pretrain.LanguageModeling", Poisoned)
    yield Poisoned
    Poisoned.rows, Poisoned.factor = [], float("nan")


def row_of(config, step: int, row: int) -> torch.Tensor:
    from gpt2.train.pretrain import open_data

    data = open_data(config, "train", config.block_size)
    return data.batch(step, config.tokens_per_step // config.block_size)[0][row].clone()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_nan_costs_one_step_and_the_document_is_named(train_config, poisoned, capsys, optimizer):
    config = replace(
        train_config, optimizer=optimizer, eval_every=0, save_every=1, keep_last=0, max_steps=8
    )
    poisoned.rows = [row_of(config, 3, 5)]
    pretrain(config)
    run = Path(config.out_dir) / "run"
    by_step = {p.name: weights(p) for p in list_checkpoints(run)}
    assert equal(by_step["step_00000003"], by_step["step_00000004"])
    assert not equal(by_step["step_00000004"], by_step["step_00000005"])
    saved = list_checkpoints(run)[2:4]
    moments = [load_file(path / checkpoint.OPTIMIZER) for path in saved]
    assert equal(*moments) and all(v.isfinite().all() for v in moments[1].values())
    lines = read_metrics(run / "metrics.jsonl")
    (event,) = [line for line in lines if "guard/skipped" in line]
    assert event["step"] == 4 and event["guard/reason"].startswith("not finite")
    (named,) = event["guard/rows"]
    assert (named["rank"], named["row"], named["loss"]) == (0, 5, "nan")
    assert "train_000000.bin token" in named["documents"][0]
    assert len(losses(run)) == 7 and all(map(math.isfinite, losses(run)))
    assert "step      3  skipped: not finite" in capsys.readouterr().out


def test_only_nans_end_the_run(train_config, poisoned):
    config = replace(train_config, eval_every=0, save_every=0, max_steps=3 * PATIENCE)
    poisoned.rows = [row_of(config, step, 0) for step in range(2, 30)]
    with pytest.raises(ValueError, match="10 steps in a row were not finite, the last one step 11"):
        pretrain(config)
    run = Path(config.out_dir) / "run"  # the good steps before are not lost
    assert checkpoint.newest_good(run).step == 12
    assert all(p.isfinite().all() for p in weights(run).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rollback_goes_back_and_skips_the_data(train_config, poisoned, optimizer):
    """What follows equals a run that never had those batches."""
    config = replace(
        train_config, optimizer=optimizer, eval_every=0, save_every=0, max_steps=12,
        guard="rollback", snapshot_every=3, schedule="constant", warmup_steps=0,
    )  # fmt: skip
    poisoned.rows = [row_of(config, 7, 2)]
    pretrain(config)
    run = Path(config.out_dir) / "run"
    events = [line for line in read_metrics(run / "metrics.jsonl") if "step" in line]
    (skipped,) = [line for line in events if "guard/skipped" in line]
    assert (skipped["step"], skipped["guard/step"]) == (3, 8)  # the steps between are trained anew
    assert [line["step"] for line in events if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in events if "guard/rolled_back_from" in line] == [3]
    state = checkpoint.read_checkpoint(run).state
    assert state["offset"] == 5 * 8  # rows: step 3 has the batch of step 8
    # By hand: three steps, then on with an offset.
    poisoned.rows = []
    by_hand = replace(config, run_name="by_hand", max_steps=3)
    pretrain(by_hand)
    with at_step(3, lambda trainer: setattr(trainer, "offset", 5 * 8)).context():
        pretrain(replace(by_hand, max_steps=12, resume="auto"))
    assert equal(weights(run), weights(Path(config.out_dir) / "by_hand"))


def test_rollback_right_after_a_resume(train_config, poisoned):
    """Before the first snapshot that is due there is that of the launch."""
    config = replace(train_config, eval_every=0, save_every=0, max_steps=3, guard="rollback")
    pretrain(config)
    poisoned.rows = [row_of(config, 4, 1)]
    pretrain(replace(config, resume="auto", max_steps=6))
    found = checkpoint.read_checkpoint(Path(config.out_dir) / "run")
    assert found.step == 6 and found.state["offset"] == 2 * 8  # back to step 3, past step 4's rows
    lines = read_metrics(found.path.parent.parent / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # of what was left, none


@pytest.mark.parametrize(
    "save_every, snapshot_every, offsets",
    [(1, 3, [0, 0, 5, 5, 5, 5, 5, 5, 5]), (3, 2, [0, 4, 4])],  # back to step 3, and to step 4
)
def test_what_was_left_by_a_rollback_is_saved_anew(
    train_config, poisoned, save_every, snapshot_every, offsets
):
    config = replace(
        train_config, eval_every=0, save_every=save_every, keep_last=0, max_steps=9,
        guard="rollback", snapshot_every=snapshot_every,
    )  # fmt: skip
    poisoned.rows = [row_of(config, 7, 2)]
    pretrain(config)
    saved = list_checkpoints(Path(config.out_dir) / "run")
    found = [checkpoint.read_checkpoint(path).state["offset"] for path in saved]
    assert found == [8 * steps for steps in offsets]


def test_stop_policy_saves_and_says_which_step(train_config, poisoned):
    config = replace(train_config, eval_every=0, save_every=0, guard="stop")
    poisoned.rows = [row_of(config, 3, 0)]
    with pytest.raises(ValueError, match="step 3 was skipped as not finite"):
        pretrain(config)
    run = Path(config.out_dir) / "run"
    assert checkpoint.read_checkpoint(run).step == 4
    pretrain(replace(config, resume="auto"))
    assert checkpoint.read_checkpoint(run).step == 6


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
    leaves = [[torch.randn(50) * 10**i, torch.randn(3, 4)] for i in range(micro_batches)]

    def subtree(rank: int, world_size: int) -> list[torch.Tensor]:
        tree = TreeSum(micro_batches, rank, world_size)
        per_rank = micro_batches // world_size
        for leaf in leaves[rank * per_rank : (rank + 1) * per_rank]:
            tree.add([t.clone() for t in leaf])
        ((_, total),) = tree.stack
        return total

    def all_ranks(world_size: int) -> list[torch.Tensor]:
        sums = [subtree(rank, world_size) for rank in range(world_size)]
        while len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
        return sums[0]

    power = micro_batches & -micro_batches
    expected = all_ranks(1)
    for world_size in (2, 4, 8):
        if world_size <= power:
            found = all_ranks(world_size)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            with pytest.raises(ValueError, match="exact_reduction"):
                subtree(0, world_size)
    plain = [sum(leaf[i] for leaf in leaves) for i in (0, 1)]
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(plain, expected, strict=True))


def test_exact_reduction_trains_as_the_plain_sum_does(train_config):
    pretrain(train_config)
    pretrain(replace(train_config, run_name="exact", exact_reduction=True))
    out = Path(train_config.out_dir)
    assert losses(out / "exact") == pytest.approx(losses(out / "run"), rel=1e-5)


def flip(path: Path, byte: int, bit: int) -> bytes:
    good = path.read_bytes()
    bad = bytearray(good)
    bad[byte] ^= 1 << bit
    path.write_bytes(bad)
    return good


def test_every_flipped_bit_is_noticed_and_the_one_before_is_used(train_config, capsys):
    config = replace(train_config, eval_every=0, keep_last=0)
    pretrain(config)
    run = Path(config.out_dir) / "run"
    path = list_checkpoints(run)[-1]
    generator = torch.Generator().manual_seed(5)
    for file in sorted(path.iterdir()):
        for _ in range(30):
            size = file.stat().st_size
            byte = int(torch.randint(size, (), generator=generator))
            good = flip(file, byte, int(torch.randint(8, (), generator=generator)))
            found = checkpoint.newest_good(run)
            assert found.step == 3, (file.name, byte)
            file.write_bytes(good[: size // 2])
            assert checkpoint.newest_good(run).step == 3
            file.write_bytes(good)
    assert checkpoint.newest_good(run).step == 6
    flip(path / "model.safetensors", 1000, 0)
    capsys.readouterr()
    pretrain(replace(config, resume="auto"))
    out = capsys.readouterr().out
    assert "damaged, trying the one before it" in out and "model.safetensors" in out
    assert "from step 3" in out and "aside_step_00000006" in out
    assert checkpoint.newest_good(run).step == 6
    assert (run / "checkpoints" / "latest").resolve() == path.resolve()
    for path in list_checkpoints(run):
        flip(path / "optimizer.safetensors", 1000, 0)
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        pretrain(replace(config, resume="auto"))


def full_disk(*_, **__):
    raise OSError(28, "No space left on device", "model.safetensors")


def test_a_full_disk_stops_training_only_if_asked_to(train_config, monkeypatch, capsys):
    config = replace(train_config, eval_every=0, save_every=2, max_steps=6)
    real = checkpoint.write_checkpoint
    monkeypatch.setattr(
        checkpoint, "write_checkpoint",
        lambda run, step, *a, **k: (full_disk if step == 4 else real)(run, step, *a, **k),
    )  # fmt: skip
    pretrain(config)
    assert "NOT saved: No space left on device" in capsys.readouterr().out
    run = Path(config.out_dir) / "run"
    assert [p.name for p in list_checkpoints(run)] == ["step_00000002", "step_00000006"]
    with pytest.raises(OSError, match="No space left"):
        pretrain(replace(config, run_name="stops", on_save_error="stop"))
    assert checkpoint.newest_good(Path(config.out_dir) / "stops").step == 2


def test_training_goes_on_while_a_checkpoint_is_written(tiny, tmp_path, monkeypatch):
    """And what is written is the state of the step that was asked for."""
    import threading

    from gpt2.config import TrainConfig
    from gpt2.model import GPT
    from gpt2.train.optim import make_optimizer

    model = GPT(tiny, "torch")
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    expected = {k: v.detach().clone() for k, v in model.named_parameters()}
    may_write, saved = threading.Event(), []
    real = checkpoint.write_checkpoint

    def slow(*args, **kwargs):
        assert may_write.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    saver = Saver(
        tmp_path, keep_last=0, keep_going=False,
        on_saved=lambda step, path, times: saved.append((step, path, times)),
        on_failed=lambda step, error: None,
    )  # fmt: skip
    meta = checkpoint.describe(model, tokenizer={"name": "byte"}, train={})
    saver.save(7, model, optimizer, meta)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    saver.poll()
    assert not saved
    may_write.set()
    saver.close()
    ((step, path, times),) = saved
    assert step == 7 and set(times) == {"checkpoint/held_ms", "checkpoint/write_ms"}
    assert equal(expected, weights(path))
