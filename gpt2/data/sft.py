"""Conversations as training rows, packed.

Packing puts several conversations into a row of block_size; doc_start keeps each to itself and
restarts its positions, so each gives the same losses as alone. What is left of a row is filled up
with end-of-text tokens that see only themselves and count nowhere.

Rows are filled best-fit decreasing, as TRL's `bfd` does: conversations from the longest to the
shortest, each into the row with the least room that holds it. The rows stay the same in all epochs.
"""

import numpy as np

from gpt2.data.chat import encode_chat, messages_from_row
from gpt2.data.rows import Conversations, RowLoader, TooLong, check_settings, load_rows
from gpt2.tokenizer import Tokenizer


def load_conversations(
    data: str, tokenizer: Tokenizer, block_size: int, *, template: str, overlong: str = "drop",
    **options,
) -> tuple[Conversations, Conversations]:  # fmt: skip
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
        bins[chosen].append(item)
        with_room[room - length].append(chosen)
        rooms |= 1 << room - length
    return bins


class ConversationLoader(RowLoader):
    """Rows of several conversations each, their indices in rows; see RowLoader."""

    names, backend = ("idx", "targets", "doc_start"), "packed"

    def __init__(self, conversations: Conversations, block_size: int, *args, **options):
        super().__init__(conversations, *args, **options)
        self.rows = best_fit_decreasing(conversations.lengths - 1, block_size)
        self.n_windows, self.block_size = len(self.rows), block_size

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        ends = np.cumsum(self.data.lengths[self.rows[row]] - 1).tolist()
        return list(zip([0, *ends], ends, self.rows[row], strict=False))

    def content(self) -> str:
        rows = f"{self.n_windows:,} packed rows of {self.block_size}"
        return f"{len(self.data):,} conversations in {rows}"
