"""Rows of conversations: packing, order, coverage, masks, and where they come from."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import IGNORE_INDEX, GPTConfig
from gpt2.data.chat import messages_from_row
from gpt2.data.conversations import best_threads, read_rows
from gpt2.data.files import LeftOut
from gpt2.data.sft import (
    ConversationLoader,
    Conversations,
    best_fit_decreasing,
    load_conversations,
)
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer

from .conftest import equal, write_rows

TOKENIZER = ByteTokenizer()
QA = [{"question": f"What is {i} + {i}?", "answer": "It is " + "one more than " * i}
      for i in range(12)]  # fmt: skip
LONG = {"question": "q" * 10, "answer": "a" * 100}  # 34 tokens before the answer, 101 in it
LATE = {"question": "q" * 100, "answer": "a" * 5}
SHORT = [{"question": "q", "answer": "a" * i} for i in (1, 5, 9)]


def load(data: str, block_size: int = 256, **options):
    return load_conversations(data, TOKENIZER, block_size, template="user_assistant", **options)


def conversations(lengths, learnt_from=2) -> Conversations:
    """Conversation i is the tokens 100 i, 100 i + 1, ...; learnt from its third token on."""
    tokens = [100 * i + np.arange(n, dtype=np.uint16) for i, n in enumerate(lengths)]
    learnt = [np.arange(n) >= learnt_from for n in lengths]
    return Conversations(
        "made", tokens, learnt, [f"row {i}" for i in range(len(lengths))], LeftOut()
    )


def test_a_packed_row_position_by_position():
    loader = ConversationLoader(conversations([4, 3, 5]), 10, shuffle=False, pad=9)
    idx, targets, doc_start = loader.batch(0, 1)
    assert [p.dtype for p in (idx, targets, doc_start)] == [torch.int64, torch.int64, torch.int32]
    no = IGNORE_INDEX
    # The longest first; no conversation's last token, and no target across a border.
    assert idx.tolist() == [[200, 201, 202, 203, 0, 1, 2, 100, 101, 9]]
    assert targets.tolist() == [[no, 202, 203, 204, no, 2, 3, no, 102, no]]
    assert doc_start.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7, 7, 9]]
    assert (loader.n_windows, loader.n_tokens, loader.n_filled, loader.n_targets) == (1, 10, 9, 6)
    places = [loader.provenance(0, 0, 1, t)[:2] for t in range(10)]
    assert places[0] == ("row 2", 0) and places[6] == ("row 0", 2) and places[8] == ("row 1", 1)
    assert places[9] == loader.provenance(0, 0, 1, 10)[:2] == ("row 1", 2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, capacity):
    bins = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(i for b in bins for _, i in b) == list(range(len(lengths)))
    for b in bins:  # each begins where the one before it ends
        assert [start for start, _ in b] == [
            sum(lengths[i] for _, i in b[:n]) for n in range(len(b))
        ]
    # The same by looking at every bin: which of two equally full bins is taken changes no load.
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [b for b, load in enumerate(loads) if load + length <= capacity]
        if fits:
            loads[max(fits, key=lambda b: loads[b])] += length
        else:
            loads.append(length)
    assert sorted(sum(lengths[i] for _, i in b) for b in bins) == sorted(loads)


@pytest.fixture
def many() -> ConversationLoader:
    rng = np.random.default_rng(0)
    return ConversationLoader(conversations(rng.integers(2, 33, 200)), 32, seed=5)


def seen(loader, first: int, n: int) -> list[int]:
    return [i for sample in range(first, first + n) for _, i in loader.rows[loader.index(sample)]]


def test_each_conversation_once_an_epoch_in_another_order(many):
    n = many.n_windows
    assert n < 120  # of 200 conversations: they are packed
    epochs = [seen(many, epoch * n, n) for epoch in range(3)]
    ordered = seen(ConversationLoader(many.data, 32, seed=5, shuffle=False), 0, n)
    other = seen(ConversationLoader(many.data, 32, seed=6), 0, n)
    orders = [*epochs, ordered, other]
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert len(set(map(tuple, orders))) == 5


@pytest.mark.parametrize("step, offset", [(0, 0), (7, 16), (40, 3), (40, -320)])
def test_ranks_share_the_rows_of_one(many, step, offset):
    whole = many.batch(step, 8, offset=offset)
    for world_size in (2, 4):
        parts = [many.batch(step, 8, r, world_size, offset=offset) for r in range(world_size)]
        assert equal(whole, map(torch.cat, zip(*parts, strict=True)))
    place = many.provenance(step, 3, 8, offset=offset)
    assert whole[0][3, 0] == 100 * (place.document - 1) and place.offset == 0
    one_by_one = [many.batch(step * 8 + offset + row, 1) for row in range(8)]
    assert equal(whole, map(torch.cat, zip(*one_by_one, strict=True)))


def test_identity_is_that_of_what_is_trained_on(many):
    def identity(lengths, **options):
        return ConversationLoader(conversations(lengths, **options), 32).identity()

    [known] = identity([3, 9])
    assert known.keys() == {"path", "rows", "hash"} and known["path"] == "made"
    assert identity([3, 9]) == [known] == json.loads(json.dumps([known]))
    others = identity([9, 3]), identity([3, 8]), identity([3, 9], learnt_from=1)
    assert len({known["hash"], *(other[0]["hash"] for other in others)}) == 4


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_packed_and_alone_give_the_same_losses(tmp_path, kernels):
    """Each token's loss, conversation by conversation; without doc_start they would differ."""
    # Interpreted, Triton's kernels are slow: three short ones in one row.
    rows, block, n_layer = (SHORT, 128, 1) if kernels == "triton" else (QA, 256, 2)
    data, _ = load(write_rows(tmp_path / "qa.jsonl", rows), block)
    model = GPT(GPTConfig(n_layer, n_head=2, n_embd=32, block_size=block, vocab_size=257), kernels)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # clear preferences: what a token sees makes a difference
    tolerance = dict(rtol=1e-4, atol=1e-5)
    if kernels == "torch":
        model, tolerance = model.double(), dict(rtol=1e-12, atol=1e-12)

    @torch.no_grad()
    def losses(idx, targets, doc_start=None):
        logits = model(idx, doc_start=doc_start)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(targets)

    packed = ConversationLoader(data, block)
    assert packed.n_windows < len(data)
    differ = 0
    for sample in range(packed.n_windows):
        idx, targets, doc_start = packed.batch(sample, 1)
        hidden, seen = losses(idx, targets, doc_start)[0], losses(idx, targets)[0]
        for start, stop, i in packed.spans(packed.index(sample)):
            tokens, learnt = torch.tensor(data.tokens[i].tolist()), torch.tensor(data.learnt[i])
            expected = torch.where(learnt[1:], tokens[1:], -100)
            alone = losses(tokens[None, :-1], expected[None])[0]
            assert (alone > 0).sum() == learnt.sum() > 1
            torch.testing.assert_close(hidden[start:stop], alone, **tolerance)
            differ += not torch.allclose(seen[start:stop], alone, rtol=1e-2)
    assert differ == len(data) - packed.n_windows > 0  # all but the first of each row


@pytest.mark.parametrize(
    "overlong, used, kind, left_out, first, cut",
    [
        ("drop", 3, "longer than block_size", 2, 4, []),
        ("cut", 4, "longer than block_size, and cut before its first answer", 1, 5,
         ["cut 1 to fit block_size"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, overlong, used, kind, left_out, first, cut):
    path = write_rows(tmp_path / "qa.jsonl", [*SHORT, LONG, LATE])
    data, _ = load(path, 63, overlong=overlong)
    assert len(data) == used
    [line, *others] = data.log()
    assert line.startswith(f"{path}: left out {left_out}: {kind}, first {path}: line {first}: ")
    assert others == [f"{path}: {line}" for line in cut]
    if overlong == "cut":
        text = TOKENIZER.decode(data.tokens[3].tolist())
        assert text.endswith("\n<|assistant|>\n" + "a" * 30) and len(text) == 64


@pytest.mark.parametrize("template, least", [("user_assistant", 27), ("alpaca", 39)])
def test_a_setting_that_no_row_could_meet_is_one_error(tmp_path, template, least):
    data = write_rows(tmp_path / "qa.jsonl", [LONG, {"no": "row"}])
    options = dict(template=template, bad_rows="skip")
    with pytest.raises(ValueError, match=f"block_size {least - 2} is too short.* {least} tokens"):
        load_conversations(data, TOKENIZER, least - 2, **options)
    with pytest.raises(ValueError, match="nothing to train on in 2 rows: left out 1: longer"):
        load_conversations(data, TOKENIZER, least - 1, **options)


@pytest.mark.parametrize(
    "line, kind",
    [
        ('{"question": "q"}', "no answer"),
        ('{"message_id": 1, "parent_id": 3, "role": "user", "text": "q"}', "unknown fields"),
        ('{"question": ', "not JSON"),
    ],
)
def test_rows_that_cannot_be_used_end_the_run_or_are_counted(tmp_path, line, kind):
    path, good = tmp_path / "bad.jsonl", [json.dumps(row) for row in QA[:2]]
    path.write_text(f"{good[0]}\n{line}\n{good[1]}\n{line}")
    where = f"{path}: line 2"
    with pytest.raises(ValueError, match=f"{where}.*; --bad_rows skip leaves such rows out"):
        load(str(path))
    data, _ = load(str(path), bad_rows="skip")
    assert data.where == [f"{path}: line 1", f"{path}: line 3"]
    [(found, (n, first))] = data.left_out.items()
    assert (found, n) == (kind, 2) and first.startswith(where)
    path.write_text(line)
    with pytest.raises(ValueError, match=f"nothing to train on in 1 rows: left out 1: {kind}"):
        load(str(path), bad_rows="skip")


def test_every_kind_of_file_and_of_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(path) -> list:
        return [messages_from_row(row) for _, row in read_rows(str(path), LeftOut())]

    folder = tmp_path / "a,b"
    folder.mkdir()
    write_rows(folder / "a.jsonl", QA[:5])
    lines = "".join(json.dumps(row) + "\n" for row in QA[5:9])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(QA[9:]), folder / "c.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(QA))
    expected = read(folder)
    assert len(expected) == 12 and expected[3][0]["content"] == "What is 3 + 3?"
    assert read(f"{tmp_path / 'rows.json'}, {tmp_path / 'rows.json'}") == expected * 2
    plain = [[{k: m[k] for k in ("role", "content")} for m in talk] for talk in expected[:2]]
    pq.write_table(pa.Table.from_pylist([{"messages": m} for m in plain]), tmp_path / "n.parquet")
    (tmp_path / "lists.json").write_text(json.dumps(plain))
    assert read(tmp_path / "n.parquet") == read(tmp_path / "lists.json") == plain


@pytest.mark.parametrize(
    "name, repo, config",
    [
        ("alpaca", "tatsu-lab/alpaca", None),
        ("dolly", "databricks/databricks-dolly-15k", None),
        ("tulu2", "allenai/tulu-v2-sft-mixture", None),
        ("oasst1", "OpenAssistant/oasst1", None),
        ("gsm8k", "openai/gsm8k", "main"),
    ],
)
def test_known_data_sets_of_the_hub(tmp_path, monkeypatch, name, repo, config):
    """test_chat has their forms of rows; here local lines stand in place of the hub's."""
    import datasets

    asked, load_dataset = [], datasets.load_dataset
    path = write_rows(tmp_path / "hub.jsonl", QA[:2])

    def load_local(repo, name=None, *, split, streaming, revision):
        asked.append((repo, name, split))
        return load_dataset("json", data_files=path, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    rows = [(f"{repo}: row {i + 1}", row) for i, row in enumerate(QA[:2])]
    assert list(read_rows(name, LeftOut())) == rows and asked == [(repo, config, "train")]


def test_lima_is_read_from_a_folder_or_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="GAIR/lima is gated: accept its licence") as error:
        list(read_rows("lima", LeftOut()))
    assert "hf download GAIR/lima train.jsonl" in str(error.value)
    assert "data/lima" in str(error.value)
    (tmp_path / "data" / "lima").mkdir(parents=True)
    write_rows(tmp_path / "data/lima/train.jsonl", [{"conversations": ["Q", "A"], "source": "x"}])
    [(_, row)] = read_rows("lima", LeftOut())
    assert row["conversations"] == ["Q", "A"]


@pytest.mark.parametrize(
    "data, message",
    [
        ("alpacca", "no such file or folder, and no known data set: did you mean 'alpaca'"),
        ("none.jsonl", "no such file or folder"),
        ("empty", "no JSON or parquet files"),
        ("", "leaves a name empty"),
        ("rows.jsonl,", "leaves a name empty"),
        ("rows.jsonl", "nothing to train on in 0 rows: it is empty"),
    ],
)
def test_unknown_names_and_missing_files(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("rows.jsonl").touch()
    with pytest.raises((OSError, ValueError), match=message):
        load(data)


def tree(*rows) -> list[tuple[str, dict]]:
    names = ("message_id", "parent_id", "role", "text", "rank", "deleted", "lang")
    return [(f"row {i}", dict(zip(names, row, strict=True))) for i, row in enumerate(rows)]


def test_the_best_ranked_thread_of_each_tree():
    rows = tree(
        ("a", None, "prompter", "A", None, False, "en"),
        ("a3", "a", "assistant", "unranked", None, False, "en"),
        ("a1", "a", "assistant", "worse", 1, False, "en"),
        ("a2", "a", "assistant", "best", 0, False, "en"),
        ("a1x", "a1", "prompter", "no", None, False, "en"),
        ("a2x", "a2", "prompter", "deleted", 0, True, "en"),
        ("a2y", "a2", "prompter", "go on", 1, False, "en"),
        ("a2yz", "a2y", "assistant", "end", 0, False, "en"),
        ("a2yzq", "a2yz", "prompter", "unanswered", 0, False, "en"),
        ("b", None, "prompter", "B", None, False, "de"),
        ("b1", "b", "assistant", "ja", 0, False, "de"),
        ("c", None, "prompter", "C", None, False, "en"),
        ("d", None, "prompter", "D", None, True, "en"),
        ("d1", "d", "assistant", "no", None, False, "en"),
        ("e1", "e", "assistant", "no", None, False, "en"),
    )
    left_out = LeftOut()
    threads = [row["messages"] for _, row in best_threads(rows, "en", left_out)]
    assert [[m["content"] for m in t] for t in threads] == [["A", "best", "go on", "end"], ["C"]]
    assert left_out == {
        "language is not en": (1, "row 9: 'de'"), "deleted question": (1, "row 12"),
        "what it replies to is missing": (1, "row 14"),
    }  # fmt: skip
    assert len(list(best_threads(rows, "", LeftOut()))) == 3


def test_val_is_by_question_and_shares_none(tmp_path):
    rows = [{"question": f"Q{i % 150}", "answer": f"A{i}"} for i in range(300)]
    path = write_rows(tmp_path / "qa.jsonl", rows)
    train, val = load(path, 64, val_fraction=0.2)
    assert len(train) + len(val) == 300 and 30 <= len(val) <= 90
    questions = [{int(p.split()[-1]) % 150 for p in part.where} for part in (train, val)]
    assert not questions[0] & questions[1]
    # The same question is val whatever stands before it.
    _, again = load(write_rows(tmp_path / "reversed.jsonl", rows[::-1]), 64, val_fraction=0.2)
    assert sorted(map(bytes, again.tokens)) == sorted(map(bytes, val.tokens))
    few, few_val = load(path, 64, val_fraction=0.2, limit=10)
    assert len(few) + len(few_val) == 10


@pytest.mark.parametrize("fraction, sizes", [(1e-12, (8, 2)), (1 - 1e-12, (2, 8)), (0.0, (10, 0))])
def test_a_small_file_has_at_least_one_question_in_train_and_in_val(tmp_path, fraction, sizes):
    rows = [{"question": f"Q{i % 5}", "answer": f"A{i}"} for i in range(10)]
    found = load(write_rows(tmp_path / "qa.jsonl", rows), 64, val_fraction=fraction)
    assert tuple(map(len, found)) == sizes
    path = write_rows(tmp_path / "one.jsonl", [rows[0]] * 9)
    if fraction:
        with pytest.raises(ValueError, match="one question cannot be in train and in val"):
            load(path, 64, val_fraction=fraction)
