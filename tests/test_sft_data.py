"""Rows of conversations: packing, order, coverage, masks, and where they come from."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import GPTConfig
from gpt2.data.conversations import Counts, best_threads, read_conversations
from gpt2.data.sft import (
    IGNORE_INDEX,
    ConversationLoader,
    Conversations,
    best_fit_decreasing,
    load_conversations,
)
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer
from gpt2.train import objectives

TOKENIZER = ByteTokenizer()


def conversations(lengths, learnt_from=2) -> Conversations:
    """Conversation i is the tokens 100 i, 100 i + 1, ...; learnt from its third token on."""
    tokens = [100 * i + np.arange(n) for i, n in enumerate(lengths)]
    learnt = [np.arange(n) >= learnt_from for n in lengths]
    return Conversations(
        np.concatenate(tokens).astype(np.uint16), np.concatenate(learnt), np.cumsum(lengths),
        [f"row {i}" for i in range(len(lengths))],
    )  # fmt: skip


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
    assert IGNORE_INDEX == objectives.IGNORE_INDEX
    places = [loader.provenance(0, 0, 1, t)[:2] for t in range(10)]
    assert places[0] == ("row 2", 0) and places[6] == ("row 0", 2) and places[8] == ("row 1", 1)
    assert places[9] == loader.provenance(0, 0, 1, 10)[:2] == ("row 1", 2)


def test_padded_rows_hold_one_conversation_each():
    loader = ConversationLoader(conversations([4, 2]), 4, shuffle=False, packing=False, pad=9)
    idx, targets, doc_start = loader.batch(0, 2)
    assert idx.tolist() == [[0, 1, 2, 9], [100, 9, 9, 9]]
    assert targets.tolist() == [[-100, 2, 3, -100], [-100] * 4]
    assert doc_start.tolist() == [[0, 0, 0, 3], [0, 1, 2, 3]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_packing_is_best_fit_decreasing(lengths, capacity):
    bins = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert bins == best_fit_decreasing(np.array(lengths), capacity)
    # The same by looking at every bin: which of two equally full bins is taken changes no load.
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [b for b, load in enumerate(loads) if load + length <= capacity]
        if fits:
            loads[max(fits, key=lambda b: loads[b])] += length
        else:
            loads.append(length)
    assert sorted(sum(lengths[i] for i in b) for b in bins) == sorted(loads)


@pytest.fixture
def many() -> ConversationLoader:
    rng = np.random.default_rng(0)
    return ConversationLoader(conversations(rng.integers(2, 33, 200)), 32, seed=5)


def seen(loader, first: int, n: int) -> list[int]:
    return [i for sample in range(first, first + n) for i in loader.members(sample)]


def test_each_conversation_once_an_epoch_in_another_order(many):
    n = many.n_windows
    assert n < 120  # of 200 conversations: they are packed
    epochs = [seen(many, epoch * n, n) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    ordered = ConversationLoader(many.conversations, 32, seed=5, shuffle=False)
    assert sorted(epochs[0]) == sorted(seen(ordered, 0, n)) and seen(ordered, 0, n) != epochs[0]
    other = ConversationLoader(many.conversations, 32, seed=6)
    assert seen(other, 0, n) != epochs[0]


def test_ranks_share_the_rows_of_one(many):
    for step in (0, 7, 40):
        whole = many.batch(step, 8)
        for world_size in (2, 4):
            parts = [many.batch(step, 8, rank, world_size) for rank in range(world_size)]
            for one, split in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(one, torch.cat(split))
    # A pure function of the step: neither what was asked before nor a reused buffer shows.
    buffers = many.buffers(8)
    for step in (40, 3, 40):
        assert all(
            torch.equal(a, b)
            for a, b in zip(many.batch(step, 8, out=buffers), many.batch(step, 8), strict=True)
        )
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        many.batch(0, 8, 0, 3)


def test_rows_hold_their_conversations_and_nothing_across(many):
    data = many.conversations
    for sample in range(many.n_windows):
        (idx,), (targets,), (doc_start,) = (p.tolist() for p in many.batch(sample, 1))
        at = 0
        for i in many.members(sample):
            tokens = data.tokens[data.ends[i] - data.lengths[i] : data.ends[i]].tolist()
            stop = at + len(tokens) - 1
            assert idx[at:stop] == tokens[:-1] and doc_start[at:stop] == [at] * len(tokens[1:])
            assert targets[at:stop] == [-100] * (len(tokens) > 1) + tokens[2:]
            at = stop
        assert doc_start[at:] == list(range(at, 32)) and set(targets[at:]) <= {-100}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QA = [{"question": f"What is {i} + {i}?", "answer": "It is " + "one more than " * i} for i in
      range(12)]  # fmt: skip


LONG = {"question": "q" * 10, "answer": "a" * 100}  # 34 tokens before the answer, 101 in it
LATE = {"question": "q" * 100, "answer": "a" * 5}
SHORT = [{"question": "q", "answer": "a" * i} for i in (1, 5, 9)]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_packed_padded_and_alone_give_the_same_losses(tmp_path, kernels):
    """Each token's loss, conversation by conversation; without doc_start they would differ."""
    # Interpreted, Triton's kernels are slow: three short ones in one row.
    rows, block = (SHORT, 128) if kernels == "triton" else (QA, 256)
    data, _ = load_conversations(
        write(tmp_path / "qa.jsonl", rows), TOKENIZER, block, template="user_assistant"
    )
    shape = GPTConfig(
        n_layer=1 if kernels == "triton" else 2,
        n_head=2,
        n_embd=32,
        block_size=block,
        vocab_size=257,
    )
    model = GPT(shape, kernels)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # clear preferences: what a token sees makes a difference
    if kernels == "torch":
        model = model.double()

    @torch.no_grad()
    def losses(idx, targets, doc_start):
        logits = model(idx, doc_start=doc_start)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(targets)

    def of_each(loader, hide=True):
        found = {}
        for sample in range(loader.n_windows):
            idx, targets, doc_start = loader.batch(sample, 1)
            row = losses(idx, targets, doc_start if hide else torch.zeros_like(doc_start))[0]
            at = 0
            for i in loader.members(sample):
                stop = at + int(data.lengths[i]) - 1
                found[i] = row[at:stop]
                at = stop
        return found

    packed = ConversationLoader(data, block)
    padded = ConversationLoader(data, block, packing=False)
    assert packed.n_windows < len(data) == padded.n_windows
    tolerance = dict(rtol=1e-4, atol=1e-5) if kernels == "triton" else dict(rtol=1e-12, atol=1e-12)
    a, b, open_rows = of_each(packed), of_each(padded), of_each(packed, hide=False)
    differ = 0
    for i in range(len(data)):
        tokens = torch.tensor(data.tokens[data.ends[i] - data.lengths[i] : data.ends[i]].tolist())
        learnt = torch.tensor(data.learnt[data.ends[i] - data.lengths[i] : data.ends[i]])
        targets = torch.where(learnt[1:], tokens[1:], -100)
        alone = losses(tokens[None, :-1], targets[None], None)[0]
        assert (alone > 0).sum() == learnt.sum() > 1
        torch.testing.assert_close(a[i], alone, **tolerance)
        torch.testing.assert_close(b[i], alone, **tolerance)
        differ += not torch.allclose(open_rows[i], alone, rtol=1e-2)
    assert differ == len(data) - packed.n_windows > 0  # all but the first of each row


@pytest.mark.parametrize("overlong", ["drop", "cut", "error"])
def test_what_does_not_fit(tmp_path, overlong):
    path = write(tmp_path / "qa.jsonl", [*SHORT, LONG, LATE])

    def load():
        return load_conversations(
            path, TOKENIZER, 63, template="user_assistant", overlong=overlong
        )[0]

    if overlong == "error":
        match = "line 4: the conversation has 135 tokens, but a row of block_size 63 holds 64"
        with pytest.raises(ValueError, match=match):
            load()
        return
    data = load()
    kept = [TOKENIZER.decode(data.tokens[e - n : e].tolist()) for e, n in
            zip(data.ends, data.lengths, strict=True)]  # fmt: skip
    if overlong == "drop":
        assert len(data) == data.counts.used == 3 and data.counts.cut == 0
        n, first = data.counts.left_out["longer than block_size"]
        assert n == 2 and "line 4" in first
    else:
        assert data.counts.cut == 1 and len(data) == data.counts.used == 4
        assert kept[3].endswith("\n<|assistant|>\n" + "a" * 30) and len(kept[3]) == 64
        [(kind, (n, first))] = data.counts.left_out.items()
        assert n == 1 and kind == "longer than block_size, and cut before its first answer"
        assert "line 5" in first
    assert data.counts.rows == 5
    text = "\n".join(data.counts.lines())
    assert ("left out 2: longer" if overlong == "drop" else "cut 1 conversations") in text


BAD_ROWS = [
    ({"question": "q"}, "no answer"),
    ({"messages": []}, "empty conversation"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
    ({"question": "say <|assistant|>", "answer": "no"}, "template marker in text"),
    ({"question": "q", "answer": ["a"]}, "not text"),
    ({"text": "x"}, "unknown fields"),
    (["q", "a"], "unknown fields"),
]


def test_rows_that_cannot_be_used_end_the_run_or_are_counted(tmp_path):
    for row, kind in BAD_ROWS:
        path = write(tmp_path / "bad.jsonl", [QA[0], row, QA[1], row])
        match = r"bad\.jsonl: line 2: .*; --bad_rows skip leaves such rows out"
        with pytest.raises(ValueError, match=match):
            load_conversations(path, TOKENIZER, 256, template="user_assistant")
        data, _ = load_conversations(
            path, TOKENIZER, 256, template="user_assistant", bad_rows="skip"
        )
        assert len(data) == 2 and data.where == [f"{path}: line 1", f"{path}: line 3"]
        [(found, (n, first))] = data.counts.left_out.items()
        assert (found, n) == (kind, 2) and first.startswith(f"{path}: line 2: ")
    path = write(tmp_path / "none.jsonl", [row for row, _ in BAD_ROWS])
    with pytest.raises(ValueError, match="no conversation to train on in 7 rows: left out 1: no a"):
        load_conversations(path, TOKENIZER, 256, template="user_assistant", bad_rows="skip")
    with pytest.raises(ValueError, match="line 2 is not UTF-8 JSON"):
        (tmp_path / "broken.jsonl").write_text(json.dumps(QA[0]) + '\n{"question": \n')
        load_conversations(str(tmp_path / "broken.jsonl"), TOKENIZER, 256, template="alpaca")


def test_every_kind_of_file_and_of_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "".join(json.dumps(row) + "\n" for row in QA)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(text.splitlines(True)[:5]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(text.splitlines(True)[5:]).encode()))
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(QA))
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(QA), tmp_path / "parquet" / "rows.parquet")
    expected = [messages for _, messages in read_conversations(str(folder), Counts())]
    assert len(expected) == 12 and expected[3][0]["content"] == "What is 3 + 3?"
    for name in ("rows.jsonl.xz", "rows.json", "parquet", "parquet/rows.parquet"):
        found = read_conversations(str(tmp_path / name), Counts())
        assert [messages for _, messages in found] == expected, name
    both = list(read_conversations(f"{folder}, {tmp_path / 'rows.json'}", Counts()))
    assert [messages for _, messages in both] == expected * 2
    conversation = {"messages": expected[0], "n": 1}
    pq.write_table(pa.Table.from_pylist([conversation] * 3), tmp_path / "nested.parquet")
    nested = [m for _, m in read_conversations(str(tmp_path / "nested.parquet"), Counts())]
    assert nested == expected[:1] * 3


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """datasets.load_dataset reads local JSON lines in place of the hub's data."""
    import datasets

    asked, load = [], datasets.load_dataset

    def load_local(repo, name=None, *, split, streaming, revision):
        asked.append((repo, name, split))
        return load("json", data_files=str(tmp_path / "hub.jsonl"), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return asked


@pytest.mark.parametrize(
    "name, repo, config, row",
    [
        ("alpaca", "tatsu-lab/alpaca", None,
         {"instruction": "Q", "input": "I", "output": "A", "text": "..."}),
        ("dolly", "databricks/databricks-dolly-15k", None,
         {"instruction": "Q", "context": "I", "response": "A", "category": "open_qa"}),
        ("tulu2", "allenai/tulu-v2-sft-mixture", None,
         {"dataset": "flan_v2", "id": "1", "messages": [{"role": "user", "content": "Q\nI"},
                                                       {"role": "assistant", "content": "A"}]}),
        ("gsm8k", "openai/gsm8k", "main", {"question": "Q\nI", "answer": "A"}),
    ],
)  # fmt: skip
def test_known_data_sets_of_the_hub(tmp_path, hub, name, repo, config, row):
    write(tmp_path / "hub.jsonl", [row] * 2)
    data, _ = load_conversations(name, TOKENIZER, 256, template="user_assistant")
    assert hub == [(repo, config, "train")] and data.where == [f"{repo}: row 1", f"{repo}: row 2"]
    text = "<|user|>\nQ\nI\n<|assistant|>\nA<|endoftext|>"
    assert TOKENIZER.decode(data.tokens.tolist()) == 2 * text


def test_lima_is_read_from_a_folder_or_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="GAIR/lima is gated: accept its licence") as error:
        list(read_conversations("lima", Counts()))
    assert "hf download GAIR/lima train.jsonl" in str(error.value)
    assert "data/lima" in str(error.value)
    (tmp_path / "data" / "lima").mkdir(parents=True)
    write(tmp_path / "data/lima/train.jsonl", [{"conversations": ["Q", "A"], "source": "x"}])
    [(_, messages)] = read_conversations("lima", Counts())
    assert [m["content"] for m in messages] == ["Q", "A"]


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(OSError, match="did you mean 'alpaca'"):
        list(read_conversations("alpacca", Counts()))
    with pytest.raises(OSError, match="known data set"):
        list(read_conversations(str(tmp_path / "none.jsonl"), Counts()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no JSON or parquet files"):
        list(read_conversations(str(tmp_path / "empty"), Counts()))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no conversation to train on in 0 rows: it is empty"):
        load_conversations(str(tmp_path / "empty.jsonl"), TOKENIZER, 64, template="alpaca")


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
    counts = Counts()
    threads = [row["messages"] for _, row in best_threads(rows, "en", counts)]
    assert [[m["content"] for m in t] for t in threads] == [["A", "best", "go on", "end"], ["C"]]
    assert counts.left_out == {
        "language is not en": (1, "row 9: de"), "deleted question": (1, "row 12"),
        "what it replies to is missing": (1, "row 14"),
    }  # fmt: skip
    assert counts.rows == 3
    assert len(list(best_threads(rows, "", Counts()))) == 3


def test_val_is_by_question_and_shares_none(tmp_path):
    rows = [{"question": f"Q{i % 150}", "answer": f"A{i}"} for i in range(300)]
    path = write(tmp_path / "qa.jsonl", rows)

    def load(data: str, **options):
        return load_conversations(
            data, TOKENIZER, 64, template="user_assistant", val_fraction=0.2, **options
        )

    train, val = load(path)
    assert len(train) + len(val) == 300 and 30 <= len(val) <= 90

    def questions(part):
        return {int(place.split()[-1]) % 150 for place in part.where}

    assert not questions(train) & questions(val)
    # The same question is val whatever stands before it.
    again, again_val = load(write(tmp_path / "reversed.jsonl", rows[::-1]))
    assert np.array_equal(np.sort(again_val.tokens), np.sort(val.tokens))
    few, few_val = load(path, max_conversations=10)
    assert len(few) + len(few_val) == 10 == few.counts.rows


def test_loader_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"2 to 9 tokens for block_size 8, got 3 to 10"):
        ConversationLoader(conversations([3, 10]), 8)
    with pytest.raises(ValueError, match="got 1 to 3"):
        ConversationLoader(conversations([3, 1]), 8)
    with pytest.raises(ValueError, match="no conversations"):
        ConversationLoader(conversations([3]).select(np.array([], dtype=int)), 8)
    with pytest.raises(ValueError, match="block_size must lie in"):
        ConversationLoader(conversations([3]), 0)


@pytest.mark.parametrize(
    "name, rows, used, left_out",
    [
        # 191 trees; of three only one reply is there.
        (
            "oasst1_en_validation.jsonl.xz",
            191,
            178,
            {"what it replies to is missing": 3, "longer than block_size": 10},
        ),
        ("lima_train_llamafactory.jsonl.xz", 1029, 841, {"longer than block_size": 188}),
        ("gsm8k_train.jsonl.xz", 7473, 7473, {}),
    ],
)
def test_real_files(shared_data, name, rows, used, left_out):
    data, _ = load_conversations(
        str(shared_data / "sft" / name), GPT2Tokenizer(), 1024, template="user_assistant"
    )
    counts = data.counts
    assert (counts.rows, counts.used, len(data)) == (rows, used, used)
    assert {kind: n for kind, (n, _) in counts.left_out.items()} == left_out
    loader = ConversationLoader(data, 1024)
    assert loader.n_filled / loader.n_tokens > 0.98 and loader.n_windows < len(data) / 2
