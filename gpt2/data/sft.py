"""Conversations as training rows: read, tokenised, split into train and val, packed into batches.

Packing puts several conversations into a row of block_size; doc_start keeps each to itself and
restarts its positions, so each gives the same losses as alone. What is left of a row is filled up
with end-of-text tokens that see only themselves and count nowhere.

Rows are filled best-fit decreasing, as TRL's `bfd` does: conversations from the longest to the
shortest, each into the row with the least room that holds it. The rows stay the same in all epochs,
and each comes exactly once an epoch, in an order that is computed from (seed, epoch).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np
import torch
import xxhash

from gpt2.config import IGNORE_INDEX
from gpt2.data.chat import ChatError, Message, encode_chat, messages_from_row
from gpt2.data.conversations import CHAT_DATASETS, ChatDataset, read_rows
from gpt2.data.files import BadRow, LeftOut
from gpt2.data.loader import Batch, BatchSource, Provenance
from gpt2.data.numpy_backend import epoch_key, permute
from gpt2.data.readers import Row
from gpt2.tokenizer import Tokenizer

Tokens = tuple[list[int], list[bool]]  # of one conversation, and which of them are to be predicted
# Of a row: the messages whose first question decides between train and val, the tokens of its
# conversations by what is added to their place, and whether they were cut to fit.
Encoded = tuple[list[Message], dict[str, Tokens], bool]


class TooLong(ChatError):
    """A row that does not fit is left out and counted, whatever bad_rows says."""


@dataclass
class Conversations:
    """Tokenised conversations.

    path: the data as it was named. tokens, learnt: of each conversation (n,) uint16, and (n,) bool
    which of them are to be predicted. where: the place each comes from.
    left_out: rows that are not used. cut: how many of those that are were cut to fit.
    """

    path: str
    tokens: list[np.ndarray]
    learnt: list[np.ndarray]
    where: list[str]
    left_out: LeftOut
    cut: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.tokens], dtype=np.int64)

    def select(self, chosen: np.ndarray) -> "Conversations":
        """Those where chosen (n,) bool is True."""
        parts = (self.tokens, self.learnt, self.where)
        tokens, learnt, where = (list(compress(part, chosen)) for part in parts)
        return replace(self, tokens=tokens, learnt=learnt, where=where)

    def log(self) -> list[str]:
        """What became of the rows, a line for each reason."""
        cut = [f"cut {self.cut:,} to fit block_size"] if self.cut else []
        return [f"{self.path}: {line}" for line in self.left_out.lines() + cut]


def encode_row(
    row: object, tokenizer: Tokenizer, template: str, longest: int, overlong: str
) -> Encoded:
    """A row as a conversation of at most `longest` tokens. Raises ChatError."""
    messages = messages_from_row(row)
    ids, learnt = encode_chat(messages, tokenizer, template)
    if len(ids) > longest and (overlong == "drop" or not any(learnt[:longest])):
        why = ", and cut before its first answer" if overlong == "cut" else ""
        raise TooLong(
            f"longer than block_size{why}",
            f"the conversation has {len(ids)} tokens, but a row of block_size {longest - 1} holds "
            f"{longest}",
        )
    return messages, {"": (ids[:longest], learnt[:longest])}, len(ids) > longest


def load_conversations(
    data: str, tokenizer: Tokenizer, block_size: int, *, template: str, overlong: str = "drop",
    bad_rows: str = "error", val_fraction: float = 0.0, limit: int | None = None,
    encode: Callable[..., Encoded] = encode_row, known: dict[str, ChatDataset] = CHAT_DATASETS,
) -> tuple[Conversations, Conversations]:  # fmt: skip
    """Reads and tokenises data (see read_rows) into (train, val), which share left_out and cut.

    block_size: the longest row; a conversation of more than block_size + 1 tokens is overlong.
    overlong: "drop", or "cut" (at the end, and dropped where nothing to learn is left).
    bad_rows: "error" ends at a row that cannot be used, "skip" counts it.
    val_fraction: a row is val by a hash of its first question, so that the same question is never
    in both; above 0, at least one question is val and one train.
    limit: read only so many rows that can be used. encode: how a row is read.
    Raises ValueError and OSError with the place of what is wrong, and ValueError for settings that
    no row could meet, where nothing is left, or only one question to be split.
    """
    check_settings(tokenizer, template, block_size)
    left_out, used, n_cut = LeftOut(), 0, 0
    tokens, learnt, where, hashes = [], [], [], []

    def refuse(bad: BadRow) -> None:
        if bad_rows == "error" and not isinstance(bad, TooLong):
            raise ValueError(f"{bad}; --bad_rows skip leaves such rows out, and counts them")
        left_out.add(bad.kind, str(bad))

    for place, row in read_rows(data, left_out, refuse, known):
        if used == limit:
            break
        try:
            messages, parts, cut = encode(row, tokenizer, template, block_size + 1, overlong)
        except ChatError as error:
            refuse(type(error)(error.kind, f"{place}: {error}"))
            continue
        used, n_cut = used + 1, n_cut + cut
        for part, (ids, targets) in parts.items():
            tokens.append(np.array(ids, np.uint16))
            learnt.append(np.array(targets, bool))
            where.append(f"{place}{part}")
            hashes.append(question_hash(messages))
    if not tokens:
        n_rows, reasons = sum(n for n, _ in left_out.values()), "; ".join(left_out.lines())
        raise ValueError(
            f"{data}: nothing to train on in {n_rows:,} rows: {reasons or 'it is empty'}"
        )
    low, high, bound = min(hashes), max(hashes), val_fraction * 2.0**64
    if val_fraction > 0 and low == high:
        raise ValueError(
            f"{data}: one question cannot be in train and in val: name a file as val_data, or "
            "switch validation off with eval_every 0"
        )
    is_val = np.array([bound > 0 and h != high and (h < bound or h == low) for h in hashes])
    both = Conversations(data, tokens, learnt, where, left_out, n_cut)
    return both.select(~is_val), both.select(is_val)


def question_hash(messages: list[Message]) -> int:
    """64 bits of a conversation's first question."""
    first = next(m for m in messages if m["role"] == "user")
    return Row(f"{first['content'].strip()}\n{(first.get('input') or '').strip()}").hash()


def check_settings(tokenizer: Tokenizer, template: str, block_size: int) -> None:
    """Raises ValueError for what would make every row impossible, before one is blamed for it."""
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    shortest = min(len(encode_chat(m, tokenizer, template)[0]) for m in (turns, turns[1:]))
    if shortest > block_size + 1:
        raise ValueError(
            f"block_size {block_size} is too short: with template {template} and this tokenizer a "
            f"conversation has {shortest} tokens or more, and a row holds {block_size + 1}"
        )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[tuple[int, int]]]:
    """Lengths put into bins of a capacity: for each bin (where it starts, index) of those in it.

    lengths: 1 to capacity. From the longest to the shortest (of equals the first first), each into
    the bin with the least room that holds it (of equals the last filled).
    """
    bins: list[list[tuple[int, int]]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room left in them
    rooms = 0  # bit r: there is a bin with room r
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit
            chosen = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append((capacity - room, item))
        with_room[room - length].append(chosen)
        rooms |= 1 << room - length
    return bins


class ConversationLoader(BatchSource):
    """Rows of packed conversations; see gpt2.data.loader.BatchSource.

    data: as load_conversations gives it; a conversation of n tokens takes n - 1 positions, since
    its last token is only predicted. shuffle: False gives the rows in order, for validation. pad:
    the token that fills rows up. chat_template: the name of the template they are written in.

    Attributes: n_filled (positions of an epoch that hold a conversation), n_targets (those that are
    learnt).
    """

    names, backend = ("idx", "targets", "doc_start"), "packed"

    def __init__(
        self, data: Conversations, block_size: int, seed: int = 1337, shuffle: bool = True,
        *, pad: int = 0, chat_template: str | None = None,
    ):  # fmt: skip
        self.data, self.pad, self.chat_template = data, pad, chat_template
        self.block_size, self.seed, self.shuffle = block_size, seed % (1 << 64), shuffle
        # The first token of a conversation has nothing before it to be predicted from.
        self.n_targets = sum(int(learnt[1:].sum()) for learnt in data.learnt)
        self.n_filled = int(data.lengths.sum()) - len(data)
        self.rows = self.fill_rows()
        self.n_windows = len(self.rows)
        self.n_tokens = self.n_windows * block_size  # positions, the filling included

    def fill_rows(self) -> list[list[tuple[int, int]]]:
        """For each row (first position, conversation) of those in it, in order."""
        return best_fit_decreasing(self.data.lengths - 1, self.block_size)

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(first position, position after the last, conversation) of those in a row, in order."""
        lengths = self.data.lengths
        return [(start, start + int(lengths[i]) - 1, i) for start, i in self.rows[row]]

    def index(self, sample: int) -> int:
        """The row that is a sample of the run."""
        epoch, index = divmod(sample, self.n_windows)
        if self.shuffle:
            index = permute(index, self.n_windows, epoch_key(self.seed, epoch))
        return index

    def read(self, samples: np.ndarray, global_batch_size: int) -> Batch:
        """idx and targets (rows, block_size) int64, -100 where nothing is learnt; doc_start (rows,
        block_size) int32."""
        shape = len(samples), self.block_size
        idx, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        doc_start = np.tile(np.arange(self.block_size, dtype=np.int32), (len(samples), 1))
        for r, sample in enumerate(samples.tolist()):
            for start, stop, i in self.spans(self.index(sample)):
                tokens, learnt = self.data.tokens[i], self.data.learnt[i]
                idx[r, start:stop] = tokens[:-1]
                targets[r, start:stop][learnt[1:]] = tokens[1:][learnt[1:]]
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
        for part in (*self.data.tokens, *self.data.learnt, np.cumsum(self.data.lengths)):
            hasher.update(part.tobytes())
        return [{"path": self.data.path, "rows": self.n_windows, "hash": hasher.hexdigest()}]

    def content(self) -> str:
        rows = f"{self.n_windows:,} packed rows of {self.block_size}"
        return f"{len(self.data):,} conversations in {rows}"

    def describe(self) -> str:
        """One line on what the rows hold."""
        filled = self.n_filled / self.n_tokens
        return f"{self.content()}, {filled:.1%} filled, {self.n_targets:,} tokens to learn"
