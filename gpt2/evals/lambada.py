"""LAMBADA: the last word of a passage that only the whole of it gives away.

A hit is a word all of whose tokens are the model's likeliest, one after another; perplexity is
exp(the mean over examples of -log p of the word).

Sources: Paperno et al., The LAMBADA dataset (2016); the text as OpenAI published it for GPT-2. The
GPT-2 paper's accuracies leave out words that cannot end a sentence (a stop-word filter); GPT-3's
and these do not.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.dist import Distributed
from gpt2.evals.files import read_examples
from gpt2.evals.scoring import encode_example, exp, mean_scores, run_endings
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """One passage as tokens, without its last word, and the word; cut: its beginning is lost;
    number: its place in the file."""

    context: list[int]
    word: list[int]
    cut: bool = False
    number: int = 0

    @property
    def endings(self) -> list[list[int]]:
        return [self.word]


def read_lambada(
    path: str | Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Passage]:
    """The passages of a .jsonl file (or compressed): `text`, or `context` and `continuation`.

    Passages that do not fit block_size lose their beginning.  limit: only so many, evenly spaced.
    Raises OSError, and ValueError with the line where one has no passage or cannot be encoded.
    """

    def encode(row: dict, number: int) -> Passage:
        context, word = row.get("context"), row.get("continuation")
        if isinstance(row.get("text"), str):
            context, _, word = row["text"].rstrip().rpartition(" ")
        if not all(isinstance(t, str) and t.strip() for t in (context, word)):
            raise ValueError("needs a passage of several words in 'text', or 'context' and "
                             "'continuation'")  # fmt: skip
        kept, [tokens], cut = encode_example(tokenizer, context, [word.strip()], block_size)
        return Passage(kept, tokens, cut, number)

    return read_examples(path, encode, limit)


def lambada(
    model: GPT, passages: list[Passage], group: Distributed, **options
) -> dict[str, float] | None:
    """acc (0 to 1), perplexity of the word, examples, and cut, over all ranks.

    options, NaN: as in gpt2.evals.hellaswag; samples gets whether it is a hit, and the loss.
    """

    def score(batch: list[Passage]) -> Tensor:
        losses, hits = word_scores(model, batch)
        return torch.stack([hits, losses], 1)

    means, cut = mean_scores(model, passages, group, score, **options), sum(p.cut for p in passages)
    return means and dict(acc=means[0], perplexity=exp(means[1]), examples=len(passages), cut=cut)


def word_scores(model: GPT, batch: list[Passage]) -> tuple[Tensor, Tensor]:
    """-log p of each passage's word, (B,) float32, and whether it is the greedy choice, (B,)."""
    scored = run_endings(model, batch)
    logits = model.logits(scored.hidden).float()  # (N, V)
    losses = F.cross_entropy(logits, scored.targets, reduction="none")
    wrong = scored.by_row((logits.argmax(1) != scored.targets).float())
    return scored.by_row(losses).sum(1), wrong.sum(1) == 0
