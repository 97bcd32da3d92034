"""Mixtures: each source holds integers of its own, so a token says where it came from."""

import json
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
from gpt2.data.mixture import find_tokenizer, lowest_terms, shares
from gpt2.train.pretrain import open_val, pretrain

from .conftest import losses

SIZES = {"a": 1000, "b": 333, "c": 90}
FIRST = {"a": 0, "b": 10000, "c": 20000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        (out / name).mkdir()
        tokens = np.arange(FIRST[name], FIRST[name] + size)
        write_shard(out / name / "train_000000.bin", tokens)
    return out


def mixture(folder, *sources, **options) -> Mixture:
    sources = tuple(DataSource(p, Fraction(w), *step) for p, w, *step in sources)
    loaders = {
        name: TokenLoader(folder / name / "train_000000.bin", 8, **options)
        for name in dict.fromkeys(s.path for s in sources)
    }
    return Mixture(sources, loaders)


class Alone:
    """The sources of a mixture by themselves: what each is to give next."""

    def __init__(self, folder):
        self.loaders = {n: TokenLoader(folder / n / "train_000000.bin", 8) for n in "abc"}
        self.seen = dict.fromkeys("abc", 0)

    def check(self, x) -> None:
        """That rows x are the next ones of their sources."""
        for row in x:
            name = "abc"[int(row[0]) // 10000]
            assert torch.equal(row, self.loaders[name].batch(self.seen[name], 1)[0][0])
            self.seen[name] += 1


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.fractions(0, 3, max_denominator=40), min_size=1, max_size=6).filter(any),
    start=st.integers(0, 10**15),
)
def test_counts_are_exact_and_each_sample_has_one_source(weights, start):
    whole = lowest_terms(weights)
    total = sum(whole)
    assert [Fraction(w, total) for w in whole] == [w / sum(weights) for w in weights]
    periods = shares(whole, np.array([total * 10**9]))[:, 0]
    assert periods.tolist() == [w * 10**9 for w in whole]
    for first in (0, start):
        i = np.arange(first, first + 300)
        counts = shares(whole, i)
        assert (counts.sum(0) == i).all() and (np.sort(np.diff(counts), 0)[:-1] == 0).all()
        for count, weight in zip(counts.tolist(), whole, strict=True):
            for n, k in zip(count, i.tolist(), strict=True):
                assert abs(n - Fraction(k * weight, total)) < len(weights) / 2 + 0.5


def test_weights_too_fine_for_an_exact_schedule():
    with pytest.raises(ValueError, match="round them to a few decimals"):
        lowest_terms([Fraction("0.30000000001"), Fraction("0.7")])


@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_proportions_and_order_within_a_source(folder, backend):
    data = mixture(folder, ("a", ".5"), ("b", ".3"), ("c", ".2"), backend=backend)
    alone = Alone(folder)
    for step in range(30):
        x, y = data.batch(step, 8)
        assert torch.equal(y, x + 1)
        for row in range(8):
            place = data.provenance(step, row, 8)
            source = "abc"[int(x[row, 0]) // 10000]
            assert place.shard == str(folder / source / "train_000000.bin")
            assert place.offset + FIRST[source] == x[row, 0]
        alone.check(x)
        assert data.epochs(step + 1, 8) == {
            n: alone.seen[n] / alone.loaders[n].n_windows for n in "abc"
        }
    assert alone.seen == {"a": 120, "b": 72, "c": 48}
    far = data.batch(10**12, 2000)[0][:, 0] // 10000
    assert far.bincount().tolist() == [1000, 600, 400]


PHASES = (("a", 1), ("b", 1), ("a", 1, 10), ("c", 3, 10), ("b", 1, 15))


def test_weights_change_at_a_step_and_sources_go_on(folder):
    whole, before, alone = mixture(folder, *PHASES), mixture(folder, *PHASES[:2]), Alone(folder)
    assert (whole.phases, before.phases) == (3, 1)
    for step in range(20):
        x = whole.batch(step, 8)[0]
        assert step >= 10 or torch.equal(x, before.batch(step, 8)[0])
        alone.check(x)
    assert alone.seen == {"a": 40 + 10, "b": 40 + 40, "c": 30}


@pytest.mark.parametrize("offset", [-13, 3, 8, 50])
def test_samples_keep_their_places_after_an_offset(folder, offset):
    """Also where the rows of one step lie in two phases."""
    data = mixture(folder, *PHASES)
    samples = torch.cat([data.batch(step, 8)[0] for step in range(30)])
    for step in range(2, 20):
        first = step * 8 + offset
        assert torch.equal(data.batch(step, 8, offset=offset)[0], samples[first : first + 8])
        same = data.provenance((first + 3) // 8, (first + 3) % 8, 8)
        assert data.provenance(step, 3, 8, offset=offset) == same


def test_another_global_batch_size_gives_the_same_samples_where_weights_stay(folder):
    data = mixture(folder, ("a", 1), ("c", "1e-5"))
    samples = data.batch(0, 80)[0]
    for step in range(5):
        assert torch.equal(data.batch(step, 6, offset=32)[0], samples[step * 6 + 32 :][:6])
    rows = torch.cat([data.batch(step, 100_000)[0][:, 0] for step in range(3)]) // 10000
    assert rows.bincount().tolist() == [299_997, 0, 3]


def test_one_epoch_ends_before_any_source_repeats(folder):
    data = mixture(folder, ("a", 1), ("b", 1))
    assert data.n_windows == 2 * data.loaders[1].n_windows + 1  # b has 40 windows, a many more
    x = data.batch(0, data.n_windows)[0]
    assert len(set(x[:, 0].tolist())) == data.n_windows
    assert data.n_tokens == 1333


def test_validation_reads_every_window_of_every_source_once(folder):
    data = mixture(folder, *PHASES, shuffle=False)
    alone = [TokenLoader(folder / n / "train_000000.bin", 8, shuffle=False) for n in "abc"]
    windows = [loader.n_windows for loader in alone]
    assert data.n_windows == sum(windows) == 124 + 41 + 11 and data.phases == 1
    x = torch.cat([data.batch(step, 8)[0] for step in range(22)])
    for source, loader in enumerate(alone):
        assert torch.equal(x[x[:, 0] // 10000 == source], loader.batch(0, loader.n_windows)[0])
    # So do the first ones alone, in proportion.
    assert (x[:88, 0] // 10000).bincount().tolist() == pytest.approx([62, 20.5, 5.5], abs=1)


def test_identity_has_the_weights(folder):
    data = mixture(folder, *PHASES)
    found = data.identity()
    assert [entry["tokens"] for entry in found] == [1000, 333, 90]
    assert [entry["weights"] for entry in found] == [
        [[0, "1/2"], [10, "1/4"], [15, "0"]],
        [[0, "1/2"], [10, "0"], [15, "1"]],
        [[0, "0"], [10, "3/4"], [15, "0"]],
    ]
    doubled = mixture(folder, *((p, 2 * w, *step) for p, w, *step in PHASES))
    assert doubled.identity() == found != mixture(folder, *PHASES[:2]).identity()


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
    "data, message",
    [
        ("a:0.5,b", "'b' in 'a:0.5,b' needs a weight"),
        ("a:0,b:1", "weight of 'a' must be above 0"),
        ("a:1/0,b:1", "weight of 'a' must be above 0"),
        ("a:1,a:2", "stands twice"),
        ("a:1@5,b:2@5", "no weights for step 0"),
        ("[]", "mix.yaml.* list of folders is empty"),
        ("[a, b]", "mix.yaml.* list of {path, weight}"),
        ("[{path: a}]", "mix.yaml.* list of {path, weight}"),
        ("[{path: a, weight: much}]", "mix.yaml.* such as 0.25"),
        ("[{path: a, weight: -1}]", "mix.yaml.* such as 0.25"),
        ("[{path: a, weight: yes}]", "mix.yaml.* such as 0.25"),
        ("[{path: a, weight: 1, from_stp: 3}]", "mix.yaml.* did you mean 'from_step'"),
        ("[{path: a, weight: 1, from_step: -3}]", "mix.yaml.* whole number"),
    ],
)
def test_mixtures_that_are_refused(tmp_path, data, message):
    (tmp_path / "mix.yaml").write_text(f"data: {data}\n")
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, "", [str(tmp_path / "mix.yaml")])


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
    other = "the steps so far have seen the other"
    assert "changed since the checkpoint: max_steps" in out and other not in out
    pretrain(replace(config, max_steps=8, resume="auto", run_name="later"))
    assert other in capsys.readouterr().out


def test_a_source_without_val_among_others_is_an_error_that_says_how_to_go_on(counting, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    write_shard(bare / "train_000000.bin", np.arange(100))
    config = TrainConfig(data=f"{counting}:1,{bare}:1")
    with pytest.raises(OSError, match="no val split, and others have one: .*--eval_every 0") as e:
        open_val(config, 8, (0, 1))
    assert e.value.filename == str(bare)


@pytest.mark.parametrize("other", [{"name": "byte"}, {"name": "char", "chars": "ac"}])
def test_one_tokenizer_for_all_sources(tmp_path, other):
    for name, tokenizer in (("a", {"name": "char", "chars": "ab"}), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"tokenizer": tokenizer}))
    with pytest.raises(
        ValueError, match="a and .*b were made with different tokenizers.*char.* and"
    ):
        find_tokenizer(f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:1")
