"""LAMBADA: the last word of a passage that only the whole of it gives away.

A hit is a word all of whose tokens are the model's likeliest, one after another; perplexity is
exp(the mean over examples of -log p of the word). The word is encoded with the space before it,
apart from the passage.

Sources: Paperno et al., The LAMBADA dataset (2016); the text as OpenAI published it for GPT-2. The
GPT-2 paper's accuracies leave out words that cannot end a sentence (a stop-word filter); GPT-3's
and these do not.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.evals.files import json_lines
from gpt2.evals.scoring import (
    TOKENS_PER_BATCH,
    Autocast,
    Group,
    Poll,
    cut_left,
    evenly,
    pack,
    scoring,
    spread,
    tails,
)
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """One passage as tokens, without its last word, and the word; cut: its beginning is lost."""

    context: list[int]
    word: list[int]
    cut: bool = False


def read_lambada(
    path: str | Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Passage]:
    """The passages of a .jsonl file (or .xz, .gz): `text`, or `context` and `continuation`.

    Passages that do not fit block_size lose their beginning.  limit: only so many, evenly spaced.
    Raises OSError, and ValueError with the line where one has no passage or cannot be encoded.
    """
    rows = evenly(list(json_lines(path)), limit)
    return [_encode(row, tokenizer, block_size, where) for where, row in rows]


def lambada(
    model: GPT,
    passages: list[Passage],
    group: Group,
    *,
    autocast: Autocast = nullcontext,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    poll: Poll | None = None,
) -> dict[str, float] | None:
    """acc (0 to 1), perplexity of the word, examples, and cut, over all ranks.

    autocast, poll: as in gpt2.evals.hellaswag.
    """
    if not passages:
        raise ValueError("LAMBADA needs at least one passage")
    order = sorted(passages, key=_length)
    batches = [
        [order[i] for i in batch]
        for batch in pack([(0, 1, _length(p)) for p in order], tokens_per_batch)
    ]

    def score(batch: list[Passage]) -> Tensor:
        losses, hits = word_scores(model, batch)
        return torch.stack([hits.sum().double(), losses.double().sum()])

    with scoring(model, autocast):
        sums = spread(batches, group, score, 2, poll)
    if sums is None:
        return None
    n = len(passages)
    return {
        "acc": sums[0] / n, "perplexity": exp(sums[1] / n), "examples": n,
        "cut": sum(p.cut for p in passages),
    }  # fmt: skip


def word_scores(model: GPT, batch: list[Passage]) -> tuple[Tensor, Tensor]:
    """-log p of each passage's word, (B,) float32, and whether it is the greedy choice, (B,)."""
    rows = [p.context + p.word for p in batch]
    scored = tails(model, rows, [len(p.word) for p in batch])
    logits = model.logits(scored.hidden).float()  # (N, V)
    losses = F.cross_entropy(logits, scored.targets, reduction="none")
    wrong = scored.by_row((logits.argmax(1) != scored.targets).float())
    return scored.by_row(losses).sum(1), wrong.sum(1) == 0


def _length(passage: Passage) -> int:
    return len(passage.context) + len(passage.word)


def _encode(row: dict, tokenizer: Tokenizer, block_size: int, where: str) -> Passage:
    if "text" in row:
        text = row["text"]
        context, _, word = text.rstrip().rpartition(" ") if isinstance(text, str) else ("",) * 3
    else:
        context, word = row.get("context"), row.get("continuation")
    if not all(isinstance(t, str) and t.strip() for t in (context, word)):
        raise ValueError(
            f"{where}: needs a passage of several words in 'text', or 'context' and 'continuation'"
        )
    try:
        tokens, word_tokens = tokenizer.encode(context), tokenizer.encode(f" {word.strip()}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(word_tokens) > block_size:
        raise ValueError(
            f"{where}: a word of {len(word_tokens)} tokens does not fit the model's context "
            f"(block_size) of {block_size}: leave LAMBADA out for this model"
        )
    tokens, cut = cut_left(tokens, len(word_tokens), block_size)
    return Passage(tokens, word_tokens, cut)
