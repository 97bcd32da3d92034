"""The learning-rate range test."""

import re
import signal
from dataclasses import replace

import pytest

from gpt2.train.between import learning_rate
from gpt2.train.pretrain import pretrain
from gpt2.train.trainer import Trainer

from .conftest import losses


def content(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_it_leaves_a_picture_and_nothing_else(train_config, capsys):
    config = replace(train_config, lr_range_test=True, max_steps=1000, eval_every=250)
    pretrain(config)
    out = capsys.readouterr().out
    picture = config.folder.with_name("run.lr.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and f"picture: {picture}" in out
    assert [p.name for p in config.folder.parent.iterdir()] == ["run.lr.png"]
    lr = float(re.search(r"suggested: --lr (\S+),", out)[1])
    assert 1e-4 < lr < 1e-1
    pretrain(replace(train_config, lr=lr))
    assert losses(train_config.folder)[-1] < losses(train_config.folder)[0]
    # Beside a run, whose folder it leaves alone.
    before = content(config.folder)
    pretrain(config)
    assert content(config.folder) == before


@pytest.fixture
def range_of(train_config, monkeypatch):
    """range_of(losses) is a range test of a model with these losses; None: a step is skipped."""

    def run(found: list, **options):
        def repeat(self, to):
            return {} if found[to - 1] is None else {to: found[to - 1]}

        monkeypatch.setattr(Trainer, "repeat", repeat)
        config = replace(train_config, lr_range_test=True, max_steps=len(found), **options)
        pretrain(config)
        return config

    return run


@pytest.mark.parametrize("end", [[9.0, 9.0], [None, 1.0]])
def test_it_suggests_the_lr_of_the_lowest_loss_and_ends_where_it_diverges(range_of, capsys, end):
    config = range_of([4.0, 3.0, 2.0, 1.0, 4.0, 4.0, *end])
    lrs = [learning_rate(step, config) for step in range(8)]
    assert lrs[0] == pytest.approx(1e-6) and lrs[-1] == pytest.approx(1.0)
    assert lrs[1] / lrs[0] == pytest.approx(lrs[7] / lrs[6])
    out = capsys.readouterr().out
    n = 7 if end[0] else 6
    assert f"{n} steps up to lr {lrs[n - 1]:.1e}; suggested: --lr {lrs[3]:.1e}, where" in out


@pytest.mark.parametrize("found", [[4.0, 4.1, 4.2, 4.3], [None] * 4])
def test_a_loss_that_does_not_fall_suggests_nothing(range_of, found, train_config):
    with pytest.raises(ValueError, match=r"no lr of \d steps up to .* lowers the loss"):
        range_of(found)
    assert not train_config.folder.parent.exists()


def test_it_can_be_interrupted(train_config, at_step):
    at_step(3, lambda trainer: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pretrain(replace(train_config, lr_range_test=True, max_steps=20))
    assert not train_config.folder.parent.exists()
