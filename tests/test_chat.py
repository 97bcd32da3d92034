"""Templates and masks, token by token, against texts written by hand."""

from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from gpt2.config import SFTConfig
from gpt2.data.chat import (
    TEMPLATES,
    ChatError,
    encode_chat,
    encode_prompt,
    jinja,
    messages_from_row,
)
from gpt2.data.conversations import read_rows
from gpt2.data.files import LeftOut
from gpt2.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer

BYTES, BPE = ByteTokenizer(), GPT2Tokenizer()


def talk(*contents: str, system: str = "") -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
    ]


INTRO = "Below is an instruction that describes a task"
RESPOND = "Write a response that appropriately completes the request.\n\n"
WITH_INPUT = [{"role": "user", "content": "Add.", "input": "1, 2"}, *talk("", "3")[1:]]
WEIGHTED = talk("Hi", "No", "And?", "Bye")
WEIGHTED[1]["weight"], WEIGHTED[3]["weight"] = 0, 1
# (template, conversation, the text with [] around what is learnt; + stands for <|endoftext|>)
WRITTEN = [
    ("user_assistant", talk("Hi", "Hello"), "<|user|>\nHi\n<|assistant|>\n[Hello+]"),
    ("user_assistant", talk("Hi", "Hello", "And?", "Bye", system="Be kind."),
     "<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n[Hello+]"
     "<|user|>\nAnd?\n<|assistant|>\n[Bye+]"),
    ("user_assistant", talk(" Hi\n\n", "\n  Hello "), "<|user|>\nHi\n<|assistant|>\n[Hello+]"),
    ("user_assistant", talk("a\u2028b", "c\x0bd\x85e\x1cf"),
     "<|user|>\na\u2028b\n<|assistant|>\n[c\x0bd\x85e\x1cf+]"),
    ("user_assistant", WITH_INPUT, "<|user|>\nAdd.\n1, 2\n<|assistant|>\n[3+]"),
    ("user_assistant", WEIGHTED,
     "<|user|>\nHi\n<|assistant|>\nNo+<|user|>\nAnd?\n<|assistant|>\n[Bye+]"),
    ("alpaca_2", talk("Hi", "Hello"),
     f"{INTRO}. {RESPOND}### Instruction:\nHi\n\n### Response:\n[Hello+]"),
    ("alpaca_2", WITH_INPUT,
     f"{INTRO}, paired with an input that provides further context. {RESPOND}"
     "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n[3+]"),
    ("alpaca", talk("Hi", "Hello", "And?", "Bye", system="Be kind."),
     "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n[Hello+]"
     "### Instruction:\nAnd?\n\n### Response:\n[Bye+]"),
]  # fmt: skip


def same_prompts(messages, template, tokenizer, tokens) -> int:
    """Generation's prompt for each answer is what training shows before it; how many answers."""
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    for n in answers:
        prompt = encode_prompt(messages[:n], tokenizer, template)
        answer = tokenizer.encode(messages[n]["content"].strip()) + [tokenizer.eot]
        assert tokens[: len(prompt) + len(answer)] == prompt + answer
    return len(answers)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=lambda t: t.name)
@pytest.mark.parametrize("template, messages, written", WRITTEN)
def test_every_token_and_its_mask(template, messages, written, tokenizer):
    tokens, is_target = encode_chat(messages, tokenizer, template)
    assert len(tokens) == len(is_target) and {type(t) for t in is_target} == {bool}
    parts, before = [], False
    for token, learnt in zip(tokens, is_target, strict=True):
        if learnt != before:
            parts.append(b"[" if learnt else b"]")
        parts.append(b"+" if token == tokenizer.eot else tokenizer.decode_bytes([token]))
        before = learnt
    assert b"".join(parts).decode() + "]" == written
    assert same_prompts(messages, template, tokenizer, tokens) == written.count("+")
    text = tokenizer.decode(tokens)
    # The whole text is tokenised so by any program, but for the template of older checkpoints.
    is_whole = tokens == tokenizer.encode(text, allow_special=True)
    assert is_whole == (template != "alpaca" or tokenizer is BYTES)
    if template != "alpaca":
        prompt = tokenizer.decode(encode_prompt(messages[:-1], tokenizer, template))
        render = Environment(trim_blocks=True).from_string(jinja(template, False)).render
        assert render(messages=messages) == text
        assert render(messages=messages[:-1], add_generation_prompt=True) == prompt


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not any(m in text for t in TEMPLATES.values() for m in t.markers)
)


@given(st.lists(words, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_any_text_is_learnt_where_it_is_an_answer_and_nowhere_else(contents):
    for template in TEMPLATES:
        tokens, is_target = encode_chat(talk(*contents), BPE, template)
        answers = [t for t, learnt in zip(tokens, is_target, strict=True) if learnt]
        expected = "".join(f"{answer.strip()}<|endoftext|>" for answer in contents[1::2])
        assert BPE.decode(answers) == expected
        # The end of text is a token of its own only where an answer ends.
        assert tokens.count(BPE.eot) == same_prompts(talk(*contents), template, BPE, tokens)


@pytest.mark.parametrize("name, marker", [(n, m) for n, t in TEMPLATES.items() for m in t.markers])
def test_markers_in_text_are_refused_wherever_they_stand(name, marker):
    bad = f"you said {marker}\nsure"
    with_input = [{"role": "user", "content": "a", "input": bad}, *talk("", "b")[1:]]
    others = talk(bad, "x"), talk("x", bad), talk("a", "b", bad, "c"), talk("a", "b", system=bad)
    for messages in (with_input, *others):
        with pytest.raises(ChatError, match="holds the template's marker") as error:
            encode_chat(messages, BPE, name)
        assert error.value.kind == "template marker in text" and marker in str(error.value)
    with pytest.raises(ChatError, match="marker"):
        encode_prompt(talk(bad), BPE, name)
    if marker != "<|endoftext|>":  # another template's markers are text like any other
        other = "alpaca_2" if name == "user_assistant" else "user_assistant"
        encode_chat(talk(bad, "x"), BPE, other)


TURNS = talk("Q", "A")


@pytest.mark.parametrize(
    "messages, kind, message",
    [
        ([], "empty conversation", "no messages"),
        (talk(system="Be kind."), "empty conversation", "system text only"),
        (talk("Hi"), "no answer", "without an answer"),
        (talk("Hi", "Ho", "And?"), "no answer", "without an answer"),
        (talk("Hi", " \n"), "no answer", r"message 2 \(assistant\) is empty"),
        (talk(" ", "Ho"), "empty message", r"message 1 \(user\) is empty"),
        ([{"role": "tool", "content": "x"}], "roles out of turn", "is from 'tool'"),
        ([{"role": "system", "content": "s", "input": "i"}, *TURNS], "input out of place",
         "message 1 .system. has an input"),  # which the template in Jinja has not either
        ([TURNS[0], TURNS[1] | {"input": " i"}], "input out of place", "message 2 .assistant."),
        (talk("Hi", "Ho")[1:], "roles out of turn", "is from 'assistant', where system or user"),
        ([*talk("a"), *talk("b", "c")], "roles out of turn", "'user', where assistant is due"),
        ([*talk("a", "b"), *talk(system="x")], "roles out of turn", "message 3 is from 'system'"),
        (talk("Hi", 3), "not text", r"message 2 \(assistant\) holds int, not text"),
        (talk(None, "x"), "not text", "NoneType"),
        ([{**TURNS[0], "input": 3}, TURNS[1]], "not text", "the input of message 1 holds int"),
        ([TURNS[0], {**TURNS[1], "weight": 0}], "nothing to learn", "has the weight 0"),
        ([TURNS[0], {**TURNS[1], "weight": 0.5}], "unknown weight", "the weight 0.5: use 1, or 0"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_by_name(messages, kind, message):
    with pytest.raises(ChatError, match=message) as error:
        encode_chat(messages, BYTES, "user_assistant")
    assert error.value.kind == kind


def test_prompts_end_with_a_question_and_templates_need_an_end_of_text():
    with pytest.raises(ChatError, match="ends with a message from the user"):
        encode_prompt(talk("a", "b"), BYTES, "alpaca")
    with pytest.raises(ValueError, match="char tokenizer has no end of text"):
        encode_chat(talk("a", "b"), CharTokenizer("ab"), "alpaca")
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        encode_chat(talk("a", "b"), BYTES, "alpacca")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": TURNS, "id": 3}, TURNS),
        (TURNS, TURNS),
        ({"messages": WEIGHTED}, WEIGHTED),
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
    for template in TEMPLATES:
        found = encode_chat(messages_from_row(row), BYTES, template)
        assert found == encode_chat(expected, BYTES, template)


@pytest.mark.parametrize(
    "row, kind, message",
    [
        ({"instruction": "Q", "input": ""}, "no answer", "'instruction' but no answer"),
        ({"prompt": "Q"}, "no answer", "'prompt' but no answer"),
        ({"question": "Q", "answer": None}, "no answer", "'question' but no answer"),
        ({"text": "Q"}, "unknown fields", "it has 'text'"),
        ({}, "unknown fields", "it has none"),
        ("Q", "unknown fields", "must be an object, got str"),
        (["Q"], "not text", "messages 1 needs a role"),
        ({"messages": None}, "not text", "messages must be a list, got NoneType"),
        ({"messages": [{"text": "Q"}]}, "not text", "messages 1 needs a role"),
        ({"messages": [{"role": "narrator", "content": "Q"}]}, "unknown role", "'narrator'"),
        ([{"role": ["user"], "content": "x"}], "unknown role", "unknown role"),
        ({"conversations": [{"from": "observation", "value": "Q"}]}, "unknown role", "observation"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "not text", "history must be"),
    ],
)
def test_rows_that_are_no_conversation(row, kind, message):
    with pytest.raises(ChatError, match=message) as error:
        messages_from_row(row)
    assert error.value.kind == kind


def test_the_config_names_the_templates_there_are():
    assert list(get_args(get_type_hints(SFTConfig)["template"])) == list(TEMPLATES)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_real_conversations_are_the_same_in_training_and_at_generation(shared_data, template):
    """All that the template can write; and every word of the answers, and no other, is learnt."""
    used, left_out = 0, {}
    for _, row in read_rows(str(shared_data / "sft"), LeftOut()):
        messages = messages_from_row(row)
        try:
            tokens, is_target = encode_chat(messages, BPE, template)
        except ChatError as error:
            left_out[error.kind] = left_out.get(error.kind, 0) + 1
            continue
        same_prompts(messages, template, BPE, tokens)
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        learnt = [t for t, is_learnt in zip(tokens, is_target, strict=True) if is_learnt]
        assert BPE.decode(learnt) == "".join(f"{answer}<|endoftext|>" for answer in answers)
        used += 1
    assert (used, left_out) == (60664, {"no answer": 28})
