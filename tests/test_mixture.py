"""Mixtures: each source holds integers of its own, so a token says where it came from."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.cli import parse
from gpt2.config import DataSource, TrainConfig, data_sources
from gpt2.data import Mixture, TokenLoader, write_shard
from gpt2.data.mixture import Ratio
from gpt2.data.prepare import prepare
from gpt2.options import PrepareConfig
from gpt2.train.pretrain import open_data, pretrain

from .conftest import losses

SIZES = {"a": 1000, "b": 333, "c": 90}
FIRST = {"a": 0, "b": 10000, "c": 20000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        (out / name).mkdir()
        for split in ("train", "val"):
            tokens = np.arange(FIRST[name], FIRST[name] + size)
            write_shard(out / name / f"{split}_000000.bin", tokens)
    return out


def mixture(folder, *sources, backend="auto", **options) -> Mixture:
    sources = tuple(DataSource(p, Fraction(w), *step) for p, w, *step in sources)
    loaders = {
        name: TokenLoader(folder / name / "train_000000.bin", 8, backend=backend, **options)
        for name in dict.fromkeys(s.path for s in sources)
    }
    return Mixture(sources, loaders)


def sources_of(x) -> np.ndarray:
    return x[:, 0].numpy() // 10000


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.fractions(0, 3, max_denominator=40), min_size=1, max_size=6),
    start=st.integers(0, 10**15),
)
def test_counts_are_exact_and_each_sample_has_one_source(weights, start):
    if not sum(weights):
        return
    ratio = Ratio(weights)
    total = sum(ratio.weights)
    assert [Fraction(w, total) for w in ratio.weights] == [w / sum(weights) for w in weights]
    assert ratio.counts(np.array([total * 10**9]))[:, 0].tolist() == [
        w * 10**9 for w in ratio.weights
    ]
    for first in (0, start):
        i = np.arange(first, first + 300)
        counts = ratio.counts(i)
        assert (counts.sum(0) == i).all()
        steps = np.diff(counts)
        assert ((steps == 0) | (steps == 1)).all() and (steps.sum(0) == 1).all()
        left = np.array([[int(k * w % total) for k in i.tolist()] for w in ratio.weights])
        whole = np.array([[int(k * w // total) for k in i.tolist()] for w in ratio.weights])
        assert (np.abs(counts - whole - left / total) < len(weights) / 2 + 0.5).all()


def test_weights_too_fine_for_an_exact_schedule():
    with pytest.raises(ValueError, match="round them to a few decimals"):
        Ratio([Fraction("0.30000000001"), Fraction("0.7")])


@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_proportions_ranks_and_order_within_a_source(folder, backend):
    data = mixture(folder, ("a", "0.5"), ("b", "0.3"), ("c", "0.2"), backend=backend)
    alone = {n: TokenLoader(folder / n / "train_000000.bin", 8) for n in "abc"}
    seen, rows = dict.fromkeys("abc", 0), 0
    for step in range(30):
        x, y = data.batch(step, 8)
        assert torch.equal(y, x + 1)
        for world_size in (2, 4, 8):
            parts = [data.batch(step, 8, rank, world_size)[0] for rank in range(world_size)]
            assert torch.equal(torch.cat(parts), x)
        for row, source in enumerate(sources_of(x)):
            name = "abc"[source]
            assert torch.equal(x[row], alone[name].batch(seen[name], 1)[0][0])
            assert data.provenance(step, row, 8).shard == str(folder / name / "train_000000.bin")
            seen[name] += 1
        rows += 8
        assert data.epochs(step + 1, 8) == {
            n: seen[n] / alone[n].n_windows for n in ("a", "b", "c")
        }
    assert seen == {"a": 120, "b": 72, "c": 48}
    assert data.batch(10**12, 8)[0].shape == (8, 8)


def test_weights_change_at_a_step_and_sources_go_on(folder):
    whole = mixture(folder, ("a", 1), ("b", 1), ("a", 1, 10), ("c", 3, 10), ("b", 1, 15))
    before = mixture(folder, ("a", 1), ("b", 1))
    for step in range(10):
        assert torch.equal(whole.batch(step, 8)[0], before.batch(step, 8)[0])
    alone = {n: TokenLoader(folder / n / "train_000000.bin", 8) for n in "abc"}
    seen = dict.fromkeys("abc", 0)
    for step in range(20):
        x = whole.batch(step, 8)[0]
        for row, source in enumerate(sources_of(x)):
            name = "abc"[source]
            assert torch.equal(x[row], alone[name].batch(seen[name], 1)[0][0])
            seen[name] += 1
    assert seen == {"a": 40 + 10, "b": 40 + 40, "c": 30}


def test_one_epoch_ends_before_any_source_repeats(folder):
    data = mixture(folder, ("a", 1), ("b", 1), shuffle=False)
    assert data.n_windows == 2 * data.loaders[1].n_windows + 1  # b has 41 windows, a many more
    x = data.batch(0, data.n_windows)[0]
    assert len(set(x[:, 0].tolist())) == data.n_windows
    assert data.n_tokens == 1333


def test_the_ways_to_write_a_mixture(tmp_path):
    assert data_sources("data/with,comma") == (DataSource("data/with,comma"),)
    want = (
        DataSource("data/a", Fraction(7, 10)), DataSource("b", Fraction(1, 3)),
        DataSource("b", Fraction(2), 500),
    )  # fmt: skip
    line = "data/a:0.7, b:1/3,b:2@500"
    assert data_sources(line) == want
    (tmp_path / "mix.yaml").write_text(
        "data:\n- {path: data/a, weight: 0.7}\n- {path: b, weight: 1/3}\n"
        "- {path: b, weight: 2, from_step: 500}\n"
    )
    config = parse(TrainConfig, "", [str(tmp_path / "mix.yaml")])
    assert data_sources(config.data) == want
    assert data_sources(parse(TrainConfig, "", ["--data", line]).data) == want


@pytest.mark.parametrize(
    "line, message",
    [
        ("a:0.5,b", "'b' in 'a:0.5,b' needs a weight"),
        ("a:0,b:1", "weight of 'a' must be above 0"),
        ("a:1/0,b:1", "weight of 'a' must be above 0"),
        ("a:1,a:2", "stands twice"),
        ("a:1@5,b:2@5", "no weights for step 0"),
    ],
)
def test_mixtures_that_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data=line)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("[]", "list of folders is empty"),
        ("[a, b]", "list of {path, weight}"),
        ("[{path: a}]", "list of {path, weight}"),
        ("[{path: a, weight: much}]", "such as 0.25"),
        ("[{path: a, weight: -1}]", "such as 0.25"),
        ("[{path: a, weight: yes}]", "such as 0.25"),
        ("[{path: 'a,b', weight: 1}]", "without comma"),
        ("[{path: a, weight: 1, from_stp: 3}]", "did you mean 'from_step'"),
        ("[{path: a, weight: 1, from_step: -3}]", "whole number"),
    ],
)
def test_yaml_mixtures_that_are_refused(tmp_path, yaml, message):
    (tmp_path / "mix.yaml").write_text(f"data: {yaml}\n")
    with pytest.raises(ValueError, match=message) as error:
        parse(TrainConfig, "", [str(tmp_path / "mix.yaml")])
    assert "mix.yaml" in str(error.value)


def test_training_on_a_mixture(train_config, shakespeare, tmp_path, capsys):
    (tmp_path / "copy").symlink_to(shakespeare)
    data = f"{shakespeare}:3,{tmp_path / 'copy'}:1"
    config = replace(train_config, data=data, run_name="mixed")
    pretrain(config)
    assert f"{shakespeare}: 0.00 epochs" in capsys.readouterr().out
    # Other weights from step 3 on: what was trained before is as it was.
    later = replace(config, data=f"{data},{tmp_path / 'copy'}:1@3", run_name="later")
    pretrain(later)
    runs = Path(config.out_dir)
    assert losses(runs / "mixed")[:3] == losses(runs / "later")[:3]
    assert losses(runs / "mixed")[3:] != losses(runs / "later")[3:]
    pretrain(replace(later, max_steps=7, resume="auto"))
    out = capsys.readouterr().out
    assert "changed since the checkpoint: max_steps" in out and "counted as if" not in out
    pretrain(replace(config, max_steps=8, resume="auto", run_name="later"))
    assert "counted as if" in capsys.readouterr().out


def test_one_tokenizer_for_all_sources(shakespeare, train_config, tmp_path):
    (tmp_path / "other.txt").write_text("To be, or not to be. " * 100)
    for kind, which in (("byte", "char and byte"), ("char", "char, but another one")):
        out = tmp_path / kind
        prepare(PrepareConfig(text=str(tmp_path / "other.txt"), tokenizer=kind, out=str(out)))
        config = replace(train_config, data=f"{shakespeare}:1,{out}:1")
        with pytest.raises(ValueError, match=which):
            open_data(config, "train", 32)
