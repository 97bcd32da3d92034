"""Preference pairs: every form of row, what counts, what is left out, and the order of batches."""

import numpy as np
import pytest
import torch

from gpt2.data.chat import ChatError, encode_prompt
from gpt2.data.preferences import PairLoader, encode_pair, load_pairs, pair_from_row
from gpt2.data.sft import ConversationLoader, load_conversations
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer

from .conftest import equal, write_rows

TOKENIZER = ByteTokenizer()
USER = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": c} for c in ("Blue.", "Green!"))
HH = "\n\nHuman: Sky?\n\nAssistant: "
HALVES = ("chosen", "rejected")
ANSWERS = {"chosen": "Blue.", "rejected": "Green!"}
GOOD = {"prompt": "Sky?"} | ANSWERS


def load(data: str, block_size: int = 64, **options):
    return load_pairs(data, TOKENIZER, block_size, template="user_assistant", **options)


def plain(messages) -> list[tuple]:
    return [(m["role"], m["content"].strip(), m.get("input") or "") for m in messages]


def both(prompt: str, a: str, b: str) -> dict:
    return {"chosen": f"{prompt}{a}", "rejected": f"{prompt}{b}"}


ADD = [{"role": "user", "content": "Add", "input": "1"}]
TURNS = [USER, {"role": "assistant", "content": "What of it?"}, USER]


@pytest.mark.parametrize(
    "row, prompt",
    [
        (GOOD, [USER]),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, [USER]),
        ({"prompt": [USER]} | ANSWERS, [USER]),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        (both(HH, "Blue.", "Green!"), [USER]),
        (both(f"{HH}What of it?{HH}", "Blue.", "Green!"), TURNS),
        ({"prompt": HH, "chosen": " Blue.", "rejected": " Green!"}, [USER]),
        ({"instruction": "Sky?", "input": ""} | ANSWERS, [USER]),
        ({"instruction": "Add", "input": "1"} | ANSWERS, ADD),
        ({"instruction": "Sky?", "output_1": "Green!", "output_2": "Blue.", "preference": 2},
         [USER]),
        ({"context": [{"role": "prompter", "text": "Sky?"}]} | ANSWERS, [USER]),
    ],
)  # fmt: skip
def test_every_form_of_a_pair(row, prompt):
    pair = [plain([*prompt, answer]) for answer in (BLUE, GREEN)]
    assert [plain(messages) for messages in pair_from_row(row)] == pair
    system = {"role": "system", "content": "Be brief."}
    for messages, expected in zip(pair_from_row(row | {"system": "Be brief."}), pair, strict=True):
        assert messages[0] == system and plain(messages[1:]) == expected


@pytest.mark.parametrize("template", ["user_assistant", "alpaca"])
def test_only_the_answers_after_the_shared_prompt_count(template):
    chosen, rejected, n = encode_pair(TURNS + [BLUE], TURNS + [GREEN], TOKENIZER, template)
    prompt = encode_prompt(TURNS, TOKENIZER, template)
    assert n == len(prompt)
    for (ids, learnt), answer in ((chosen, "Blue."), (rejected, "Green!")):
        assert ids[:n] == prompt
        assert learnt == [False] * n + [True] * (len(ids) - n)
        assert ids[n:] == [*answer.encode(), TOKENIZER.eot]


def test_answers_that_go_on_for_several_turns():
    more = [USER, {"role": "assistant", "content": "Yes"}]
    for weight, answers in ((1, [*b"Blue.", 256, *b"Yes", 256]), (0, [*b"Yes", 256])):
        first = [USER, BLUE | {"weight": weight}]
        (ids, learnt), _, _ = encode_pair(first + more, [USER, GREEN], TOKENIZER, "user_assistant")
        assert [t for t, is_counted in zip(ids, learnt, strict=True) if is_counted] == answers


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Sky?", "chosen": "x", "rejected": ""}, "no answer"),
        ({"prompt": "Sky?", "chosen": None, "rejected": "x"}, "no answer"),
        ({"prompt": "Sky?", "chosen": "x", "rejected": "  "}, "no answer"),
        ({"prompt": "Sky?", "chosen": "x", "rejected": " x "}, "chosen and rejected are the same"),
        ({"prompt": "Sky?", "chosen": 3, "rejected": "x"}, "not text"),
        ({"prompt": "Sky?", "chosen": "<|user|>", "rejected": "x"}, "template marker in text"),
        ({"prompt": [], "chosen": [], "rejected": []}, "no answer"),
        ({"chosen": "x", "rejected": "y"}, "no prompt"),
        ({"prompt": "Sky?", "chosen": "x"}, "unknown fields"),
        (["x"], "unknown fields"),
        ({"output_1": "x", "output_2": "y", "preference": 0, "instruction": "i"}, "no preference"),
        ({"chosen": f"{HH}x", "rejected": HH.replace("Sky", "Sea") + "x"}, "prompts differ"),
        ({"prompt": [USER], "chosen": [BLUE | {"weight": 0}], "rejected": "x"}, "nothing to learn"),
        ({"prompt": [USER, BLUE, USER], "chosen": [GREEN | {"weight": 0}], "rejected": "x"},
         "nothing to learn"),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]}, "prompts differ"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": HH + "d"},
         "roles out of turn"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair(row, kind):
    with pytest.raises(ChatError) as error:
        encode_pair(*pair_from_row(row), TOKENIZER, "user_assistant")
    assert error.value.kind == kind


def test_a_bad_pair_ends_the_run_or_is_counted(tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": ""}, GOOD])
    with pytest.raises(ValueError, match="line 2: chosen is empty; --bad_rows skip"):
        load(data)
    pairs, _ = load(data, bad_rows="skip")
    assert pairs.left_out == {"no answer": (1, f"{data}: line 2: chosen is empty")}
    assert pairs.where == [f"{data}: line {n} {half}" for n in (1, 3) for half in HALVES]


def test_overlong_pairs_are_dropped_or_cut(tmp_path):
    long = {"prompt": "Q" * 30, "chosen": "a" * 8, "rejected": "b" * 20}
    short = {"prompt": "q", "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "pairs.jsonl", [long, short])
    # <|user|>\n 30 \n<|assistant|>\n 20 <|endoftext|>: 9 + 30 + 1 + 14 + 20 + 1 = 75 tokens.
    whole, _ = load(data, 74)
    dropped, _ = load(data, 73)
    assert dropped.left_out["longer than block_size"][0] == 1
    cut, _ = load(data, 50, overlong="cut")
    assert cut.log() == [f"{data}: cut 1 to fit block_size"]
    assert (len(whole), len(dropped), len(cut)) == (4, 2, 4)
    for half in (0, 1):  # both lose the same 24 tokens from the start, and no answer is touched
        assert np.array_equal(whole.tokens[half][24:], cut.tokens[half])
        assert np.array_equal(whole.learnt[half][24:], cut.learnt[half])
    # An answer that does not fit with the marker before it is never cut.
    small, _ = load(data, 33, overlong="cut")
    kind = "longer than block_size without its prompt"
    assert len(small) == 2 and small.left_out[kind][0] == 1
    assert len(load(data, 34, overlong="cut")[0]) == 4


@pytest.fixture
def pairs(tmp_path):
    """23 pairs; the chosen answer of pair i is i + 1 times y."""
    rows = [{"prompt": f"{i}?", "chosen": "y" * (i + 1), "rejected": "n"} for i in range(23)]
    return load(write_rows(tmp_path / "pairs.jsonl", rows), 96)[0]


def question(row) -> str:
    return bytes(t for t in row.tolist() if t < 256).decode().split("\n")[1]


def test_the_place_of_a_token_names_pair_and_half(pairs):
    """Order, epochs and ranks are those of packed conversations; see test_sft_data."""
    loader = PairLoader(pairs, 96, seed=5, pad=TOKENIZER.eot)
    assert (loader.n_windows, loader.block_size, loader.full_rows) == (23, 192, False)
    pair = loader.index(3 * 8 + 5)
    assert question(loader.batch(3, 8)[0][5, 0]) == f"{pair}?" != "29?"
    first, second = (length - 1 for length in pairs.lengths[2 * pair : 2 * pair + 2])
    for token, half, offset in [(0, 0, 0), (5, 0, 5), (95, 0, first), (99, 1, 3), (192, 1, second)]:
        place = loader.provenance(3, 5, 8, token)
        assert (place.document, place.offset) == (2 * pair + 1 + half, offset)
        assert place.shard.endswith(f"line {pair + 1} {HALVES[half]}")


def test_rows_hold_shifted_targets_and_nothing_else(pairs):
    loader = PairLoader(pairs, 96, shuffle=False, pad=TOKENIZER.eot, trim=False)
    idx, targets = loader.batch(0, 23)
    assert idx.shape == targets.shape == (23, 2, 96) and idx.dtype == targets.dtype == torch.int64
    for i in range(23):
        for half, answer in enumerate((b"y" * (i + 1), b"n")):
            before = f"<|user|>\n{i}?\n<|assistant|>\n".encode()
            rest = 96 - len(before) - len(answer)
            assert idx[i, half].tolist() == [*before, *answer, *[TOKENIZER.eot] * rest]
            no = [-100] * (len(before) - 1), [-100] * rest
            assert targets[i, half].tolist() == [*no[0], *answer, TOKENIZER.eot, *no[1]]
    trimmed = PairLoader(pairs, 96, shuffle=False, pad=TOKENIZER.eot).batch(0, 23)
    assert trimmed[0].shape == (23, 2, 64)
    assert equal(trimmed, (idx[..., :64], targets[..., :64]))


SFT, DPO = (load_conversations, 1024, 1), (load_pairs, 512, 2)


@pytest.mark.parametrize(
    "kind, name, used, left_out",
    [
        # 191 trees; of three only one reply is there.
        (SFT, "sft/oasst1_en_validation.jsonl.xz", 178,
         {"what it replies to is missing": 3, "longer than block_size": 10}),
        (SFT, "sft/lima_train_llamafactory.jsonl.xz", 841, {"longer than block_size": 188}),
        (SFT, "sft/gsm8k_train.jsonl.xz", 7473, {}),
        (DPO, "dpo/alpacafarm_gpt4_prefs.jsonl.xz", 5422,
         {"no answer": 3, "longer than block_size": 52}),
        (DPO, "dpo/hh_rlhf_harmless_base_test.jsonl.gz", 2203,
         {"no answer": 4, "longer than block_size": 96, "roles out of turn": 9}),
        (DPO, "dpo/oasst1_en_val_pairs.jsonl.xz", 760,
         {"longer than block_size": 265, "chosen and rejected are the same": 1}),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_real_data(shared_data, kind, name, used, left_out):
    load, size, parts = kind
    data, _ = load(
        str(shared_data / name), GPT2Tokenizer(), size, template="user_assistant", bad_rows="skip"
    )
    assert len(data) == parts * used
    assert {kind: n for kind, (n, _) in data.left_out.items()} == left_out
    if kind is SFT:
        loader = ConversationLoader(data, size)
        assert loader.n_filled / loader.n_tokens > 0.98 and loader.n_windows < used / 2
