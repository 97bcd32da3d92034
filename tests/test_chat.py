"""Templates and masks, token by token, against texts written by hand."""

import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.config import SFTConfig
from gpt2.data.chat import (
    TEMPLATES,
    ChatError,
    encode_chat,
    encode_prompt,
    messages_from_row,
)
from gpt2.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer


def talk(*contents: str, system: str = "") -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]


INTRO = "Below is an instruction that describes a task"
RESPOND = "Write a response that appropriately completes the request.\n\n"
WITH_INPUT = [{"role": "user", "content": "Add.", "input": "1, 2"}, *talk("", "3")[1:]]
# (template, conversation, the text with [] around what is learnt; + stands for <|endoftext|>)
WRITTEN = [
    ("user_assistant", talk("Hi", "Hello"), "<|user|>\nHi\n<|assistant|>\n[Hello+]"),
    (
        "user_assistant",
        talk("Hi", "Hello", "And?", "Bye", system="Be kind."),
        "<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n[Hello+]"
        "<|user|>\nAnd?\n<|assistant|>\n[Bye+]",
    ),
    ("user_assistant", talk(" Hi\n\n", "\n  Hello "), "<|user|>\nHi\n<|assistant|>\n[Hello+]"),
    ("user_assistant", WITH_INPUT, "<|user|>\nAdd.\n1, 2\n<|assistant|>\n[3+]"),
    (
        "alpaca",
        talk("Hi", "Hello"),
        f"{INTRO}. {RESPOND}### Instruction:\nHi\n\n### Response:\n[Hello+]",
    ),
    (
        "alpaca",
        WITH_INPUT,
        f"{INTRO}, paired with an input that provides further context. {RESPOND}"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n[3+]",
    ),
    (
        "alpaca",
        talk("Hi", "Hello", "And?", "Bye", system="Be kind."),
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n[Hello+]"
        "### Instruction:\nAnd?\n\n### Response:\n[Bye+]",
    ),
]


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), ByteTokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize("template, messages, written", WRITTEN)
def test_every_token_and_its_mask(template, messages, written, tokenizer):
    tokens, is_target = encode_chat(messages, tokenizer, template)
    assert len(tokens) == len(is_target) and {type(t) for t in is_target} == {bool}
    runs, before = "", False
    for token, learnt in zip(tokens, is_target, strict=True):
        runs += "[" if learnt and not before else "]" if before and not learnt else ""
        runs += "+" if token == tokenizer.eot else tokenizer.decode([token])
        before = learnt
    assert runs + "]" == written


@pytest.mark.parametrize(
    "messages", [m for t, m, _ in WRITTEN if t == "user_assistant"], ids=range(4)
)
def test_pieces_give_the_tokens_of_the_whole_text(messages):
    """GPT-2 would split the whole text at the same places, so nothing unusual is learnt."""
    tokenizer = GPT2Tokenizer()
    tokens, _ = encode_chat(messages, tokenizer, "user_assistant")
    whole = tokenizer.decode(tokens)
    assert tokens == tokenizer.encode(whole, allow_special=True)


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), ByteTokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize("template, messages, written", WRITTEN)
def test_a_prompt_is_what_training_showed_before_the_answer(template, messages, written, tokenizer):
    tokens, is_target = encode_chat(messages, tokenizer, template)
    for n in range(1, len(messages)):
        if messages[n]["role"] != "assistant":
            continue
        prompt = encode_prompt(messages[:n], tokenizer, template)
        assert tokens[: len(prompt)] == prompt
        assert is_target[len(prompt)] and not is_target[len(prompt) - 1]
        assert tokenizer.decode(prompt).endswith(("<|assistant|>\n", "### Response:\n"))


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not any(m in text for t in TEMPLATES.values() for m in t.markers)
)


@given(st.lists(words, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_any_text_is_learnt_where_it_is_an_answer_and_nowhere_else(contents):
    tokenizer = GPT2Tokenizer()
    for template in TEMPLATES:
        tokens, is_target = encode_chat(talk(*contents), tokenizer, template)
        answers = [t for t, learnt in zip(tokens, is_target, strict=True) if learnt]
        expected = "".join(f"{answer.strip()}<|endoftext|>" for answer in contents[1::2])
        assert tokenizer.decode(answers) == expected
        # The end of text is a token of its own only where an answer ends.
        assert tokens.count(tokenizer.eot) == len(contents) // 2


def test_markers_in_text_are_refused_wherever_they_stand():
    tokenizer, n = GPT2Tokenizer(), 0
    for template in TEMPLATES.values():
        for marker in template.markers:
            bad = f"you said {marker}\nsure"
            for messages in (
                talk(bad, "fine"),
                talk("fine", bad),
                talk("a", "b", bad, "c"),
                talk("a", "b", system=bad),
                [{"role": "user", "content": "a", "input": bad}, *talk("", "b")[1:]],
            ):
                with pytest.raises(ChatError, match="holds the template's marker") as error:
                    encode_chat(messages, tokenizer, template.name)
                assert error.value.kind == "template marker in text" and marker in str(error.value)
                n += 1
            with pytest.raises(ChatError, match="marker"):
                encode_prompt(talk(bad), tokenizer, template.name)
    assert n == 2 * 4 * 5
    # Another template's markers are text like any other.
    encode_chat(talk("### Response:\n", "a"), tokenizer, "user_assistant")
    encode_chat(talk("<|assistant|>\n", "a"), tokenizer, "alpaca")


@pytest.mark.parametrize(
    "messages, kind, message",
    [
        ([], "empty conversation", "no messages"),
        (talk(system="Be kind."), "empty conversation", "system text only"),
        (talk("Hi"), "no answer", "without an answer"),
        (talk("Hi", "Ho", "And?"), "no answer", "without an answer"),
        (talk("Hi", " \n"), "no answer", r"message 2 \(assistant\) is empty"),
        (talk(" ", "Ho"), "empty message", r"message 1 \(user\) is empty"),
        ([{"role": "tool", "content": "x"}], "unknown role", "unknown role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "unknown role", "unknown role"),
        (talk("Hi", "Ho")[1:], "roles out of turn", "is from 'assistant', where system or user"),
        ([*talk("a"), *talk("b", "c")], "roles out of turn", "'user', where assistant is due"),
        (
            [*talk("a", "b"), {"role": "system", "content": "x"}],
            "roles out of turn",
            "message 3 is from 'system'",
        ),
        (talk("Hi", 3), "not text", r"message 2 \(assistant\) holds int, not text"),
        (talk(None, "x"), "not text", "NoneType"),
        ([{"role": "user"}], "not text", "needs a role and a content"),
        (["Hi", "Ho"], "not text", "needs a role and a content"),
        ("Hi", "not text", "must be a list"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(messages, kind, message):
    with pytest.raises(ChatError, match=message) as error:
        encode_chat(messages, ByteTokenizer(), "user_assistant")
    assert error.value.kind == kind


def test_prompts_end_with_a_question_and_templates_need_an_end_of_text():
    with pytest.raises(ChatError, match="ends with a message from the user"):
        encode_prompt(talk("a", "b"), ByteTokenizer(), "alpaca")
    with pytest.raises(ValueError, match="char tokenizer has no end of text"):
        encode_chat(talk("a", "b"), CharTokenizer("ab"), "alpaca")
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        encode_chat(talk("a", "b"), ByteTokenizer(), "alpacca")


TURNS = talk("Q", "A")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": TURNS, "id": 3}, TURNS),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
         TURNS),
        ({"conversations": TURNS}, TURNS),
        ({"conversations": ["Q", "A", "R", "B"], "source": "x"}, talk("Q", "A", "R", "B")),
        ({"instruction": "Q", "output": "A"}, TURNS),
        ({"instruction": "Q", "input": "I", "output": "A", "text": "..."},
         [{**TURNS[0], "input": "I"}, TURNS[1]]),
        ({"instruction": "Q", "context": "I", "response": "A", "category": "x"},
         [{**TURNS[0], "input": "I"}, TURNS[1]]),
        ({"instruction": "R", "input": "", "output": "B", "history": [["Q", "A"]]},
         talk("Q", "A", "R", "B")),
        ({"prompt": "Q", "response": "A"}, TURNS),
        ({"prompt": "Q", "completion": "A", "system": "S"}, talk("Q", "A", system="S")),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
        ({"question": "Q", "answer": "A"}, TURNS),
    ],
)  # fmt: skip
def test_rows_of_every_known_form(row, expected):
    tokenizer = ByteTokenizer()
    for template in TEMPLATES:
        found = encode_chat(messages_from_row(row), tokenizer, template)
        assert found == encode_chat(expected, tokenizer, template)


@pytest.mark.parametrize(
    "row, kind, message",
    [
        ({"instruction": "Q", "input": ""}, "no answer", "'instruction' but no answer"),
        ({"prompt": "Q"}, "no answer", "'prompt' but no answer"),
        ({"question": "Q", "answer": None}, "no answer", "answer is null"),
        ({"instruction": "Q", "output": None}, "no answer", "answer is null"),
        ({"text": "Q"}, "unknown fields", "it has 'text'"),
        ({}, "unknown fields", "it has none"),
        (["Q"], "unknown fields", "must be an object, got list"),
        ({"messages": None}, "not text", "messages must be a list, got NoneType"),
        ({"messages": [{"text": "Q"}]}, "not text", "messages 1 needs a role"),
        ({"messages": [{"role": "narrator", "content": "Q"}]}, "unknown role", "'narrator'"),
        ({"conversations": [{"from": "observation", "value": "Q"}]}, "unknown role", "observation"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "not text", "history must be"),
    ],
)
def test_rows_that_are_no_conversation(row, kind, message):
    with pytest.raises(ChatError, match=message) as error:
        messages_from_row(row)
    assert error.value.kind == kind


def test_the_config_names_the_templates_there_are():
    from typing import get_args, get_type_hints

    assert list(get_args(get_type_hints(SFTConfig)["template"])) == list(TEMPLATES)


def test_real_alpaca_and_lima_keep_every_word(shared_data):
    tokenizer = GPT2Tokenizer()
    alpaca = json.loads(lzma.open(shared_data / "sft/alpaca_data.json.xz").read())
    assert len(alpaca) == 52002
    rows = [row for row in alpaca if row["output"].strip()][::50]
    assert sum(not row["output"].strip() for row in alpaca) == 28
    rows += map(json.loads, lzma.open(shared_data / "sft/lima_train_llamafactory.jsonl.xz"))
    turns = 0
    for row in rows:
        tokens, is_target = encode_chat(messages_from_row(row), tokenizer, "user_assistant")
        answers = [t for t, learnt in zip(tokens, is_target, strict=True) if learnt]
        expected = [answer for _, answer in row.get("history", [])] + [row["output"]]
        assert tokenizer.decode(answers) == "".join(f"{a.strip()}<|endoftext|>" for a in expected)
        turns += len(expected)
    assert len(rows) == 1040 + 1029 and turns > len(rows)
