"""Early stopping, and the checkpoint with the lowest validation loss."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2 import checkpoint
from gpt2.assistant import load_assistant
from gpt2.checkpoint import best_checkpoint, list_checkpoints, load_model, load_tokenizer
from gpt2.train.metrics import read_metrics
from gpt2.train.pretrain import pretrain
from gpt2.train.receipt import read_receipt
from gpt2.train.trainer import Trainer

from .conftest import command_line, losses

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(train_config, monkeypatch):
    """run(val, **options) trains with these validation losses, the first one of step 1."""

    def train(val: list[float], **options):
        monkeypatch.setattr(Trainer, "mean_losses", lambda self: {"loss": val[self.step - 1]})
        defaults = dict(eval_every=1, save_every=0, keep_last=1, max_steps=6)
        config = replace(train_config, **defaults | options)
        pretrain(config)
        return config.folder

    return train


def names(folder: Path) -> list[str]:
    return [path.name[-1] for path in list_checkpoints(folder)]


@pytest.mark.parametrize("write_s", [0.0, 0.1])
def test_the_best_checkpoint_stays_and_has_a_name(run, monkeypatch, capsys, write_s):
    """Also where it is judged before it is written."""
    real = checkpoint.write_checkpoint

    def slow(*arguments, **options):
        time.sleep(write_s)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    folder = run([5, 3, 4, 3, float("nan"), 3.5])
    best = folder / "checkpoints" / "best"
    assert names(folder) == ["2", "6"] and best_checkpoint(folder) == list_checkpoints(folder)[0]
    assert f"the best by val loss: {best}, which is step_00000002" in capsys.readouterr().out
    found, named = (load_model(p, kernels="torch") for p in (best, best.with_name("step_00000002")))
    assert all(map(torch.equal, found.state_dict().values(), named.state_dict().values()))
    assert load_tokenizer(best).to_dict() == load_tokenizer(folder).to_dict()
    load_assistant(str(folder))
    said = "step_00000006, the newest of {}; the best by val loss is step_00000002\n"
    assert said.format(folder) in capsys.readouterr().err
    load_assistant(str(best))
    assert capsys.readouterr().err == ""
    run([5, 3, 4, 3, 3, 3.5, 1, 2], resume="auto", max_steps=8)
    assert names(folder) == ["7", "8"] and best_checkpoint(folder).name == "step_00000007"
    run([0] * 9, resume=str(best), max_steps=8)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 8


def test_patience_ends_a_run_and_a_resume_says_so(run, capsys):
    val = [4, 3, float("nan"), 3.5, 1, 1]
    folder = run(val, patience=2, sample_every=3)
    said = "stopped early: no lower val loss than 3.0000 in 2 validations (patience 2)"
    out = capsys.readouterr().out
    assert said in out and "done: 4 steps" in out and out.count("sample: ") == 2
    assert names(folder) == ["2", "4"] and len(losses(folder)) == 4
    end = read_receipt(folder)["launches"][-1]["end"]
    assert end == "finished early (patience 2)"
    assert f"stopped at step 4 of 6: {end}" in (folder / "report.md").read_text().replace("\\", "")
    run(val, patience=2, resume="auto")
    out = capsys.readouterr().out
    assert said in out and "done: 4 steps" in out and len(losses(folder)) == 4
    run(val, patience=3, resume="auto")
    assert "stopped early" not in capsys.readouterr().out and len(losses(folder)) == 6
    assert best_checkpoint(folder).name == "step_00000005"


def test_the_best_outlives_the_log_and_the_link(run, capsys):
    """A log that is gone, and a copy of the run that has followed its links."""
    folder = run([5, 1, 4, float("nan")], max_steps=4)
    (folder / "metrics.jsonl").unlink()
    run([0, 0, 0, float("nan"), 3, 3, 3], resume="auto", max_steps=7, patience=4)
    assert names(folder) == ["2", "6"] and best_checkpoint(folder).name == "step_00000002"
    said = "stopped early: no lower val loss than 1.0000 in 4 validations (patience 4)"
    assert said in capsys.readouterr().out
    assert losses(folder, "val/loss") == [5, 1, 4, None, 3, 3]

    best = folder / "checkpoints" / "best"
    best.unlink()
    shutil.copytree(best.with_name("step_00000002"), best)
    run([0] * 6 + [2, 0.5, 2, 2], resume="auto", max_steps=10)
    assert names(folder) == ["8", "0"] and not best.is_symlink()
    said = f"{best} cannot be made a link (is it a copy?); the best is step_00000002"
    assert capsys.readouterr().out.count(said) == 1
    assert [*best.parent.glob(".*")] == []


def test_patience_at_the_last_step_is_no_early_stop(run, capsys):
    run([1, 2, 2, 2, 2, 2], patience=5)
    out = capsys.readouterr().out
    assert "stopped early" not in out and "done: 6 steps" in out


def test_patience_needs_validation(train_config):
    with pytest.raises(ValueError, match="patience 2 counts validations, but there are none"):
        pretrain(replace(train_config, patience=2, eval_every=0))
    assert not train_config.folder.exists()


def test_what_is_left_behind_is_not_the_best(run, at_step, capsys):
    """Where a run goes on from an earlier checkpoint, and where it rolls back."""
    folder = run([5, 3, 4, 2, 1, 6], keep_last=0)
    assert best_checkpoint(folder).name == "step_00000005"
    resume = str(folder / "checkpoints" / "step_00000003")
    run([5, 3, 4, 4, 4, 4], keep_last=0, resume=resume)
    assert best_checkpoint(folder).name == "step_00000002"

    val = [5, 4, 3, 1, 9, 9]

    def spoil(trainer):
        trainer.folder.wait()
        assert best_checkpoint(trainer.folder.path).name == "step_00000004"
        val[2:] = [9, 9, 9, 9]  # of the way that is gone now
        with torch.no_grad():
            trainer.model.transformer.wte.weight.fill_(float("nan"))

    at_step(4, spoil)
    folder = run(val, run_name="back", guard="rollback", snapshot_every=2, keep_last=0)
    assert "rolled back to step 2" in capsys.readouterr().out
    assert best_checkpoint(folder).name == "step_00000002"
    checkpoint.set_aside(folder, 1)
    assert best_checkpoint(folder) is None  # and no link to nothing


@pytest.mark.ddp
def test_ranks_stop_together(train_config, free_port):
    config = replace(
        train_config, eval_every=1, patience=2, lr=1e-30, weight_decay=0.0, max_steps=50
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(free_port), str(ROOT / "scripts" / "train_gpt2.py"), *command_line(config),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "in 2 validations (patience 2)" in done.stdout and "done: 3 steps" in done.stdout
    assert best_checkpoint(config.folder).name == "step_00000001"
