"""Conversations as tokens: templates, which tokens are learnt, and the forms that rows come in.

A conversation is a list of messages {"role": ..., "content": ...}: perhaps one from "system", then
"user" and "assistant" in turn. A user's message may have an "input" besides, the text that an
instruction is about, as Alpaca's rows do; an assistant's a "weight", as OpenAI's do: 0 shows the
answer without teaching it.

A template turns it into text, which is tokenised whole: as it is in training, so it is at
generation and by others, who get the template in Jinja. GPT-2's vocabulary has no special
tokens for roles: markers are ordinary text, and only <|endoftext|>, which ends every answer, is a
token of its own. So content that holds a marker of its template is refused: nobody could tell it
from a turn. Content loses the white space around it, and a line ends before an answer, so that no
token spans where it begins.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

from gpt2.config import suggest
from gpt2.data.files import BadRow
from gpt2.tokenizer import END_OF_TEXT, Tokenizer

Message = dict  # role, content, and perhaps input or weight
# Names that data sets give to the roles.
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "prompter": "user",
}  # fmt: skip


class ChatError(BadRow):
    """What is wrong with a conversation."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    system: the piece before and after the system text. default: what stands where there is none,
    without and with an input. user: before and after the user's text; input: between it and its
    input, where it has one. assistant: before an answer. markers: what no content may hold.
    piecewise: each of these texts is tokenised on its own.
    """

    system: tuple[str, str]
    default: tuple[str, str]
    user: tuple[str, str]
    input: str
    assistant: str
    markers: tuple[str, ...]
    piecewise: bool = False


_ALPACA = "Write a response that appropriately completes the request.\n\n"
TEMPLATES: dict[str, Template] = {
    "user_assistant": Template(
        system=("<|system|>\n", "\n"), default=("", ""), user=("<|user|>\n", "\n"), input="\n",
        assistant="<|assistant|>\n",
        markers=("<|system|>", "<|user|>", "<|assistant|>", END_OF_TEXT),
    ),
    # The prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), with the newline
    # before the answer that the `text` column of its data set has. System text replaces its first
    # sentences; a further turn has only the headings.
    "alpaca_2": Template(
        system=("", "\n\n"),
        default=(
            f"Below is an instruction that describes a task. {_ALPACA}",
            "Below is an instruction that describes a task, paired with an input that provides "
            f"further context. {_ALPACA}",
        ),
        user=("### Instruction:\n", "\n\n"), input="\n\n### Input:\n",
        assistant="### Response:\n",
        markers=("### Instruction:", "### Input:", "### Response:", END_OF_TEXT),
    ),
}  # fmt: skip
# As models were trained before alpaca_2. The text is the same, but of "\n\n" before a heading it
# makes one token, where GPT-2 has two: no program that tokenises the text can do the same.
TEMPLATES["alpaca"] = replace(TEMPLATES["alpaca_2"], piecewise=True)


def find_template(name: str) -> Template:
    """Raises ValueError for an unknown name."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}: {suggest(name, TEMPLATES)}")
    return TEMPLATES[name]


def encode_chat(
    messages: list[Message], tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[bool]]:
    """A conversation for training: its tokens, and for each whether it is to be learnt.

    messages: as messages_from_row gives them. Learnt are the tokens of an answer and the
    <|endoftext|> after it, unless its weight is 0.
    Raises ChatError for a conversation that is empty, has no answer at its end or none to learn,
    roles out of turn, an input that is not a user's, content that is not text or holds a marker;
    ValueError for an unknown template and a tokenizer without an end of text.
    """
    check_messages(messages, template)
    if messages[-1]["role"] != "assistant":
        raise ChatError("no answer", "the conversation ends without an answer of the assistant")
    tokens, is_target = _encode(messages, tokenizer, template)
    if not any(is_target):
        raise ChatError("nothing to learn", "every answer of the conversation has the weight 0")
    return tokens, is_target


def encode_prompt(messages: list[Message], tokenizer: Tokenizer, template: str) -> list[int]:
    """The tokens up to where an answer begins, exactly those that encode_chat puts before it.

    messages: as for encode_chat, the last one from "user". Raises as encode_chat does.
    """
    check_messages(messages, template)
    if messages[-1]["role"] != "user":
        raise ChatError("no question", "a prompt ends with a message from the user")
    return _encode(messages, tokenizer, template)[0]


def jinja(name: str, generation: bool = True) -> str:
    """A template as other programs read it, in Jinja; the same tokens as encode_chat's, unless it
    is piecewise. generation: with tags, which only transformers knows, around what is learnt."""
    t = find_template(name)
    texts = {
        "system_before": t.system[0], "system_after": t.system[1], "default": t.default[0],
        "default_with_input": t.default[1], "user_before": t.user[0], "user_after": t.user[1],
        "input_before": t.input, "assistant_before": t.assistant, "end": END_OF_TEXT,
    }  # fmt: skip
    head = "".join(f"{{%- set {key} = {json.dumps(text)} %}}\n" for key, text in texts.items())
    return head + (_JINJA if generation else re.sub("{% (end)?generation %}", "", _JINJA))


_JINJA = """\
{%- if messages[0]['role'] != 'system' %}
  {{- default_with_input if (messages[0]['input'] or '') | trim else default }}
{%- endif %}
{%- for message in messages %}
  {%- set content = message['content'] | trim %}
  {%- set input = (message['input'] or '') | trim %}
  {%- if message['role'] == 'system' %}
    {{- system_before + content + system_after }}
  {%- elif message['role'] == 'user' %}
    {{- user_before + content + (input_before + input if input else '') + user_after }}
  {%- elif message['role'] == 'assistant' %}
    {{- assistant_before }}{% generation %}{{ content + end }}{% endgeneration %}
  {%- else %}
    {{- raise_exception("unknown role: only system, user and assistant") }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- assistant_before }}
{%- endif %}
"""


def check_messages(messages: list[Message], template: str) -> None:
    """Raises ChatError for what encode_chat refuses, except for an answer that is missing."""
    markers = find_template(template).markers
    if not messages:
        raise ChatError("empty conversation", "the conversation has no messages")
    expected = ("system", "user")
    for number, message in enumerate(messages, 1):
        role, content, weight = message["role"], message["content"], message.get("weight")
        if role not in expected:
            raise ChatError(
                "roles out of turn",
                f"message {number} is from {role!r}, where {' or '.join(expected)} is due",
            )
        expected = ("assistant",) if role == "user" else ("user",)
        _check_text(content, f"message {number} ({role})", markers)
        if not content.strip():
            kind = "no answer" if role == "assistant" else "empty message"
            raise ChatError(kind, f"message {number} ({role}) is empty")
        if message.get("input") is not None:
            _check_text(message["input"], f"the input of message {number}", markers)
        if _input(message) and role != "user":
            raise ChatError(
                "input out of place",
                f"message {number} ({role}) has an input, which only a user's has",
            )
        if weight not in (None, 0, 1):
            raise ChatError(
                "unknown weight",
                f"message {number} has the weight {weight!r:.40}: use 1, or 0 for an answer that "
                "is not learnt",
            )
    if role == "system":
        raise ChatError("empty conversation", "the conversation has system text only")


def _check_text(text, where: str, markers: tuple[str, ...]) -> None:
    if not isinstance(text, str):
        raise ChatError("not text", f"{where} holds {type(text).__name__}, not text")
    for marker in markers:
        if marker in text:
            raise ChatError(
                "template marker in text",
                f"{where} holds the template's marker {marker!r}, which could not be told from a "
                "turn",
            )


def messages_from_row(row: dict | list) -> list[Message]:
    """The conversation in a row of a data set. Known are, in this order:

    messages: [{role, content}]                   OpenAI, TRL, Tulu; also the list as a row
    conversations: [{from, value}]                ShareGPT; also [{role, content}]
    conversations: [question, answer, ...]        LIMA
    instruction, input | context, output | response, history: [[question, answer]]   Alpaca, Dolly
    prompt, response | completion                 TRL; either may be text or a list of messages
    question, answer                              GSM8K
    Each may have `system` besides. Raises ChatError for anything else and for a row without answer;
    what the messages hold is left for encode_chat to check, except for roles.
    """
    if isinstance(row, list):
        return _message_list(row, "messages")
    if not isinstance(row, dict):
        raise ChatError("unknown fields", f"a row must be an object, got {type(row).__name__}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "messages" in row:
        return messages + _message_list(row["messages"], "messages")
    if "conversations" in row:
        turns = row["conversations"]
        if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
            roles = ("user", "assistant")
            turns = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return messages + _message_list(turns, "conversations")
    answers = {
        question: next((row[name] for name in names if name in row), None)
        for question, names in _FORMS.items() if question in row
    }  # fmt: skip
    for question, answer in answers.items():
        if answer is None:
            continue
        history, more = [], None
        if question == "instruction":
            history, more = row.get("history") or [], row.get("input", row.get("context"))
        if not isinstance(history, list) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 for pair in history
        ):
            raise ChatError("not text", "history must be a list of [question, answer]")
        for asked, answered in history:
            messages += _turn("user", asked) + _turn("assistant", answered)
        return messages + _turn("user", row[question], more) + _turn("assistant", answer)
    for question in answers:
        raise ChatError("no answer", f"the row has {question!r} but no answer")
    raise ChatError(
        "unknown fields",
        "the row has none of the known fields (messages; conversations; instruction, output; "
        f"prompt, response or completion; question, answer): it has {field_names(row)}",
    )


# The field of a question, and those that its answer may stand in.
_FORMS = {
    "instruction": ("output", "response"), "prompt": ("response", "completion"),
    "question": ("answer",),
}  # fmt: skip


def field_names(row: dict) -> str:
    """For a message."""
    return ", ".join(f"{name!r:.40}" for name in list(row)[:12]) or "none"


def _encode(messages, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[bool]]:
    if tokenizer.eot is None:
        raise ValueError(
            f"the {tokenizer.name} tokenizer has no end of text, which ends an answer: start from "
            "a model with the gpt2 or the byte tokenizer"
        )
    tokens: list[int] = []
    is_target: list[bool] = []
    t = find_template(template)
    for answer, group in groupby(_pieces(messages, t), itemgetter(1)):
        texts = [text for text, _ in group]
        # What lies between two answers as one text, so that the tokens are those of the whole.
        for text in texts if t.piecewise else ["".join(texts)]:
            piece = tokenizer.encode(text) + ([tokenizer.eot] if answer else [])
            tokens += piece
            is_target += [answer is not None and answer.get("weight") != 0] * len(piece)
    return tokens, is_target


def _pieces(messages: list[Message], t: Template) -> Iterator[tuple[str, Message | None]]:
    """(text, the answer that it is) in order; an answer's <|endoftext|> is not in the text. After
    a question stands what begins an answer."""
    if messages[0]["role"] != "system":
        yield t.default[bool(_input(messages[0]))], None
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            yield t.assistant, None
            yield content, message
            continue
        before, after = t.system if message["role"] == "system" else t.user
        further = (t.input, _input(message)) if _input(message) else ()
        for text in (before, content, *further, after):
            yield text, None
    if message["role"] == "user":
        yield t.assistant, None


def _input(message: Message) -> str:
    return (message.get("input") or "").strip()


def _turn(role: str, content, more=None) -> list[Message]:
    """A message, or the list of messages that stands in its place."""
    if isinstance(content, list):
        return _message_list(content, "messages")
    return [{"role": role, "content": content, "input": more}]


def _message_list(turns, name: str) -> list[Message]:
    """OpenAI's {role, content} or ShareGPT's {from, value}, with this project's names of roles."""
    if not isinstance(turns, list):
        raise ChatError("not text", f"{name} must be a list, got {type(turns).__name__}")
    messages = []
    for number, turn in enumerate(turns, 1):
        named = isinstance(turn, dict) and "role" in turn
        keys = ("role", "content") if named else ("from", "value")
        if not isinstance(turn, dict) or any(key not in turn for key in keys):
            raise ChatError(
                "not text",
                f"{name} {number} needs a role and a content (or from and value), got {turn!r:.80}",
            )
        role, content = (turn[key] for key in keys)
        if not isinstance(role, str) or role not in ROLES:
            raise ChatError(
                "unknown role",
                f"message {number} has the unknown role {role!r:.40}: known are {', '.join(ROLES)}",
            )
        further = {key: turn[key] for key in ("input", "weight") if turn.get(key) is not None}
        messages.append({"role": ROLES[role], "content": content, **further})
    return messages
