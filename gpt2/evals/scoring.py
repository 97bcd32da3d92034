"""What all evaluations share: the losses of some tokens of many rows, spread over the ranks.

Work is cut into batches that do not depend on the number of ranks, and rank r of n takes batches
r, r + n, ... So every example counts once, and a count is the same for any number of ranks.

R rows, T time, C channels, V vocabulary, N scored tokens (targets) of a batch, E the most scored
tokens of one row.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gpt2.config import IGNORE_INDEX
from gpt2.dist import Distributed
from gpt2.model import GPT, KVCache

TOKENS_PER_BATCH = 8192  # fed to the model at once, padding included
SPAN = 8  # tokens by which the shared beginnings of a batch may differ
Item = TypeVar("Item")
Single = partial(Distributed, 0, 1)  # this process alone, on a device, by default the CPU


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


def spread(
    model: GPT,
    batches: Sequence[Item],
    group: Distributed,
    score: Callable[[Item], Tensor],
    n_sums: int,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    poll: Callable[[], bool] | None = None,
) -> list[float] | None:
    """score(batch) -> (n_sums,) added up over all batches and ranks, each batch once.

    Where one sum is NaN all are: nothing that a model of NaN gets right is a score.
    autocast: a function that gives the context manager of the precision; default: the model's own.
    poll: asked before each round of one batch a rank; True, on all ranks together, ends the
    evaluation, which then gives None.
    All ranks run the model equally often, the spare runs uncounted: a model that is sharded over
    the ranks needs them all.
    """
    totals = torch.zeros(n_sums, dtype=torch.float64, device=group.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast():
            for first in range(0, len(batches), group.world_size):
                if poll is not None and poll():
                    return None
                mine = first + group.rank
                sums = score(batches[mine if mine < len(batches) else first])
                if mine < len(batches):
                    totals += sums
            sums = group.sum(totals).tolist()
    finally:
        model.train(was_training)
    return [math.nan] * n_sums if any(map(math.isnan, sums)) else sums


def tails(
    model: GPT, rows: list[list[int]], n_scored: list[int], cache: KVCache | None = None
) -> Tails:
    """Runs the model on rows and picks the states that predict the last n_scored[r] tokens of each.

    rows: R lists of tokens of any lengths, the last token of each a target only, so at least
    n_scored + 1 tokens each. They are padded after their end, which nothing before it sees.
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


def pack(
    items: Sequence[Item], size: Callable[[Item], tuple[int, int, int]], budget: int
) -> list[list[Item]]:
    """Sorts examples by their size and cuts them into batches of at most budget tokens.

    size: (prefix, rows, longest) of an example: tokens that are run once for all its rows, its
    rows, tokens of the longest row with the prefix. A batch runs as much as its first example's
    prefix for each example, and the rest in rows of one length; so its prefixes differ by less than
    SPAN, even where the budget has room. An example alone may be above the budget.
    """
    if not items:
        raise ValueError("there is nothing to evaluate: give at least one example")
    batches: list[list[Item]] = [[]]
    first = longest = n_rows = 0
    for item in sorted(items, key=size):
        prefix, rows, tokens = size(item)
        longest, n_rows = max(longest, tokens), n_rows + rows
        full = (len(batches[-1]) + 1) * first + n_rows * (longest - first) > budget
        if batches[-1] and (full or prefix - first >= SPAN):
            batches.append([])
        if not batches[-1]:
            first, longest, n_rows = prefix, tokens, rows
        batches[-1].append(item)
    return batches


def cut_left(context: list[int], n_scored: int, block_size: int) -> tuple[list[int], bool]:
    """The end of the context that fits before n_scored targets, and whether some was cut off.

    Raises ValueError where the targets alone do not fit.
    """
    room = block_size + 1 - n_scored
    if room < 1:
        raise ValueError(
            f"{n_scored} tokens to be predicted do not fit the model's context (block_size) of "
            f"{block_size}: leave this task out"
        )
    return context[-room:], len(context) > room


def exp(x: float) -> float:
    """e to the power of x, infinite where that does not fit a float, as of a diverged model."""
    return math.exp(x) if x < 709 or math.isnan(x) else math.inf
