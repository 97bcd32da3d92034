"""Conversations as training rows: tokenised, split, packed, and given out like TokenLoader's.

A conversation of n tokens takes n - 1 positions of a row: the model sees all but the last, and
position t is to predict token t + 1 where that is learnt. Packing puts several into a row of
block_size; doc_start keeps each to itself and restarts its positions, so each gives the same losses
as alone. What is left of a row is filled up with end-of-text tokens that see only themselves and
count nowhere.

Rows are filled best-fit decreasing, as TRL's `bfd` does: conversations from the longest to the
shortest, each into the row with the least room that holds it. The rows stay the same in all epochs;
their order is the loader's permutation, computed from (seed, epoch). So a batch is a pure function
of (data, seed, step), and each conversation comes exactly once an epoch.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gpt2.data.chat import ChatError, Message, encode_chat
from gpt2.data.conversations import Counts, read_conversations, refuse
from gpt2.data.loader import Batch, Provenance, rank_rows
from gpt2.data.numpy_backend import epoch_key, permute
from gpt2.data.readers import Row
from gpt2.tokenizer import Tokenizer

IGNORE_INDEX = -100  # as gpt2.train.objectives has it, which is above this
MAX_BLOCK_SIZE = 1 << 20


@dataclass
class Conversations:
    """Tokenised conversations, one after the other.

    tokens (N,) uint16; learnt (N,) bool: tokens that are to be predicted; ends (n,) int64: where
    each conversation ends. where: the place each comes from. counts: what became of the rows.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    ends: np.ndarray
    where: list[str]
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def select(self, chosen: np.ndarray) -> "Conversations":
        """Those of these indices, in this order."""
        ends, lengths = self.ends[chosen], self.lengths[chosen]
        spans = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        return replace(
            self,
            tokens=np.concatenate([self.tokens[span] for span in spans] or [self.tokens[:0]]),
            learnt=np.concatenate([self.learnt[span] for span in spans] or [self.learnt[:0]]),
            ends=np.cumsum(lengths),
            where=[self.where[i] for i in chosen],
        )


def load_conversations(
    data: str,
    tokenizer: Tokenizer,
    block_size: int,
    *,
    template: str,
    overlong: str = "drop",
    bad_rows: str = "error",
    val_fraction: float = 0.0,
    max_conversations: int | None = None,
) -> tuple[Conversations, Conversations]:
    """Reads and tokenises data (see read_conversations) into (train, val); both share counts.

    block_size: the longest row; a conversation of more than block_size + 1 tokens is overlong.
    overlong: "drop", "cut" (at the end, and dropped where nothing to learn is left) or "error".
    bad_rows: "error" or "skip", for rows without answer and the like. Whatever is dropped, cut or
    skipped is in counts.
    val_fraction: conversations become val by a hash of their first question, so that the same
    question is never in both. max_conversations: read only so many usable ones.
    Raises ValueError and OSError with the place of what is wrong, and ValueError where nothing is
    left.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit 16-bit tokens")
    counts, tokens, learnt = Counts(), [], []
    where: list[str] = []
    is_val: list[bool] = []
    for place, messages in read_conversations(data, counts, bad_rows=bad_rows):
        if counts.used == max_conversations:
            counts.rows -= 1  # read, but not wanted
            break
        try:
            ids, targets = encode_chat(messages, tokenizer, template)
            if len(ids) > block_size + 1:
                ids, targets = _fit(ids, targets, block_size + 1, overlong, place, counts)
        except ChatError as error:
            # What does not fit is governed by overlong alone.
            allowed = "skip" if error.kind.startswith("longer") else bad_rows
            refuse(error, place, counts, allowed)
            continue
        counts.used += 1
        tokens.append(np.array(ids, dtype=np.uint16))
        learnt.append(np.array(targets, dtype=bool))
        where.append(place)
        is_val.append(question_hash(messages) < val_fraction * 2.0**64)
    if not tokens:
        reasons = "; ".join(counts.lines()) or "it is empty"
        raise ValueError(f"{data}: no conversation to train on in {counts.rows:,} rows: {reasons}")
    ends = np.cumsum([len(part) for part in tokens])
    both = Conversations(np.concatenate(tokens), np.concatenate(learnt), ends, where, counts)
    return both.select(np.flatnonzero(~np.array(is_val))), both.select(np.flatnonzero(is_val))


def _fit(ids, targets, longest: int, overlong: str, place: str, counts: Counts):
    text = (
        f"the conversation has {len(ids)} tokens, but a row of block_size {longest - 1} holds "
        f"{longest}"
    )
    if overlong == "error":
        raise ValueError(f"{place}: {text}; use --overlong drop or cut, or a longer block_size")
    if overlong == "drop":
        raise ChatError("longer than block_size", text)
    if not any(targets[:longest]):
        raise ChatError("longer than block_size, and cut before its first answer", text)
    counts.cut += 1
    return ids[:longest], targets[:longest]


def question_hash(messages: list[Message]) -> int:
    """64 bits of a conversation's first question, by which conversations become val."""
    first = next(m for m in messages if m["role"] == "user")
    return Row(f"{first['content'].strip()}\n{(first.get('input') or '').strip()}").hash()


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of lengths, put into bins that hold at most capacity in all.

    From the longest to the shortest (of equals the first first), each into the bin with the least
    room that holds it (of equals the last filled). Raises ValueError where one is too long for any.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> bins
    rooms: list[int] = []  # keys of with_room, sorted
    for item in order:
        length = int(lengths[item])
        if length > capacity:
            raise ValueError(f"item {item} of length {length} is longer than {capacity}")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - length
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


class ConversationLoader:
    """Rows of conversations, each exactly once an epoch; batch and attributes as TokenLoader's.

    conversations: each of 2 to block_size + 1 tokens. packing: several to a row; else one.
    shuffle: False gives the rows in order, for validation. pad: the token that fills rows up.
    chat_template: the name of the template they are written in; it goes into checkpoints.

    Attributes: n_windows (rows in an epoch), n_tokens (positions in them, the filling included),
    n_targets (positions that are learnt), n_filled (positions that hold a conversation), backend.
    Raises ValueError for no conversations and for those that do not fit.
    """

    def __init__(
        self,
        conversations: Conversations,
        block_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        *,
        packing: bool = True,
        pad: int = 0,
        chat_template: str | None = None,
    ):
        if not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must lie in [1, {MAX_BLOCK_SIZE}], got {block_size}")
        if not len(conversations):
            raise ValueError("there are no conversations to make rows of")
        lengths = conversations.lengths - 1
        if lengths.min() < 1 or lengths.max() > block_size:
            raise ValueError(
                f"conversations must have 2 to {block_size + 1} tokens for block_size {block_size},"
                f" got {lengths.min() + 1} to {lengths.max() + 1}"
            )
        self.conversations, self.block_size, self.pad = conversations, block_size, pad
        self.seed, self.shuffle, self.chat_template = seed % (1 << 64), shuffle, chat_template
        self.rows = (
            best_fit_decreasing(lengths, block_size)
            if packing
            else [[i] for i in range(len(lengths))]
        )
        self.backend, self.doc_mask = "packed" if packing else "padded", True
        self.n_windows = len(self.rows)
        self.n_tokens = self.n_windows * block_size
        self.n_filled = int(lengths.sum())
        starts = conversations.ends - conversations.lengths
        # A conversation's first token has nothing before it to be predicted from.
        self.n_targets = int(conversations.learnt.sum() - conversations.learnt[starts].sum())

    def batch(
        self,
        step: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        out: Batch | None = None,
    ) -> Batch:
        """The rows of a step's global batch that belong to a rank, as TokenLoader.batch.

        Returns idx (rows, block_size) int64; targets (rows, block_size) int64, -100 where nothing
        is learnt; doc_start (rows, block_size) int32. Raises ValueError for numbers out of range.
        """
        first, rows = rank_rows(step, global_batch_size, rank, world_size)
        out = self.buffers(rows) if out is None else out
        for parts in zip(*(part.numpy() for part in out), range(first, first + rows), strict=True):
            self._fill(*parts)
        return out

    def buffers(self, rows: int, *, pin_memory: bool = False) -> Batch:
        """Tensors for a batch of so many rows, not initialised."""
        shape = (rows, self.block_size)
        return tuple(
            torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
            for dtype in (torch.int64, torch.int64, torch.int32)
        )

    def members(self, sample: int) -> list[int]:
        """The conversations in a sample of the run, in the order in which they stand in its row."""
        epoch, index = divmod(sample, self.n_windows)
        if self.shuffle:
            index = permute(index, self.n_windows, epoch_key(self.seed, epoch))
        return self.rows[index]

    def spans(self, sample: int) -> list[tuple[int, int, int]]:
        """(first position, position behind the last, conversation) in a sample of the run."""
        at, found = 0, []
        for i in self.members(sample):
            length = int(self.conversations.ends[i] - (self.conversations.ends[i - 1] if i else 0))
            found.append((at, at + length - 1, i))
            at += length - 1
        return found

    def provenance(self, step: int, row: int, global_batch_size: int, token: int = 0) -> Provenance:
        """Where the conversation at token `token` of a row of the global batch came from.

        shard is its place in the data, offset the token in it, document its number. The filling
        counts as the end of the conversation before it. Raises as batch does.
        """
        first, rows = rank_rows(step, global_batch_size)
        if not 0 <= row < rows or not 0 <= token <= self.block_size:
            raise ValueError(f"row {row}, token {token} is not in a step of {rows} rows")
        spans = self.spans(first + row)
        start, stop, i = next((s for s in spans if token < s[1]), spans[-1])
        return Provenance(self.conversations.where[i], min(token, stop) - start, i)

    def describe(self) -> str:
        """One line on what the rows hold."""
        return (
            f"{len(self.conversations):,} conversations in {self.n_windows:,} {self.backend} rows "
            f"of {self.block_size}, {self.n_filled / self.n_tokens:.1%} filled, "
            f"{self.n_targets:,} tokens to learn"
        )

    def _fill(self, idx: np.ndarray, targets: np.ndarray, doc_start: np.ndarray, sample: int):
        data, stop = self.conversations, 0
        for start, stop, i in self.spans(sample):
            end = int(data.ends[i])
            begin = end - (stop - start) - 1
            idx[start:stop] = data.tokens[begin : end - 1]
            targets[start:stop] = data.tokens[begin + 1 : end]
            targets[start:stop][~data.learnt[begin + 1 : end]] = IGNORE_INDEX
            doc_start[start:stop] = start
        idx[stop:], targets[stop:] = self.pad, IGNORE_INDEX
        doc_start[stop:] = np.arange(stop, self.block_size)
