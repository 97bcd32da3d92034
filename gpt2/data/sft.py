"""Conversations as training rows, packed.

A conversation of n tokens takes n - 1 positions of a row: the model sees all but the last, and
position t is to predict token t + 1 where that is learnt. Packing puts several into a row of
block_size; doc_start keeps each to itself and restarts its positions, so each gives the same losses
as alone. What is left of a row is filled up with end-of-text tokens that see only themselves and
count nowhere.

Rows are filled best-fit decreasing, as TRL's `bfd` does: conversations from the longest to the
shortest, each into the row with the least room that holds it. The rows stay the same in all epochs.
"""

import numpy as np
import torch

from gpt2.config import IGNORE_INDEX
from gpt2.data.chat import encode_chat, messages_from_row
from gpt2.data.loader import Batch, Provenance
from gpt2.data.rows import Conversations, RowLoader, TooLong, check_settings, load_rows
from gpt2.tokenizer import Tokenizer


def load_conversations(
    data: str,
    tokenizer: Tokenizer,
    block_size: int,
    *,
    template: str,
    overlong: str = "drop",
    **options,
) -> tuple[Conversations, Conversations]:
    """Reads and tokenises data into (train, val); options and errors: gpt2.data.rows.load_rows.

    block_size: the longest row; a conversation of more than block_size + 1 tokens is overlong.
    overlong: "drop", or "cut" (at the end, and dropped where nothing to learn is left).
    """
    check_settings(tokenizer, template, block_size)
    longest = block_size + 1

    def encode(row):
        messages = messages_from_row(row)
        ids, learnt = encode_chat(messages, tokenizer, template)
        if len(ids) > longest and (overlong == "drop" or not any(learnt[:longest])):
            why = ", and cut before its first answer" if overlong == "cut" else ""
            raise TooLong(
                f"longer than block_size{why}",
                f"the conversation has {len(ids)} tokens, but a row of block_size {block_size} "
                f"holds {longest}",
            )
        return messages, [(ids[:longest], learnt[:longest])], len(ids) > longest

    return load_rows(data, encode, "conversations", **options)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of lengths, put into bins that hold at most capacity in all.

    lengths: 1 to capacity. From the longest to the shortest (of equals the first first), each into
    the bin with the least room that holds it (of equals the last filled).
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room left in them
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        room = next((r for r in range(length, capacity) if with_room[r]), capacity)
        if room == capacity:
            bins.append([])
        chosen = len(bins) - 1 if room == capacity else with_room[room].pop()
        bins[chosen].append(item)
        with_room[room - length].append(chosen)
    return bins


class ConversationLoader(RowLoader):
    """Rows of several conversations each; see RowLoader.

    A batch is idx (rows, block_size) int64; targets (rows, block_size) int64, -100 where nothing is
    learnt; doc_start (rows, block_size) int32.
    Attributes besides: rows (the conversations of each), n_filled (positions that hold one).
    """

    names, backend, full_rows = ("idx", "targets", "doc_start"), "packed", True

    def __init__(self, conversations: Conversations, block_size: int, *args, **options):
        super().__init__(conversations, block_size, *args, **options)
        lengths = conversations.lengths - 1
        self.rows, self.block_size = best_fit_decreasing(lengths, block_size), block_size
        self.n_windows, self.n_filled = len(self.rows), int(lengths.sum())

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(first position, position after the last, conversation) of those in a row."""
        ends = np.cumsum([self.data.lengths[i] - 1 for i in self.rows[row]]).tolist()
        return list(zip([0, *ends], ends, self.rows[row], strict=False))

    def make(self, rows: list[int]) -> Batch:
        shape, data = (len(rows), self.block_size), self.data
        idx, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        doc_start = np.tile(np.arange(self.block_size, dtype=np.int32), (len(rows), 1))
        for r, row in enumerate(rows):
            for start, stop, i in self.spans(row):
                end = int(data.ends[i])
                begin = end - (stop - start) - 1
                idx[r, start:stop] = data.tokens[begin : end - 1]
                learnt = data.learnt[begin + 1 : end]
                targets[r, start:stop][learnt] = data.tokens[begin + 1 : end][learnt]
                doc_start[r, start:stop] = start
        return tuple(map(torch.from_numpy, (idx, targets, doc_start)))

    def place(self, row: int, token: int) -> Provenance:
        """The filling counts as the end of the conversation before it."""
        spans = self.spans(row)
        start, stop, i = next((s for s in spans if token < s[1]), spans[-1])
        return Provenance(self.data.where[i], min(token, stop) - start, i)

    def describe(self) -> str:
        return (
            f"{len(self.data):,} conversations in {self.n_windows:,} packed rows of "
            f"{self.block_size}, {self.n_filled / self.n_tokens:.1%} filled, "
            f"{self.n_targets:,} tokens to learn"
        )
