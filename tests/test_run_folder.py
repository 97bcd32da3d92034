"""A run knows who it is: one writer, one identity, its own names; and ranks agree before step 0."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2 import checkpoint
from gpt2.checkpoint import list_checkpoints
from gpt2.cli import read_config
from gpt2.config import TrainConfig
from gpt2.data.loader import TokenLoader
from gpt2.data.prepare import prepare
from gpt2.dist import Distributed
from gpt2.options import PrepareConfig
from gpt2.train.pretrain import pretrain
from gpt2.train.run_folder import RunFolder

from .conftest import command_line, losses


def text_data(folder: Path, text: str, name: str = "data") -> Path:
    source = folder / f"{name}.txt"
    source.write_text(text)
    out = str(folder / name)
    return prepare(PrepareConfig(text=str(source), tokenizer="char", out=out, workers=0))


@pytest.fixture
def config(train_config) -> TrainConfig:
    return replace(train_config, eval_every=0, save_every=0, max_steps=3)


def test_a_second_process_is_refused_until_the_first_ends(config):
    pretrain(config)
    code = (
        "import sys; from gpt2.train.run_folder import RunFolder; folder = RunFolder(sys.argv[1]); "
        "folder.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(config.folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OSError, match=rf"process {other.pid} on \S+ is training here"):
            pretrain(replace(config, resume="auto", max_steps=5))
    finally:
        other.kill()  # the lock goes with the process
        other.communicate()
    pretrain(replace(config, resume="auto", max_steps=5))
    assert len(losses(config.folder)) == 5


def test_two_launches_on_a_folder_that_is_not_there_yet(config, tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.find("auto") is second.find("auto") is None
    with first, second:
        first.begin(config, {}, None)
        with pytest.raises(OSError, match="is training here"):
            second.begin(config, {}, None)


def test_what_is_in_the_way_is_replaced_or_named_before_step_0(config):
    config.folder.mkdir(parents=True)
    os.mkfifo(config.folder / "config.yaml")
    (config.folder / "checkpoints").touch()
    with pytest.raises(FileExistsError, match="checkpoints"):
        pretrain(config)
    assert not (config.folder / "metrics.jsonl").exists()
    (config.folder / "checkpoints").unlink()
    pretrain(config)
    assert read_config(config.folder / "config.yaml", TrainConfig) == config


def test_names_that_are_not_ours_are_left_alone(config):
    pretrain(replace(config, save_every=1, keep_last=1))
    folder = config.folder / "checkpoints"
    theirs = ["step_00000003 (copy)", "step_00000002.bak", "best", "step_latest"]
    for name in theirs:
        shutil.copytree(folder / "step_00000003", folder / name)
    pretrain(replace(config, save_every=1, keep_last=1, resume="auto", max_steps=5))
    assert {*theirs, "step_00000005", "latest"} == {p.name for p in folder.iterdir()}


def test_other_content_under_the_same_name_is_refused(config, tmp_path, capsys):
    alphabet = "abcdefghij klmnop\n"
    data = text_data(tmp_path, alphabet * 200)
    config = replace(config, data=str(data))
    pretrain(config)
    data.rename(tmp_path / "old")
    text_data(tmp_path, alphabet[::-1] * 200)
    log = (config.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="other data than at step 3 .*--init_from CHECKPOINT"):
        pretrain(replace(config, resume="auto", max_steps=5))
    assert (config.folder / "metrics.jsonl").read_bytes() == log
    # The same content in another place is the same data; another folder was asked for.
    pretrain(replace(config, resume="auto", max_steps=5, data=f"{tmp_path}/./old"))
    assert "other data" not in capsys.readouterr().out
    pretrain(replace(config, resume="auto", max_steps=6))
    assert "other data than at step 5" in capsys.readouterr().out


def test_another_alphabet_of_the_same_size_is_refused(config, tmp_path):
    lower = text_data(tmp_path, "abcdefgh \n" * 300, "lower")
    upper = text_data(tmp_path, "ABCDEFGH \n" * 300, "upper")
    config = replace(config, data=str(lower))
    pretrain(config)
    with pytest.raises(ValueError, match="its tokenizer is another than the one of"):
        pretrain(replace(config, data=str(upper), resume="auto", max_steps=5))
    start = dict(init_from=str(config.folder), n_layer=None, n_head=None, n_embd=None)
    with pytest.raises(ValueError, match="has another tokenizer"):
        pretrain(replace(config, data=str(upper), run_name="other", **start))


def test_checkpoints_of_another_run(config, capsys):
    other, fork = replace(config, run_name="other", seed=7), replace(config, run_name="fork")
    pretrain(config)
    pretrain(replace(other, max_steps=5))
    theirs = list_checkpoints(other.folder)[-1]
    ids = [checkpoint.read_checkpoint(run.folder).run_id for run in (config, other)]
    assert ids[0] != ids[1] and all(len(i) == 32 for i in ids)
    with pytest.raises(ValueError, match="is a checkpoint of another run than"):
        pretrain(replace(config, resume=str(theirs), max_steps=7))
    shutil.copytree(theirs, config.folder / "checkpoints" / theirs.name)
    capsys.readouterr()
    pretrain(replace(config, resume="auto", max_steps=4))  # not from step 5 of the other
    assert "another run" in capsys.readouterr().out
    pretrain(replace(fork, resume=str(theirs), max_steps=6))
    found = checkpoint.read_checkpoint(fork.folder)
    assert found.step == 6 and found.run_id not in ids


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_checkpoint_after_max_steps_is_refused_and_kept(config, max_steps):
    pretrain(config)
    with pytest.raises(ValueError, match=f"is of step 3, after max_steps {max_steps}: raise"):
        pretrain(replace(config, resume="auto", max_steps=max_steps, warmup_steps=0))
    assert [p.name for p in list_checkpoints(config.folder)] == ["step_00000003"]


@pytest.mark.parametrize("tokens_per_step", [128, 512])
def test_each_sample_comes_once_also_with_steps_of_another_size(
    config, tokens_per_step, monkeypatch
):
    seen: list[int] = []
    real = TokenLoader.fill

    def fill(self, samples, out):
        seen.extend(samples.tolist())
        return real(self, samples, out)

    monkeypatch.setattr(TokenLoader, "fill", fill)
    pretrain(config)
    options = dict(resume="auto", tokens_per_step=tokens_per_step)
    pretrain(replace(config, max_steps=5, **options))
    pretrain(replace(config, max_steps=6, **options))
    assert seen == list(range(len(seen))) and len(seen) == 3 * 8 + 3 * tokens_per_step // 32


def test_a_run_of_format_1_goes_on(config):
    """Its checkpoints have no run id, and its data is not known."""
    pretrain(config)
    path = list_checkpoints(config.folder)[0] / checkpoint.META
    meta = json.loads(path.read_text())
    for key in ("run_id", "identity", "xxh3_128"):
        del meta[key]
    meta["format"], meta["state"]["data_offset"] = 1, 2
    del meta["state"]["offset"], meta["state"]["block_size"]
    path.write_text(checkpoint._sign(meta))
    (config.folder / "run.json").unlink()
    pretrain(replace(config, resume="auto", max_steps=4))
    found = checkpoint.read_checkpoint(config.folder)
    assert found.step == 4 and found.state["offset"] == 2 * 8 and found.run_id


@pytest.mark.parametrize(
    "facts, error, words",
    [
        ({"seed": 7, "lr": 1.0}, None, "rank 1 differs from rank 0: seed is 7 there and 1337"),
        ({"lr": 1.0}, None, "seed is None there"),
        ({}, "no such data folder", "rank 1 cannot start: no such data folder"),
        ({"seed": 1337, "lr": 1.0}, None, None),
    ],
)
def test_ranks_that_differ_are_named(monkeypatch, facts, error, words):
    group = Distributed(0, 2)
    monkeypatch.setattr(Distributed, "gather", lambda self, mine: [mine, (facts, error)])
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        group.agree({"seed": 1337, "lr": 1.0})
    with pytest.raises(OSError, match="mine"):
        group.agree({}, OSError("mine"))


@pytest.mark.ddp
@pytest.mark.parametrize(
    "changes, words", [(dict(seed=7), "seed is 7"), (dict(data="nowhere"), "no such data folder")]
)
def test_ranks_agree_before_step_0(config, free_port, changes, words):
    ranks = []
    for rank in (0, 1):
        ours = replace(config, micro_batch_size=2, timeout_s=30.0, **(changes if rank else {}))
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}  # fmt: skip
        command = [sys.executable, "scripts/train_gpt2.py", *command_line(ours)]
        ranks.append(subprocess.Popen(
            command, env=os.environ | env, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    out = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert all(words in err and "Traceback" not in err for _, err in out), out
    assert not config.folder.exists()
