"""What a trainer measures between two steps: the validation loss, and a sample of text.

Each is called by all ranks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gpt2.config import IGNORE_INDEX
from gpt2.data.feed import Feed
from gpt2.device import Execution
from gpt2.dist import Distributed
from gpt2.generate import generate
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.layouts import Layout

SAMPLE_TOKENS = 100


@torch.no_grad()
def mean_losses(
    layout: Layout, objective: nn.Module, feed: Feed, execution: Execution, group: Distributed, *,
    n_rows: int, micro_batch_size: int, stop_asked: Callable[[], bool],
) -> dict[str, float] | None:  # fmt: skip
    """The objective over the first n_rows rows of validation data, spread over all ranks.

    stop_asked: asked before each batch, of the same answer on all ranks.
    Returns the mean loss as "loss", and the objective's metrics; None where a stop was asked for.
    """
    rows = micro_batch_size * group.world_size
    sums: dict[str, Tensor] = {}
    objective.eval()
    try:
        for i in range(-(-n_rows // rows)):
            if stop_asked():
                return None
            parts = feed.batch(i, rows, group.rank, group.world_size)
            batch = dict(zip(feed.source.names, parts, strict=True))
            # The last batch is filled up with rows that do not count: all have one shape.
            first = i * rows + group.rank * micro_batch_size
            batch["targets"][max(n_rows - first, 0) :] = IGNORE_INDEX
            with execution.autocast():
                loss_sum, metrics = layout.eval_forward(batch)
            found = {"loss": loss_sum, **metrics, "units": objective.count(batch)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()
    finally:
        objective.train()
    *values, units = group.sum(torch.stack(list(sums.values()))).tolist()
    return {name: value / units for name, value in zip(sums, values, strict=False)}


def sample_text(layout: Layout, model: GPT, tokenizer: Tokenizer) -> str:
    """How a text goes on from its start; a character model starts from a newline, if it has one."""
    if tokenizer.eot is not None:
        start = [tokenizer.eot]
    else:
        start = tokenizer.encode("\n" if "\n" in tokenizer.chars else tokenizer.chars[0])
    room = model.config.block_size - len(start)
    tokens = layout.call_model(partial(
        generate, model, [start], max_new_tokens=min(room, SAMPLE_TOKENS), temperature=0.8,
        top_k=50, vocab_size=tokenizer.vocab_size, seed=0,
    ))  # fmt: skip
    return tokenizer.decode(tokens[0])
