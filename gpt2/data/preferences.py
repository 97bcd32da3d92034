"""Pairs of a chosen and a rejected answer to the same prompt, as rows for DPO.

A pair is two conversations that begin alike. What they share, up to a message of the user, is the
prompt; of the rest the assistant's tokens count. Both are written with a template of
gpt2.data.chat, so the model sees what it saw in fine-tuning. A row's two halves are filled up with
tokens that come after everything that counts, so that causal attention never sees them.

As with all sources, a batch is a pure function of (data, seed, step), and each pair comes exactly
once an epoch.
"""

import re

import numpy as np
import torch

from gpt2.config import IGNORE_INDEX
from gpt2.data.chat import ChatError, Message, encode_chat, encode_prompt, find_template
from gpt2.data.chat import messages_from_row as conversation
from gpt2.data.conversations import Counts, local_rows, refuse
from gpt2.data.loader import Batch, Provenance, rank_rows
from gpt2.data.numpy_backend import epoch_key, permute
from gpt2.data.sft import Conversations, question_hash
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
            raise ChatError("no preference", f"preference is {row['preference']!r}, not 1 or 2")
        better, worse = (1, 2) if row["preference"] == 1 else (2, 1)
        row = row | {"chosen": row[f"output_{better}"], "rejected": row[f"output_{worse}"]}
    if "chosen" not in row or "rejected" not in row:
        raise ChatError(
            "unknown fields",
            "the row needs chosen and rejected (and a prompt, or output_1, output_2 and "
            "preference): it has " + (", ".join(map(repr, list(row)[:12])) or "none"),
        )
    answers = row["chosen"], row["rejected"]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer is None or isinstance(answer, str | list) and not answer:
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
        return conversation({"messages": prompt})
    if isinstance(prompt, str):
        # TRL: text beside lists only repeats what they begin with.
        return [] if isinstance(row["chosen"], list) else _turns(prompt)
    if isinstance(row.get("context"), list):
        turns = [t | {"content": t.get("text", t.get("content"))} if isinstance(t, dict) else t
                 for t in row["context"]]  # fmt: skip
        return conversation({"messages": turns})
    if "instruction" in row:
        return [{"role": "user", "content": row["instruction"], "input": row.get("input")}]
    return []


def _answer(answer: str | list, has_prompt: bool) -> list[Message]:
    if isinstance(answer, list):
        return conversation({"messages": answer})
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


Half = tuple[list[int], list[bool]]  # tokens, and whether each counts


def encode_pair(
    chosen: list[Message], rejected: list[Message], tokenizer: Tokenizer, template: str
) -> tuple[Half, Half, int]:
    """Both conversations as tokens, which of them count, and the length of the prompt in tokens.

    Raises ChatError as encode_chat does, and for answers that are the same or to different prompts.
    """
    encoded = [encode_chat(messages, tokenizer, template) for messages in (chosen, rejected)]
    if encoded[0][0] == encoded[1][0]:
        raise ChatError("chosen and rejected are the same", "chosen and rejected are the same")
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if _plain(a) != _plain(b):
            break
        shared += 1
    if shared == 0 or chosen[shared - 1]["role"] != "user":
        raise ChatError(
            "prompts differ",
            f"chosen and rejected must part at an answer, but part at message {shared + 1}",
        )
    prompt = len(encode_prompt(chosen[:shared], tokenizer, template))
    halves = [(ids, [False] * prompt + learnt[prompt:]) for ids, learnt in encoded]
    return halves[0], halves[1], prompt


def _plain(message: Message) -> tuple[str, str, str]:
    """A message as the template writes it."""
    return message["role"], message["content"].strip(), (message.get("input") or "").strip()


def load_pairs(
    data: str,
    tokenizer: Tokenizer,
    block_size: int,
    *,
    template: str,
    overlong: str = "drop",
    bad_rows: str = "error",
    val_fraction: float = 0.0,
    max_pairs: int | None = None,
) -> tuple[Conversations, Conversations]:
    """Reads and tokenises pairs into (train, val): at 2 i the chosen, at 2 i + 1 the rejected.

    data: files or folders (.jsonl, .json, .parquet, compressed or not), with commas between.
    block_size: positions of a half; one of more than block_size + 1 tokens is overlong.
    overlong: "drop", "cut" (the prompt, from its start, equally in both; dropped where that is not
    enough) or "error".
    bad_rows: "error" or "skip", for rows without answer, with equal answers and the like. Whatever
    is dropped, cut or skipped is in counts, which both share.
    val_fraction: pairs become val by a hash of their first question, as in load_conversations.
    Raises ValueError and OSError with the place of what is wrong, and ValueError where nothing is
    left.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit 16-bit tokens")
    counts, where, is_val = Counts(), [], []
    halves: list[Half] = []
    marker = len(tokenizer.encode(find_template(template).assistant))
    rows = ((place, row) for name in data.split(",") for place, row in local_rows(name.strip()))
    for place, row in rows:
        if counts.used == max_pairs:
            break
        counts.rows += 1
        try:
            chosen, rejected = pair_from_row(row)
            *pair, prompt = encode_pair(chosen, rejected, tokenizer, template)
            excess = max(len(ids) for ids, _ in pair) - (block_size + 1)
            if excess > 0:
                pair = _fit(pair, excess, prompt - marker, overlong, place, block_size)
                counts.cut += 1
        except ChatError as error:
            # What does not fit is governed by overlong alone.
            refuse(error, place, counts, "skip" if error.kind.startswith("longer") else bad_rows)
            continue
        counts.used += 1
        halves += ((np.array(ids, np.uint16), np.array(learnt, bool)) for ids, learnt in pair)
        where += [f"{place} {name}" for name in ("chosen", "rejected")]
        is_val += [question_hash(chosen) < val_fraction * 2.0**64] * 2
    if not halves:
        reasons = "; ".join(counts.lines("pairs")) or "it is empty"
        raise ValueError(f"{data}: no pair to train on in {counts.rows:,} rows: {reasons}")
    tokens, learnt = (np.concatenate(part) for part in zip(*halves, strict=True))
    ends = np.cumsum([len(ids) for ids, _ in halves])
    both = Conversations(tokens, learnt, ends, where, counts)
    return both.select(np.flatnonzero(~np.array(is_val))), both.select(np.flatnonzero(is_val))


def _fit(pair: list[Half], excess: int, room: int, overlong: str, place: str, block_size: int):
    """Both halves without the first `excess` tokens, where the prompt can spare them (room)."""
    text = (
        f"the longer answer has {excess} tokens more with its prompt than the {block_size + 1} of "
        f"a row of block_size {block_size}"
    )
    if overlong == "error":
        raise ValueError(f"{place}: {text}; use --overlong drop or cut, or a longer block_size")
    if overlong == "drop":
        raise ChatError("longer than block_size", text)
    if excess > room:
        raise ChatError("longer than block_size without its prompt", text)
    return [(ids[excess:], learnt[excess:]) for ids, learnt in pair]


class PairLoader:
    """Pairs as rows, each exactly once an epoch; batch as TokenLoader's.

    pairs: as load_pairs gives them, each half of 2 to length + 1 tokens. length: positions of a
    half. shuffle: False gives them in order, for validation. pad: the token that fills halves up.
    trim: a batch is only as long as its longest half needs, in multiples of 64.
    chat_template: the name of the template they are written in; it goes into checkpoints.

    Attributes: names (of the parts of a batch), block_size (positions of a row, 2 * length),
    n_windows (pairs), n_tokens (positions of all rows), n_targets (positions that count), backend.
    Raises ValueError for no pairs and for those that do not fit.
    """

    def __init__(
        self,
        pairs: Conversations,
        length: int,
        seed: int = 1337,
        shuffle: bool = True,
        *,
        pad: int = 0,
        trim: bool = True,
        chat_template: str | None = None,
    ):
        if not len(pairs):
            raise ValueError("there are no pairs to make rows of")
        lengths = pairs.lengths - 1
        if lengths.min() < 1 or lengths.max() > length:
            raise ValueError(
                f"halves must have 2 to {length + 1} tokens for rows of {length}, got "
                f"{lengths.min() + 1} to {lengths.max() + 1}"
            )
        self.pairs, self.length, self.pad, self.trim = pairs, length, pad, trim
        self.seed, self.shuffle, self.chat_template = seed % (1 << 64), shuffle, chat_template
        self.names: tuple[str, ...] = ("idx", "targets")
        self.block_size, self.backend = 2 * length, "pairs"
        self.n_windows = len(pairs) // 2
        self.n_tokens = self.n_windows * self.block_size
        self.n_targets = int(pairs.learnt.sum())
        self.reference: np.ndarray | None = None

    def batch(self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The pairs of a step's global batch that belong to a rank, as TokenLoader.batch.

        Returns idx (rows, 2, T) int64, chosen and rejected; targets (rows, 2, T) int64, -100 where
        nothing counts; and, after set_reference, reference (rows, 2) float32. T is `length`, or
        less with trim. Raises ValueError for numbers out of range.
        """
        first, rows = rank_rows(step, global_batch_size, rank, world_size)
        return self.rows([self.member(sample) for sample in range(first, first + rows)])

    def member(self, sample: int) -> int:
        """The pair that is a sample of the run."""
        epoch, index = divmod(sample, self.n_windows)
        if self.shuffle:
            index = permute(index, self.n_windows, epoch_key(self.seed, epoch))
        return index

    def rows(self, members: list[int]) -> Batch:
        """These pairs, as batch gives them."""
        data, halves = self.pairs, [2 * i + half for i in members for half in (0, 1)]
        T = self.length
        if self.trim:
            needed = int(data.lengths[halves].max()) - 1
            T = min(-(-needed // TRIM) * TRIM, T)
        idx = np.full((len(halves), T), self.pad, np.int64)
        targets = np.full((len(halves), T), IGNORE_INDEX, np.int64)
        for row, half in enumerate(halves):
            end, n = int(data.ends[half]), int(data.lengths[half]) - 1
            idx[row, :n] = data.tokens[end - n - 1 : end - 1]
            counts = data.learnt[end - n : end]
            targets[row, :n][counts] = data.tokens[end - n : end][counts]
        parts = [torch.from_numpy(part).view(len(members), 2, T) for part in (idx, targets)]
        if self.reference is not None:
            parts.append(torch.from_numpy(self.reference[members]))
        return tuple(parts)

    def provenance(self, step: int, row: int, global_batch_size: int, token: int = 0) -> Provenance:
        """Where a pair of the global batch came from; document is its number."""
        first, rows = rank_rows(step, global_batch_size)
        if not 0 <= row < rows:
            raise ValueError(f"row {row} is not one of the {rows} rows of a step")
        pair = self.member(first + row)
        half, token = divmod(token, self.length + 1)
        return Provenance(self.pairs.where[2 * pair + half], token, pair)

    def set_reference(self, log_probs: np.ndarray) -> None:
        """From now on batches hold the reference's log probabilities, (n_windows, 2) float32."""
        if log_probs.shape != (self.n_windows, 2):
            raise ValueError(f"needs ({self.n_windows}, 2) values, got {log_probs.shape}")
        self.reference = log_probs.astype(np.float32)
        self.names = ("idx", "targets", "reference")

    def describe(self) -> str:
        """One line on what the rows hold."""
        filled = (self.pairs.lengths - 1).sum() / self.n_tokens
        return (
            f"{self.n_windows:,} pairs in rows of 2 x {self.length}, {filled:.1%} filled, "
            f"{self.n_targets:,} tokens of answers"
        )
