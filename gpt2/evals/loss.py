"""Validation loss over a split of token shards, each window once."""

from contextlib import nullcontext
from math import exp
from pathlib import Path

import torch
from torch import Tensor

from gpt2.data import TokenLoader, find_shards, read_manifest
from gpt2.evals.scoring import (
    IGNORE_INDEX,
    TOKENS_PER_BATCH,
    Autocast,
    Group,
    Poll,
    scoring,
    spread,
)
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer


def open_val(folder: str | Path, tokenizer: Tokenizer, block_size: int) -> TokenLoader:
    """The val shards of a prepared folder, in order.

    Raises OSError (none there) and ValueError where they were made with another tokenizer.
    """
    shards, manifest = find_shards(folder, "val"), read_manifest(folder)
    theirs = manifest["tokenizer"] if manifest else {"name": "gpt2"}
    if theirs != tokenizer.to_dict():
        name = theirs.get("name") if isinstance(theirs, dict) else theirs
        known = "" if manifest else " (it has no manifest.json, so GPT-2's is assumed)"
        raise ValueError(
            f"{folder} was made with {'another' if name == tokenizer.name else 'the'} {name} "
            f"tokenizer{known}, the model has a {tokenizer.name} tokenizer of "
            f"{tokenizer.vocab_size}: prepare the data with the model's"
        )
    return TokenLoader(
        shards, block_size, shuffle=False, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot,
    )  # fmt: skip


def validation_loss(
    model: GPT,
    data: TokenLoader,
    group: Group,
    *,
    limit: int | None = None,
    autocast: Autocast = nullcontext,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    poll: Poll | None = None,
) -> dict[str, float] | None:
    """Mean loss a token, its perplexity, and tokens, over all windows of data and all ranks.

    limit: only the first so many windows.  autocast, poll: as in gpt2.evals.hellaswag.
    """
    n_windows = data.n_windows if limit is None else min(limit, data.n_windows)
    rows = max(tokens_per_batch // data.block_size, 1)
    device = model.lm_head.weight.device

    def score(batch: int) -> Tensor:
        x, y, *_ = data.batch(batch, rows)
        y[max(n_windows - batch * rows, 0) :] = IGNORE_INDEX  # beyond the end: the next epoch
        x, y = x.to(device), y.to(device)
        losses = model.ops.linear_cross_entropy(
            model.hidden(x).flatten(0, 1), model.lm_head.weight, y.flatten(),
            ignore_index=IGNORE_INDEX, reduction="sum", vocab_size=model.config.vocab_size,
        )  # fmt: skip
        return torch.stack([losses.double(), (y != IGNORE_INDEX).sum().double()])

    with scoring(model, autocast):
        sums = spread(range(-(-n_windows // rows)), group, score, 2, poll)
    if sums is None:
        return None
    loss = sums[0] / sums[1]
    return {"loss": loss, "perplexity": exp(loss), "tokens": int(sums[1])}
