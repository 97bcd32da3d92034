"""What all evaluations share: the losses of some tokens of many rows, spread over the ranks.

Work is cut into batches that do not depend on the number of ranks, and rank r of n takes batches
r, r + n, ... So every example counts once, and a count is the same for any number of ranks.

A context with several endings is run once, and its keys and values are handed to a row for each.
Examples are sorted by context length. A batch runs the first tokens that all its contexts have,
one row an example; what is left of a context goes before each of its endings: so nothing is padded
on the left, and the result is that of plain rows.

R rows, C channels, N scored tokens of a batch, E the most of one row.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2.config import IGNORE_INDEX
from gpt2.dist import Distributed
from gpt2.model import GPT, KVCache
from gpt2.tokenizer import Tokenizer

TOKENS_PER_BATCH = 8192  # fed to the model at once, padding included
SPAN = 8  # tokens by which the shared beginnings of a batch may differ
Item = TypeVar("Item")
Single = partial(Distributed, 0, 1)  # this process alone, on a device, by default the CPU


class Tails(NamedTuple):
    """What scores the last tokens of rows: the states hidden (N, C) before targets (N,) int64.

    is_target (R, E) bool: which of the places of a row are taken; row by row they are the N.
    """

    hidden: Tensor
    targets: Tensor
    is_target: Tensor

    def by_row(self, values: Tensor) -> Tensor:
        """values (N,) as (R, E), zero where a row has fewer targets."""
        return values.new_zeros(self.is_target.shape).masked_scatter(self.is_target, values)


def spread(
    model: GPT, batches: Sequence[Item], group: Distributed, score: Callable[[Item], Tensor], *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    poll: Callable[[], bool] | None = None,
) -> list[float] | None:  # fmt: skip
    """score(batch) -> (n,) added up over all batches and ranks, each batch once.

    Where one sum is NaN all are: nothing that a model of NaN gets right is a score.
    autocast: gives the context manager of the precision; default: the model's own.
    poll: asked before each round of one batch a rank; True, on all ranks together, ends it: None.
    All ranks run the model equally often, the spare runs uncounted: a sharded model needs them all.
    """
    totals, was_training = 0.0, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast():
            for first in range(0, len(batches), group.world_size):
                if poll is not None and poll():
                    return None
                counts = first + group.rank < len(batches)
                sums = score(batches[first + group.rank if counts else first]).double()
                totals = totals + (sums if counts else torch.zeros_like(sums))
            sums = group.sum(totals).tolist()
    finally:
        model.train(was_training)
    return [math.nan] * len(sums) if any(map(math.isnan, sums)) else sums


def run_endings(model: GPT, batch: Sequence) -> Tails:
    """The model on every ending of every example, in their order, after its context.

    batch: of what has a context and endings as tokens, each as many endings.
    """
    shared = min(_size(e)[0] for e in batch)
    rows = [(e.context + ending)[shared:] for e in batch for ending in e.endings]
    cache = None
    if shared:
        weight = model.lm_head.weight
        device, kind = weight.device, weight.device.type
        # The dtype that keys and values have under autocast.
        lowered = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if lowered else weight.dtype
        capacity = shared + max(map(len, rows)) - 1
        cache = KVCache(model.config, len(batch), capacity, device, dtype)
        prefixes = torch.tensor([e.context[:shared] for e in batch])  # (B, shared)
        model.hidden(prefixes.to(device, non_blocking=True), cache=cache)
        cache.select(torch.arange(len(rows), device=device) // (len(rows) // len(batch)))
    return tails(model, rows, [len(ending) for e in batch for ending in e.endings], cache)


def tails(
    model: GPT, rows: list[list[int]], n_scored: list[int], cache: KVCache | None = None
) -> Tails:
    """The model on rows, for the last n_scored[r] tokens of each.

    rows: R lists of at least n_scored + 1 tokens, the last of each a target only. They are padded
    after their end, which nothing before it sees.  cache: tokens before the rows; is written to.
    """
    move = partial(torch.Tensor.to, device=model.lm_head.weight.device, non_blocking=True)
    idx = pad_sequence([torch.tensor(row[:-1]) for row in rows], batch_first=True)  # (R, T)
    counts = torch.tensor(n_scored)[:, None]
    column = torch.arange(int(counts.max()))  # (E,)
    last = torch.tensor([len(row) - 1 for row in rows])[:, None]
    place = torch.arange(len(rows))[:, None] * idx.shape[1] + last - counts + column  # (R, E)
    is_target = column < counts
    targets = [token for row, n in zip(rows, n_scored, strict=True) for token in row[-n:]]
    h = model.hidden(move(idx), cache=cache).flatten(0, 1)  # (R * T, C)
    return Tails(h[move(place[is_target])], move(torch.tensor(targets)), move(is_target))


def token_losses(model: GPT, scored: Tails) -> Tensor:
    """-log p of each target, (R, E) float32, zero where a row has fewer targets."""
    losses = model.ops.linear_cross_entropy(
        scored.hidden, model.lm_head.weight, scored.targets, ignore_index=IGNORE_INDEX,
        reduction="none", vocab_size=model.config.vocab_size,
    )  # fmt: skip
    return scored.by_row(losses.float())


def mean_scores(
    model: GPT, examples: Sequence[Item], group: Distributed,
    score: Callable[[list[Item]], Tensor], *, tokens_per_batch: int = TOKENS_PER_BATCH,
    samples: dict[int, list[float]] | None = None, **options,
) -> list[float] | None:  # fmt: skip
    """The means over all examples of score(batch) -> (B, n); options: of spread.

    samples: gets what each example scored, by its number, of all ranks.
    """
    if not examples:
        raise ValueError("there is nothing to evaluate: give at least one example")
    mine = {}

    def total(batch: list[Item]) -> Tensor:
        found = score(batch).double()
        if samples is not None:
            mine.update(zip((e.number for e in batch), found.tolist(), strict=True))
        return found.sum(0)

    sums = spread(model, pack(examples, tokens_per_batch), group, total, **options)
    if samples is not None:
        for part in group.gather(mine):
            samples.update(part)
    return sums and [value / len(examples) for value in sums]


def pack(examples: Sequence[Item], budget: int) -> list[list[Item]]:
    """Examples, sorted by size, in batches of at most budget tokens; one alone may be above it.

    Shared beginnings in a batch differ by less than SPAN, even where the budget has room.
    """
    batches, first, longest, n_rows = [], 0, 0, 0
    for example in sorted(examples, key=_size):
        prefix, rows, tokens = _size(example)
        longest, n_rows = max(longest, tokens), n_rows + rows
        cost = batches and (len(batches[-1]) + 1) * first + n_rows * (longest - first)
        if not batches or cost > budget or prefix - first >= SPAN:
            batches.append([])
            first, longest, n_rows = prefix, tokens, rows
        batches[-1].append(example)
    return batches


def _size(example) -> tuple[int, int, int]:
    """Tokens that are worth being run once for all endings; endings; tokens of the longest row."""
    context, n_endings = len(example.context), len(example.endings)
    return (n_endings > 1) * (context - 1), n_endings, context + max(map(len, example.endings))


def encode_example(
    tokenizer: Tokenizer, context: str, endings: list[str], block_size: int
) -> tuple[list[int], list[list[int]], bool]:
    """The context's end that fits block_size, the endings, and whether the context was cut.

    An ending is encoded with a space before it, apart from the context. Raises ValueError where
    it does not fit.
    """
    tokens = [tokenizer.encode(f" {ending}") for ending in endings]
    n_scored = max(map(len, tokens))
    room = block_size + 1 - n_scored
    if room < 1:
        raise ValueError(f"{n_scored} tokens to be predicted do not fit the model's context "
                         f"(block_size) of {block_size}: leave this task out")  # fmt: skip
    whole = tokenizer.encode(context)
    return whole[-room:], tokens, len(whole) > room


def exp(x: float) -> float:
    """e to the power of x, infinite where that does not fit a float, as of a diverged model."""
    return math.exp(x) if x < 709 or math.isnan(x) else math.inf
