"""Pairs of a chosen and a rejected answer to the same prompt, as rows for DPO.

A pair is two conversations that begin alike. What they share, up to a message of the user, is the
prompt; of the rest the assistant's tokens count. Both are written with a template of
gpt2.data.chat, so the model sees what it saw in fine-tuning. A row's two halves are filled up with
tokens that come after everything that counts, so that causal attention never sees them.
"""

import re
from os.path import commonprefix

import numpy as np

from gpt2.data import chat
from gpt2.data.chat import ChatError, Message, encode_chat, encode_prompt, messages_from_row
from gpt2.data.loader import Batch
from gpt2.data.sft import (
    ConversationLoader,
    Conversations,
    Encoded,
    Tokens,
    TooLong,
    load_conversations,
)
from gpt2.tokenizer import Tokenizer

TRIM = 64  # a trimmed batch is a multiple of this long, so that few shapes occur
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def pair_from_row(row: dict) -> tuple[list[Message], list[Message]]:
    """The chosen and the rejected conversation in a row of a data set, each with its prompt.

    prompt, chosen, rejected      TRL: each text or a list of messages; with a list the prompt may
                                  also stand at the beginning of both
    chosen, rejected              hh-rlhf: text with "\\n\\nHuman:" and "\\n\\nAssistant:"
    instruction, input, chosen, rejected; or with output_1, output_2, preference    AlpacaFarm
    context, chosen, rejected     pairs from OpenAssistant; context: [{role, text}]
    Each may have `system` besides. Raises ChatError for anything else and for a missing answer;
    what the messages hold is left for encode_pair to check, except for roles.
    """
    if not isinstance(row, dict):
        raise ChatError("unknown fields", f"a row must be an object, got {type(row).__name__}")
    if row.keys() >= {"output_1", "output_2", "preference"}:
        if row["preference"] not in (1, 2):
            raise ChatError("no preference", f"preference is {row['preference']!r:.40}, not 1 or 2")
        better, worse = (1, 2) if row["preference"] == 1 else (2, 1)
        row = row | {"chosen": row[f"output_{better}"], "rejected": row[f"output_{worse}"]}
    if not row.keys() >= {"chosen", "rejected"}:
        raise ChatError(
            "unknown fields",
            "the row needs chosen and rejected (and a prompt, or output_1, output_2 and "
            f"preference): it has {chat.field_names(row)}",
        )
    answers = row["chosen"], row["rejected"]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer:
            raise ChatError("no answer", f"{name} is empty")
        if not isinstance(answer, str | list):
            raise ChatError("not text", f"{name} is {type(answer).__name__}, not text or messages")
    prompt = _prompt(row)
    chosen, rejected = (prompt + _answer(answer, bool(prompt)) for answer in answers)
    if row.get("system"):
        system = {"role": "system", "content": row["system"]}
        chosen, rejected = [system, *chosen], [system, *rejected]
    return chosen, rejected


def _prompt(row: dict) -> list[Message]:
    """The messages before both answers; empty where both hold them."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return messages_from_row(prompt)
    if isinstance(prompt, str):
        # TRL: text beside lists only repeats what they begin with.
        return [] if isinstance(row["chosen"], list) else _turns(prompt)
    if isinstance(row.get("context"), list):
        turns = [t | {"content": t.get("text", t.get("content"))} if isinstance(t, dict) else t
                 for t in row["context"]]  # fmt: skip
        return messages_from_row(turns)
    if "instruction" in row:
        return [{"role": "user", "content": row["instruction"], "input": row.get("input")}]
    return []


def _answer(answer: str | list, has_prompt: bool) -> list[Message]:
    if isinstance(answer, list):
        return messages_from_row(answer)
    if has_prompt:
        return [{"role": "assistant", "content": answer}]
    if not HH_TURN.match(answer):
        raise ChatError(
            "no prompt",
            "without a prompt, chosen and rejected must be lists of messages, or begin with "
            f"'\\n\\nHuman:'; got {answer!r:.60}",
        )
    return _turns(answer)


def _turns(text: str) -> list[Message]:
    """hh-rlhf's text as messages, an Assistant: without text at its end left out; other text as one
    question."""
    if not HH_TURN.match(text):
        return [{"role": "user", "content": text}]
    parts = HH_TURN.split(text)[1:]  # role, content, role, content, ...
    if parts[-2:-1] == ["Assistant"] and not parts[-1].strip():
        parts = parts[:-2]
    return [
        {"role": HH_ROLES[role], "content": content}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def encode_pair(
    chosen: list[Message], rejected: list[Message], tokenizer: Tokenizer, template: str
) -> tuple[Tokens, Tokens, int]:
    """Both conversations as tokens, which of them count, and the length of the prompt in tokens.

    Raises ChatError as encode_chat does, and for answers that are the same or to different prompts,
    or that all have the weight 0.
    """
    encoded = [encode_chat(messages, tokenizer, template) for messages in (chosen, rejected)]
    if encoded[0][0] == encoded[1][0]:
        raise ChatError("chosen and rejected are the same", "chosen and rejected are the same")
    # As the template writes them; commonprefix takes any sequences.
    shared = len(commonprefix([[_plain(m) for m in messages] for messages in (chosen, rejected)]))
    if shared == 0 or chosen[shared - 1]["role"] != "user":
        raise ChatError(
            "prompts differ",
            f"chosen and rejected must part at an answer, but part at message {shared + 1}",
        )
    prompt = len(encode_prompt(chosen[:shared], tokenizer, template))
    halves = [(ids, [False] * prompt + learnt[prompt:]) for ids, learnt in encoded]
    if not all(any(learnt) for _, learnt in halves):
        raise ChatError("nothing to learn", "an answer has the weight 0")
    return halves[0], halves[1], prompt


def _plain(message: Message) -> tuple[str, str, str]:
    return message["role"], message["content"].strip(), (message.get("input") or "").strip()


def encode_row(
    row: object, tokenizer: Tokenizer, template: str, longest: int, overlong: str
) -> Encoded:
    """A row as two conversations of at most `longest` tokens. Raises ChatError."""
    chosen, rejected = pair_from_row(row)
    *pair, prompt = encode_pair(chosen, rejected, tokenizer, template)
    marker = len(tokenizer.encode(chat.find_template(template).assistant))
    cut = max(0, max(len(ids) for ids, _ in pair) - longest)
    if cut and (overlong == "drop" or cut > prompt - marker):
        why = " without its prompt" if overlong == "cut" else ""
        raise TooLong(
            f"longer than block_size{why}",
            f"the longer answer has {cut} tokens more with its prompt than the {longest} of a row "
            f"of block_size {longest - 1}",
        )
    halves = [(ids[cut:], learnt[cut:]) for ids, learnt in pair]
    return chosen, dict(zip((" chosen", " rejected"), halves, strict=True)), cut > 0


def load_pairs(
    data: str, tokenizer: Tokenizer, block_size: int, **options
) -> tuple[Conversations, Conversations]:
    """Reads and tokenises pairs into (train, val): at 2 i the chosen, at 2 i + 1 the rejected.

    data: files or folders; other options and errors: gpt2.data.sft.load_conversations.
    block_size: positions of a half; one of more than block_size + 1 tokens is overlong.
    overlong: "drop", or "cut" (the prompt, from its start, equally in both; dropped where that is
    not enough).
    """
    return load_conversations(data, tokenizer, block_size, encode=encode_row, known={}, **options)


class PairLoader(ConversationLoader):
    """A pair is a row of two halves of `length` positions; see ConversationLoader.

    pairs: as load_pairs gives them. trim: a batch is only as long as its longest half needs, in
    multiples of 64. A batch is idx (rows, 2, T) int64, chosen and rejected; targets (rows, 2, T)
    int64, -100 where nothing counts.
    """

    names, backend = ("idx", "targets"), "pairs"

    def __init__(self, pairs: Conversations, length: int, *args, trim: bool = True, **options):
        super().__init__(pairs, 2 * length, *args, **options)
        self.length, self.full_rows = length, not trim

    def fill_rows(self) -> list[list[tuple[int, int]]]:
        half = self.block_size // 2
        return [[(0, i), (half, i + 1)] for i in range(0, len(self.data), 2)]

    def read(self, samples: np.ndarray, global_batch_size: int) -> Batch:
        T, rows = self.length, [self.rows[self.index(sample)] for sample in samples.tolist()]
        if not self.full_rows:
            needed = max(int(self.data.lengths[i]) - 1 for row in rows for _, i in row)
            T = min(-(-needed // TRIM) * TRIM, T)
        idx, targets, _ = super().read(samples, global_batch_size)
        halves = (part.view(len(rows), 2, self.length)[..., :T] for part in (idx, targets))
        return tuple(half.contiguous() for half in halves)

    def content(self) -> str:
        return f"{self.n_windows:,} pairs in rows of 2 x {self.length}"
