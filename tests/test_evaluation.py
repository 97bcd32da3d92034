"""HellaSwag between two steps of a run: the same scores as afterwards, at no risk to the run."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2 import checkpoint
from gpt2.evals import hellaswag, scoring
from gpt2.evals.hellaswag import hellaswag_accuracy, read_hellaswag
from gpt2.evals.scoring import Single
from gpt2.train.between import Interrupted
from gpt2.train.metrics import read_metrics
from gpt2.train.pretrain import pretrain

from .conftest import losses

QUESTIONS = Path("data/eval/hellaswag_val.jsonl")


def write_questions(folder: Path) -> None:
    """20 of them, of the 65 characters of Shakespeare."""
    folder.mkdir(parents=True)
    endings = ["runs.", "sits still.", "ate", "is in"]
    rows = (
        {"ctx": "A man " + "really " * (i % 3), "endings": endings, "label": i % 4}
        for i in range(20)
    )
    (folder / QUESTIONS.name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def asking(train_config, tmp_path, monkeypatch):
    """A run that asks them every 3 steps."""
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / QUESTIONS.parent)
    return replace(train_config, hellaswag_every=3, micro_batch_size=2, eval_every=0, save_every=0)


def test_the_scores_are_those_of_the_checkpoints(asking, capsys):
    config = replace(asking, keep_last=0)
    pretrain(config)
    out, run = capsys.readouterr().out, config.folder
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval/hellaswag" in line]
    assert [line["step"] for line in lines] == [3, 6]
    examples = read_hellaswag(QUESTIONS, checkpoint.load_tokenizer(run), 32)
    for line, path in zip(lines, checkpoint.list_checkpoints(run), strict=True):  # saved before
        found = hellaswag_accuracy(checkpoint.load_model(path), examples, Single())
        assert line["eval/hellaswag"] == found["acc_norm"]
        assert line["eval/hellaswag_acc"] == found["acc"]
        assert line["eval/hellaswag_examples"] == 20
    assert f"HellaSwag {found['acc_norm']:.2%} acc_norm" in out
    assert f"{found['acc_norm']:.2%}" in (run / "report.md").read_text()
    silent = replace(asking, hellaswag_every=0, run_name="silent")
    pretrain(silent)
    assert losses(run) == losses(silent.folder)  # asking changes nothing


def test_a_signal_while_asking_ends_it_at_once(asking, monkeypatch):
    real, calls = hellaswag.ending_losses, []

    def ending_losses(*args):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*args)

    monkeypatch.setattr(hellaswag, "ending_losses", ending_losses)
    monkeypatch.setitem(scoring.mean_scores.__kwdefaults__, "tokens_per_batch", 64)
    with pytest.raises(Interrupted):
        pretrain(asking)
    assert len(calls) == 1  # of several batches
    assert checkpoint.read_checkpoint(asking.folder).step == 3
    monkeypatch.setattr(hellaswag, "ending_losses", real)
    pretrain(replace(asking, resume="auto"))
    lines = read_metrics(asking.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/hellaswag" in line] == [3, 6]


def test_what_is_missing_is_said_before_anything_is_written(asking):
    QUESTIONS.write_text('{"ctx": "A", "endings": []}\n')
    with pytest.raises(ValueError, match="hellaswag_val.jsonl: line 1: 'endings' must be 4 texts"):
        pretrain(asking)
    assert not Path(asking.out_dir).exists()
