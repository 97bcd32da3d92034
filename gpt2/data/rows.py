"""Rows made of conversations: read, tokenised, split into train and val, and given out as batches.

What gpt2.data.sft (conversations, packed) and gpt2.data.preferences (pairs) have in common. A batch
is a pure function of (data, seed, step), and each row comes exactly once an epoch, in an order that
is computed from (seed, epoch).
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np
import torch
import xxhash

from gpt2.config import IGNORE_INDEX
from gpt2.data.chat import ChatError, Message, encode_chat
from gpt2.data.conversations import CHAT_DATASETS, ChatDataset, Counts, read_rows
from gpt2.data.loader import Batch, BatchSource, Provenance
from gpt2.data.numpy_backend import epoch_key, permute
from gpt2.data.readers import Row
from gpt2.tokenizer import Tokenizer

Tokens = tuple[list[int], list[bool]]  # of one conversation, and which of them are to be predicted


class TooLong(ChatError):
    """A row that does not fit is left out and counted, whatever bad_rows says."""


@dataclass
class Conversations:
    """Tokenised conversations, one after the other.

    path: the data as it was named. tokens (N,) uint16; learnt (N,) bool: tokens that are to be
    predicted; ends (n,) int64: where each conversation ends. where: the place each comes from.
    counts: what became of the rows.
    """

    path: str
    tokens: np.ndarray
    learnt: np.ndarray
    ends: np.ndarray
    where: list[str]
    counts: Counts

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def select(self, chosen: np.ndarray) -> "Conversations":
        """Those where chosen (n,) bool is True."""
        of_tokens = np.repeat(chosen, self.lengths)
        return replace(
            self, tokens=self.tokens[of_tokens], learnt=self.learnt[of_tokens],
            ends=np.cumsum(self.lengths[chosen]), where=list(compress(self.where, chosen)),
        )  # fmt: skip


def load_rows(
    data: str, encode: Callable[[object], tuple[list[Message], list[Tokens], bool]], what: str,
    *, bad_rows: str = "error", val_fraction: float = 0.0, limit: int | None = None,
    parts: tuple[str, ...] = ("",), known: dict[str, ChatDataset] = CHAT_DATASETS,
) -> tuple[Conversations, Conversations]:  # fmt: skip
    """Reads data (see read_rows) into (train, val), which share counts.

    encode: of a row the messages whose first question decides between train and val, the tokens of
    its conversations, and whether they were cut to fit; it raises ChatError for a row that cannot
    be used. bad_rows: "error" ends at such a row, "skip" counts it. what: a row's name in messages;
    parts: those of its conversations in their places. limit: read only so many that can be used.
    val_fraction: a row is val by a hash of its first question, so that the same question is never
    in both; above 0, at least one question is val and one train.
    Raises ValueError and OSError with the place of what is wrong, and ValueError where nothing is
    left, or only one question to be split.
    """
    counts = Counts(what)
    tokens, learnt, where, hashes = [], [], [], []
    for place, row in read_rows(data, counts, known, bad_rows=bad_rows):
        if counts.used == limit:
            break
        try:
            messages, conversations, cut = encode(row)
        except ChatError as error:
            if bad_rows == "error" and not isinstance(error, TooLong):
                raise ValueError(
                    f"{place}: {error}; --bad_rows skip leaves such rows out, and counts them"
                ) from error
            counts.left_out.add(error.kind, f"{place}: {error}")
            continue
        counts.used += 1
        counts.cut += cut
        hashes += [question_hash(messages)] * len(parts)
        for part, (ids, targets) in zip(parts, conversations, strict=True):
            tokens.append(np.array(ids, np.uint16))
            learnt.append(np.array(targets, bool))
            where.append(f"{place}{part}")
    if not tokens:
        reasons = "; ".join(counts.lines()) or "it is empty"
        raise ValueError(f"{data}: no {what} to train on in {counts.rows:,} rows: {reasons}")
    ends = np.cumsum([len(ids) for ids in tokens])
    both = Conversations(data, np.concatenate(tokens), np.concatenate(learnt), ends, where, counts)
    low, high, bound = min(hashes), max(hashes), val_fraction * 2.0**64
    if val_fraction > 0 and low == high:
        raise ValueError(
            f"{data}: one question cannot be in train and in val: name a file as val_data, or "
            "switch validation off with eval_every 0"
        )
    is_val = np.array([bound > 0 and h != high and (h < bound or h == low) for h in hashes])
    return both.select(~is_val), both.select(is_val)


def question_hash(messages: list[Message]) -> int:
    """64 bits of a conversation's first question."""
    first = next(m for m in messages if m["role"] == "user")
    return Row(f"{first['content'].strip()}\n{(first.get('input') or '').strip()}").hash()


def check_settings(tokenizer: Tokenizer, template: str, block_size: int) -> None:
    """Raises ValueError for what would make every row impossible, before one is blamed for it."""
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit 16-bit tokens")
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    shortest = min(len(encode_chat(m, tokenizer, template)[0]) for m in (turns, turns[1:]))
    if shortest > block_size + 1:
        raise ValueError(
            f"block_size {block_size} is too short: with template {template} and this tokenizer a "
            f"conversation has {shortest} tokens or more, and a row holds {block_size + 1}"
        )


class RowLoader(BatchSource):
    """Rows made of conversations; see gpt2.data.loader.BatchSource.

    data: as load_rows gives it; a conversation of n tokens takes n - 1 positions, since its last
    token is only predicted. shuffle: False gives the rows in order, for validation. pad: the token
    that fills rows up. chat_template: the name of the template they are written in.

    Attributes: n_filled (positions of an epoch that hold a conversation), n_targets (those that are
    learnt).
    """

    def __init__(
        self, data: Conversations, seed: int = 1337, shuffle: bool = True,
        *, pad: int = 0, chat_template: str | None = None,
    ):  # fmt: skip
        self.data, self.pad, self.chat_template = data, pad, chat_template
        self.seed, self.shuffle = seed % (1 << 64), shuffle
        first = data.ends - data.lengths  # has nothing before it to be predicted from
        self.n_targets = int(data.learnt.sum() - data.learnt[first].sum())
        self.n_filled = int(data.lengths.sum()) - len(data)

    @property
    def n_tokens(self) -> int:
        """Positions of an epoch, the filling included."""
        return self.n_windows * self.block_size

    @abstractmethod
    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(first position, position after the last, conversation) of those in a row, in order."""

    def index(self, sample: int) -> int:
        """The row that is a sample of the run."""
        epoch, index = divmod(sample, self.n_windows)
        if self.shuffle:
            index = permute(index, self.n_windows, epoch_key(self.seed, epoch))
        return index

    def read(self, samples: np.ndarray, global_batch_size: int, out: None) -> Batch:
        return self.make([self.index(sample) for sample in samples.tolist()])

    def make(self, rows: list[int]) -> Batch:
        """These rows: idx and targets (rows, block_size) int64, -100 where nothing is learnt;
        doc_start (rows, block_size) int32."""
        shape, data = (len(rows), self.block_size), self.data
        idx, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        doc_start = np.tile(np.arange(self.block_size, dtype=np.int32), (len(rows), 1))
        for r, row in enumerate(rows):
            for start, stop, i in self.spans(row):
                end = int(data.ends[i])
                begin = end - (stop - start)
                idx[r, start:stop] = data.tokens[begin - 1 : end - 1]
                learnt = data.learnt[begin:end]
                targets[r, start:stop][learnt] = data.tokens[begin:end][learnt]
                doc_start[r, start:stop] = start
        return tuple(map(torch.from_numpy, (idx, targets, doc_start)))

    def place(self, sample: int, global_batch_size: int, token: int) -> Provenance:
        """shard is the place of its conversation in the data, offset the token in it, document its
        number, from 1. Filling counts as the end of the conversation before it."""
        spans = self.spans(self.index(sample))
        start, stop, i = next(span for span in reversed(spans) if span[0] <= token)
        return Provenance(self.data.where[i], min(token, stop) - start, i + 1)

    def identity(self) -> list[dict]:
        hasher = xxhash.xxh3_128()
        for part in (self.data.tokens, self.data.learnt, self.data.ends):
            hasher.update(part.tobytes())
        return [{"path": self.data.path, "rows": self.n_windows, "hash": hasher.hexdigest()}]

    def describe(self) -> str:
        """One line on what the rows hold."""
        filled = self.n_filled / self.n_tokens
        return f"{self.content()}, {filled:.1%} filled, {self.n_targets:,} tokens to learn"

    @abstractmethod
    def content(self) -> str:
        """How many of what, in rows of what length."""
