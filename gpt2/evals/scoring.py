"""What all evaluations share: the losses of some tokens of many rows, spread over the ranks.

Work is cut into batches that do not depend on the number of ranks, and rank r of n takes batches
r, r + n, ... So every example counts once, and a count is the same for any number of ranks.

R rows, T time, C channels, V vocabulary, N scored tokens (targets) of a batch, E the most scored
tokens of one row.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gpt2.config import IGNORE_INDEX
from gpt2.model import GPT, KVCache

TOKENS_PER_BATCH = 8192  # fed to the model at once, padding included
SPAN = 8  # tokens by which the shared beginnings of a batch may differ
Item = TypeVar("Item")
Autocast = Callable[[], AbstractContextManager]
Poll = Callable[[], bool]


class Group(Protocol):
    """The processes that share the work; gpt2.dist.Distributed is one."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, value: Tensor) -> Tensor:
        """value added up over all processes."""


@dataclass(frozen=True)
class Single:
    """A group of this process alone."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class Tails:
    """What the head needs to score the last tokens of rows.

    hidden (N, C): the states that the targets follow.  targets (N,) int64.
    row, column (N,) int64: which target of which row each one is.  shape: (R, E).
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    def by_row(self, values: Tensor) -> Tensor:
        """values (N,) as (R, E), zero where a row has fewer targets."""
        table = values.new_zeros(self.shape)
        table[self.row, self.column] = values  # each place once, so the order does not matter
        return table


@contextmanager
def scoring(model: GPT, autocast: Autocast = nullcontext):
    """Evaluation mode, no gradients, and the precision of autocast; leaves the mode as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast():
            yield
    finally:
        model.train(was_training)


def spread(
    batches: Sequence[Item],
    group: Group,
    score: Callable[[Item], Tensor],
    n_sums: int,
    poll: Poll | None = None,
) -> list[float] | None:
    """score(batch) -> (n_sums,) added up over all batches and ranks, each batch once.

    poll: asked before each round of one batch a rank; True ends the evaluation, which then gives
    None. It has to answer the same on all ranks.
    All ranks run the model equally often, the spare runs uncounted: a model that is sharded over
    the ranks needs them all.
    """
    totals = torch.zeros(n_sums, dtype=torch.float64, device=group.device)
    for first in range(0, len(batches), group.world_size):
        if poll is not None and poll():
            return None
        mine = first + group.rank
        sums = score(batches[mine if mine < len(batches) else first])
        if mine < len(batches):
            totals += sums
    return group.sum(totals).tolist()


def tails(
    model: GPT, rows: list[list[int]], n_scored: list[int], cache: KVCache | None = None
) -> Tails:
    """Runs the model on rows and picks the states that predict the last n_scored[r] tokens of each.

    rows: R lists of tokens of any lengths, the last token of each a target only, so at least
    n_scored + 1 tokens each. They are padded behind their end, which nothing before it sees.
    cache: tokens before the rows; it is written to.
    """
    device = model.lm_head.weight.device
    lengths = np.array([len(row) for row in rows])
    counts = np.array(n_scored)
    longest = int(lengths.max()) - 1
    idx = np.zeros((len(rows), longest), dtype=np.int64)
    for r, row in enumerate(rows):
        idx[r, : len(row) - 1] = row[:-1]
    row_of = np.repeat(np.arange(len(rows)), counts)
    column = np.concatenate([np.arange(n) for n in counts])
    place = row_of * longest + (lengths - 1 - counts)[row_of] + column
    targets = np.concatenate([row[len(row) - n :] for row, n in zip(rows, n_scored, strict=True)])

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)

    h = model.hidden(on_device(idx), cache=cache).flatten(0, 1)  # (R * T, C)
    shape = (len(rows), int(counts.max()))
    return Tails(h[on_device(place)], *map(on_device, (targets, row_of, column)), shape)


def token_losses(model: GPT, scored: Tails) -> Tensor:
    """-log p of each target, (R, E) float32, zero where a row has fewer targets."""
    losses = model.ops.linear_cross_entropy(
        scored.hidden, model.lm_head.weight, scored.targets, ignore_index=IGNORE_INDEX,
        reduction="none", vocab_size=model.config.vocab_size,
    )  # fmt: skip
    return scored.by_row(losses.float())


def cache_for(model: GPT, n_rows: int, capacity: int) -> KVCache:
    """An empty cache in the dtype that the model's keys and values have under autocast."""
    weight = model.lm_head.weight
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    return KVCache(model.config, n_rows, capacity, weight.device, dtype)


def pack(sizes: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
    """Cuts a sorted list of examples into batches, lists of indices, of at most budget tokens.

    sizes: (prefix, rows, longest) of each example: tokens that are run once for all its rows, its
    rows, tokens of the longest row with the prefix. A batch runs as much as its first example's
    prefix for each example, and the rest in rows of one length; so its prefixes differ by less than
    SPAN, even where the budget has room. An example alone may be above the budget.
    """
    batches: list[list[int]] = []
    first = longest = n_rows = 0
    for i, (prefix, rows, tokens) in enumerate(sizes):
        longest, n_rows = max(longest, tokens), n_rows + rows
        n_examples = len(batches[-1]) + 1 if batches else 0
        full = n_examples * first + n_rows * (longest - first) > budget
        if not batches or full or prefix - first >= SPAN:
            batches.append([])
            first, longest, n_rows = prefix, tokens, rows
        batches[-1].append(i)
    return batches


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most limit of the items, evenly spaced: files are often sorted by kind."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def cut_left(context: list[int], n_scored: int, block_size: int) -> tuple[list[int], bool]:
    """The end of the context that fits before n_scored targets, and whether some was cut off."""
    room = block_size + 1 - n_scored
    return context[-room:], len(context) > room
