"""HellaSwag in the completion style: the ending that the model finds the least surprising wins.

The loss of an ending counts its own tokens only, after those of the context; acc takes the smallest
sum, acc_norm the smallest mean. The ending is encoded with a space before it, apart from the
context. build-nanogpt and llm.c report acc_norm of this, over the 10,042 validation examples; the
multiple-choice figures of lm-eval are others (31.14 for GPT-2 124M, here 29.45).

Source: Zellers et al., HellaSwag (arXiv 1905.07830); the protocol:
https://github.com/karpathy/build-nanogpt, hellaswag.py.

Method: the 4 endings share their context, so it is run once and its keys and values are handed to
4 rows. Examples are sorted by context length. A batch runs the first tokens that all its contexts
have room for, one row an example, and what is left of each context goes before each of its endings:
so nothing is padded on the left, and the result is that of 4 plain rows.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2.dist import Distributed
from gpt2.evals.files import read_examples
from gpt2.evals.scoring import TOKENS_PER_BATCH, cut_left, pack, spread, tails, token_losses
from gpt2.model import GPT, KVCache
from gpt2.tokenizer import Tokenizer

N_ENDINGS = 4


@dataclass(frozen=True)
class Example:
    """One question as tokens; label: the right ending; cut: its context was too long."""

    context: list[int]
    endings: list[list[int]]
    label: int
    cut: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        """What scoring.pack asks for."""
        longest = max(map(len, self.endings))
        return len(self.context) - 1, N_ENDINGS, len(self.context) + longest


def read_hellaswag(
    path: str | Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Example]:
    """The examples of a .jsonl file (or .xz, .gz) of rowanz/hellaswag, or one with its fields.

    A line has `ctx` (or ctx_a and ctx_b), four `endings` and `label`. Contexts that do not fit
    block_size with their longest ending lose their beginning.
    limit: only so many, evenly spaced.
    Raises OSError, and ValueError with the line where one is not an example, where the tokenizer
    cannot encode it, and where an ending alone is longer than block_size.
    """

    def encode(row: dict) -> Example:
        context, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
        if context is None and "ctx_a" in row:
            context = f"{row['ctx_a']} {row.get('ctx_b') or ''}".rstrip()
        if not isinstance(context, str) or not context.strip():
            raise ValueError("needs a context as text in 'ctx', or 'ctx_a' and 'ctx_b'")
        is_list = isinstance(endings, list) and len(endings) == N_ENDINGS
        if not is_list or not all(isinstance(e, str) and e for e in endings):
            raise ValueError(f"'endings' must be {N_ENDINGS} texts")
        # The test split on the hub has labels as text, or none.
        label = int(label) if isinstance(label, str) and label.isdigit() else label
        if type(label) is not int or not 0 <= label < N_ENDINGS:
            raise ValueError(f"'label' must be 0 to {N_ENDINGS - 1}, got {label!r}")
        tokens = [tokenizer.encode(f" {ending}") for ending in endings]
        longest = max(map(len, tokens))
        kept, cut = cut_left(tokenizer.encode(context), longest, block_size)
        return Example(kept, tokens, label, cut)

    return read_examples(path, encode, limit)


def hellaswag_accuracy(
    model: GPT,
    examples: list[Example],
    group: Distributed,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    **options,
) -> dict[str, float] | None:
    """acc and acc_norm (0 to 1), examples, and cut (those whose context was cut), over all ranks.

    options: autocast and poll, as of gpt2.evals.scoring.spread; None where poll ended it. The
    accuracies of a model whose losses are NaN are NaN.
    """

    def score(batch: list[Example]) -> Tensor:
        losses, lengths = ending_losses(model, batch)
        labels = torch.tensor([e.label for e in batch], device=losses.device)
        hit = losses.argmin(1) == labels
        hit_norm = (losses / lengths).argmin(1) == labels
        return torch.stack([hit.sum(), hit_norm.sum(), losses.sum(dtype=torch.float64)])

    batches = pack(examples, lambda e: e.size, tokens_per_batch)
    sums = spread(model, batches, group, score, 3, **options)
    if sums is None:
        return None
    n, cut = len(examples), sum(e.cut for e in examples)
    return {"acc": sums[0] / n, "acc_norm": sums[1] / n, "examples": n, "cut": cut}


def ending_losses(model: GPT, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Sum of -log p over each ending's tokens, and how many those are: (B, 4) float32 each."""
    shared = min(len(e.context) for e in batch) - 1
    rows = [(e.context + ending)[shared:] for e in batch for ending in e.endings]
    n_scored = [len(ending) for e in batch for ending in e.endings]
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
        cache.select(torch.arange(len(batch), device=device).repeat_interleave(N_ENDINGS))
    losses = token_losses(model, tails(model, rows, n_scored, cache)).sum(1)
    lengths = torch.tensor(n_scored, dtype=torch.float32, device=losses.device)
    return losses.view(len(batch), N_ENDINGS), lengths.view(len(batch), N_ENDINGS)
