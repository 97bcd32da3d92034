"""Preference pairs: every form of row, what counts, what is left out, and the order of batches."""

import json

import numpy as np
import pytest
import torch

from gpt2.data.chat import ChatError, encode_prompt
from gpt2.data.preferences import PairLoader, encode_pair, load_pairs, pair_from_row
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer

TOKENIZER = ByteTokenizer()
USER = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": c} for c in ("Blue.", "Green!"))
PAIR = ([USER, BLUE], [USER, GREEN])
HH = "\n\nHuman: Sky?\n\nAssistant: "


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(messages) -> list[tuple]:
    return [(m["role"], m["content"].strip(), m.get("input") or "") for m in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green!"},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": "Blue.", "rejected": "Green!"},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"chosen": f"{HH}Blue.", "rejected": f"{HH}Green!"},
        {"prompt": HH, "chosen": " Blue.", "rejected": " Green!"},
        {"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green!"},
        {"instruction": "Sky?", "output_1": "Green!", "output_2": "Blue.", "preference": 2},
        {
            "context": [{"role": "prompter", "text": "Sky?"}],
            "chosen": "Blue.",
            "rejected": "Green!",
        },
    ],
)
def test_every_form_is_the_same_pair(row):
    assert [plain(m) for m in pair_from_row(row)] == [plain(m) for m in PAIR]
    system = {"role": "system", "content": "Be brief."}
    chosen, rejected = pair_from_row(row | {"system": "Be brief."})
    assert chosen[0] == rejected[0] == system and plain(chosen[1:]) == plain(PAIR[0])


def test_input_and_several_turns():
    chosen, _ = pair_from_row({"instruction": "Add", "input": "1", "chosen": "1", "rejected": "2"})
    assert plain(chosen) == [("user", "Add", "1"), ("assistant", "1", "")]
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    chosen, rejected = pair_from_row({"chosen": f"{text}d", "rejected": f"{text}e"})
    assert [r for r, _, _ in plain(chosen)] == ["user", "assistant"] * 2
    assert plain(chosen)[:3] == plain(rejected)[:3]


@pytest.mark.parametrize("template", ["user_assistant", "alpaca"])
def test_only_the_answers_after_the_shared_prompt_count(template):
    turns = [USER, {"role": "assistant", "content": "What of it?"}, USER]
    chosen, rejected, n = encode_pair(turns + [BLUE], turns + [GREEN], TOKENIZER, template)
    prompt = encode_prompt(turns, TOKENIZER, template)
    assert n == len(prompt)
    for (ids, learnt), answer in ((chosen, "Blue."), (rejected, "Green!")):
        assert ids[:n] == prompt
        assert learnt == [False] * n + [True] * (len(ids) - n)
        assert ids[n:] == [*answer.encode(), TOKENIZER.eot]


def test_answers_that_go_on_for_several_turns():
    more = [USER, {"role": "assistant", "content": "Yes"}]
    (ids, learnt), _, _ = encode_pair(PAIR[0] + more, PAIR[1], TOKENIZER, "user_assistant")
    counted = [t for t, is_counted in zip(ids, learnt, strict=True) if is_counted]
    assert counted == [*b"Blue.", 256, *b"Yes", 256]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Sky?", "chosen": "x", "rejected": ""}, "no answer"),
        ({"prompt": "Sky?", "chosen": None, "rejected": "x"}, "no answer"),
        ({"prompt": "Sky?", "chosen": "x", "rejected": "  "}, "no answer"),
        ({"prompt": "Sky?", "chosen": "x", "rejected": " x "}, "chosen and rejected are the same"),
        ({"prompt": "Sky?", "chosen": 3, "rejected": "x"}, "not text"),
        ({"prompt": "Sky?", "chosen": "<|user|>", "rejected": "x"}, "template marker in text"),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, "empty message"),
        ({"prompt": [], "chosen": [], "rejected": []}, "no answer"),
        ({"chosen": "x", "rejected": "y"}, "no prompt"),
        ({"prompt": "Sky?", "chosen": "x"}, "unknown fields"),
        (["x"], "unknown fields"),
        ({"output_1": "x", "output_2": "y", "preference": 0, "instruction": "i"}, "no preference"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "prompts differ",
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]}, "prompts differ"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": HH + "d"},
         "roles out of turn"),
        ({"chosen": [{"role": "robot", "content": "x"}, BLUE], "rejected": [USER, BLUE]},
         "unknown role"),
    ],
)  # fmt: skip
def test_bad_rows_end_the_run_or_are_counted(tmp_path, row, kind):
    good = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green!"}
    data = write(tmp_path / "pairs.jsonl", [good, row, good])
    options = dict(template="user_assistant")
    with pytest.raises(ValueError, match="line 2: .*--bad_rows skip"):
        load_pairs(data, TOKENIZER, 64, **options)
    pairs, _ = load_pairs(data, TOKENIZER, 64, bad_rows="skip", **options)
    assert len(pairs) == 4 and pairs.counts.rows == 3 and pairs.counts.used == 2
    assert {k: n for k, (n, _) in pairs.counts.left_out.items()} == {kind: 1}
    with pytest.raises(ChatError):
        encode_pair(*pair_from_row(row), TOKENIZER, "user_assistant")


def test_overlong_pairs_are_dropped_cut_or_refused(tmp_path):
    long = {"prompt": "Q" * 30, "chosen": "a" * 8, "rejected": "b" * 20}
    data = write(tmp_path / "pairs.jsonl", [long, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    # <|user|>\n 30 \n<|assistant|>\n 20 <|endoftext|>: 9 + 30 + 1 + 14 + 20 + 1 = 75 tokens.
    options = dict(template="user_assistant")
    assert len(load_pairs(data, TOKENIZER, 74, **options)[0]) == 4
    dropped, _ = load_pairs(data, TOKENIZER, 73, **options)
    assert len(dropped) == 2 and dropped.counts.left_out["longer than block_size"][0] == 1
    with pytest.raises(ValueError, match="line 1: .*--overlong drop or cut"):
        load_pairs(data, TOKENIZER, 73, overlong="error", **options)
    cut, _ = load_pairs(data, TOKENIZER, 50, overlong="cut", **options)
    assert cut.counts.cut == 1 and cut.counts.lines("pairs") == ["cut 1 pairs to fit block_size"]
    assert len(cut) == 4
    whole, _ = load_pairs(data, TOKENIZER, 74, **options)
    for half in (0, 1):  # both lose the same 24 tokens from the start, and no answer is touched
        (a, b), (c, d) = ((e - n, e) for x in (whole, cut)
                          for e, n in [(x.ends[half], x.lengths[half])])  # fmt: skip
        assert np.array_equal(whole.tokens[a + 24 : b], cut.tokens[c:d])
        assert np.array_equal(whole.learnt[a + 24 : b], cut.learnt[c:d])
    # An answer that does not fit with the marker before it is never cut.
    small, _ = load_pairs(data, TOKENIZER, 33, overlong="cut", **options)
    kind = "longer than block_size without its prompt"
    assert len(small) == 2 and small.counts.left_out[kind][0] == 1
    assert len(load_pairs(data, TOKENIZER, 34, overlong="cut", **options)[0]) == 4
    with pytest.raises(ValueError, match="no pair to train on in 2 rows: left out 2: longer"):
        load_pairs(data, TOKENIZER, 4, **options)


def numbered(tmp_path, n=23):
    rows = [{"prompt": f"{i}?", "chosen": "y" * (i + 1), "rejected": "n"} for i in range(n)]
    return load_pairs(
        write(tmp_path / "pairs.jsonl", rows), TOKENIZER, 96, template="user_assistant"
    )[0]


def question(row) -> str:
    return bytes(t for t in row.tolist() if t < 256).decode().split("\n")[1]


def test_batches_are_pure_and_cover_each_pair_once_an_epoch(tmp_path):
    pairs = numbered(tmp_path)
    loader = PairLoader(pairs, 96, seed=5, pad=TOKENIZER.eot)
    assert loader.n_windows == 23 and loader.block_size == 192
    seen = [question(idx[0]) for step in range(23) for idx in loader.batch(step, 2)[0]]
    assert sorted(seen[:23]) == sorted(seen[23:]) == sorted(f"{i}?" for i in range(23))
    assert seen[:23] != seen[23:]
    again = PairLoader(pairs, 96, seed=5, pad=TOKENIZER.eot)
    whole = again.batch(3, 8)
    for rank in range(4):
        part = loader.batch(3, 8, rank, 4)
        for mine, all_rows in zip(part, whole, strict=True):
            assert torch.equal(mine, all_rows[2 * rank : 2 * rank + 2, :, : mine.shape[2]])
    place = loader.provenance(3, 5, 8)
    assert place.document == loader.member(3 * 8 + 5) and "line" in place.shard
    assert PairLoader(pairs, 96, shuffle=False).member(24) == 1
    with pytest.raises(ValueError, match="row 8 is not one"):
        loader.provenance(3, 8, 8)


def test_rows_hold_shifted_targets_and_nothing_else(tmp_path):
    loader = PairLoader(numbered(tmp_path), 96, shuffle=False, pad=TOKENIZER.eot, trim=False)
    idx, targets = loader.batch(0, 23)
    assert idx.shape == targets.shape == (23, 2, 96) and idx.dtype == targets.dtype == torch.int64
    for i in range(23):
        for half, answer in enumerate(("y" * (i + 1), "n")):
            counted = targets[i, half] != -100
            assert targets[i, half][counted].tolist() == [*answer.encode(), TOKENIZER.eot]
            start = int(counted.nonzero()[0])
            text = f"<|user|>\n{i}?\n<|assistant|>\n"
            assert bytes(idx[i, half, : start + 1].tolist()) == text.encode()
            stop = start + len(answer) + 1
            assert counted[start:stop].all() and counted.sum() == stop - start
            assert idx[i, half, start + 1 : stop].tolist() == [*answer.encode()]
            assert (idx[i, half, stop:] == TOKENIZER.eot).all()
    trimmed = PairLoader(loader.pairs, 96, shuffle=False, pad=TOKENIZER.eot).batch(0, 23)
    assert trimmed[0].shape == (23, 2, 64)
    for part, whole in zip(trimmed, (idx, targets), strict=True):
        assert torch.equal(part, whole[..., :64])
    values = np.random.default_rng(0).normal(size=(23, 2)).astype(np.float32)
    loader.set_reference(values)
    assert loader.names == ("idx", "targets", "reference")
    assert np.array_equal(loader.batch(1, 5)[2].numpy(), values[5:10])
    with pytest.raises(ValueError, match=r"needs \(23, 2\) values"):
        loader.set_reference(values[:5])
    with pytest.raises(ValueError, match="2 to 31 tokens"):
        PairLoader(loader.pairs, 30)


def test_val_holds_whole_questions(tmp_path):
    rows = [
        {"prompt": f"{i % 40}?", "chosen": f"{i}", "rejected": f"no {i}"} for i in range(200)
    ]  # fmt: skip
    data = write(tmp_path / "pairs.jsonl", rows)
    train, val = load_pairs(data, TOKENIZER, 64, template="user_assistant", val_fraction=0.3)
    questions = []
    for part in (train, val):
        loader = PairLoader(part, 64)
        questions.append({question(row[0]) for row in loader.batch(0, loader.n_windows)[0]})
    assert len(train) + len(val) == 400 and all(questions)
    assert not questions[0] & questions[1] and len(questions[0] | questions[1]) == 40


@pytest.mark.parametrize(
    ("name", "rows", "used", "left_out"),
    [
        ("alpacafarm_gpt4_prefs.jsonl.xz", 5477, 5422,
         {"no answer": 3, "longer than block_size": 52}),
        ("hh_rlhf_harmless_base_test.jsonl.gz", 2312, 2203,
         {"no answer": 4, "longer than block_size": 96, "roles out of turn": 9}),
        ("oasst1_en_val_pairs.jsonl.xz", 1026, 760,
         {"longer than block_size": 265, "chosen and rejected are the same": 1}),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_real_data(shared_data, name, rows, used, left_out):
    data = str(shared_data / "dpo" / name)
    pairs, _ = load_pairs(
        data, GPT2Tokenizer(), 512, template="user_assistant", bad_rows="skip"
    )  # fmt: skip
    assert (pairs.counts.rows, pairs.counts.used, len(pairs)) == (rows, used, 2 * used)
    assert {kind: n for kind, (n, _) in pairs.counts.left_out.items()} == left_out
