"""HellaSwag in the completion style: the ending that the model finds the least surprising wins.

The loss of an ending counts its own tokens only, after those of the context; acc takes the smallest
sum, acc_norm the smallest mean over tokens, acc_norm_characters the smallest sum divided by the
ending's characters. build-nanogpt and llm.c report acc_norm, over the 10,042 validation examples;
lm-eval's acc_norm is the one by characters, and its own task has another prompt besides (31.14 for
GPT-2 124M; acc_norm here 29.45). benchmarks/lm_eval has tasks for it with the prompts of here.

Source: Zellers et al., HellaSwag (arXiv 1905.07830); the protocol:
https://github.com/karpathy/build-nanogpt, hellaswag.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2.dist import Distributed
from gpt2.evals.files import read_examples
from gpt2.evals.scoring import encode_example, mean_scores, run_endings, token_losses
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

N_ENDINGS = 4
MEASURES = ("acc", "acc_norm", "acc_norm_characters")


@dataclass(frozen=True)
class Example:
    """One question as tokens; label: the right ending; characters: of each ending; cut: its context
    was too long; number: its place in the file."""

    context: list[int]
    endings: list[list[int]]
    label: int
    characters: tuple[int, ...]
    cut: bool = False
    number: int = 0


def read_hellaswag(
    path: str | Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Example]:
    """The examples of a .jsonl file (or compressed) of rowanz/hellaswag, or one with its fields.

    A line has `ctx` (or ctx_a and ctx_b), four `endings` and `label`. Contexts that do not fit
    block_size with their longest ending lose their beginning.  limit: only so many, evenly spaced.
    Raises OSError, and ValueError with the line where one is no example or cannot be encoded.
    """

    def encode(row: dict, number: int) -> Example:
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
        kept, tokens, cut = encode_example(tokenizer, context, endings, block_size)
        return Example(kept, tokens, label, tuple(map(len, endings)), cut, number)

    return read_examples(path, encode, limit)


def hellaswag_accuracy(
    model: GPT, examples: list[Example], group: Distributed, **options
) -> dict[str, float] | None:
    """acc, acc_norm and acc_norm_characters (0 to 1), examples, and cut (those whose context was
    cut), over all ranks.

    options: tokens_per_batch, samples (gets the three as 0 or 1, and the losses of the endings),
    and of gpt2.evals.scoring.spread; None where poll ended it. The accuracies of a model whose
    losses are NaN are NaN.
    """

    def score(batch: list[Example]) -> Tensor:
        losses, lengths = ending_losses(model, batch)
        labels = torch.tensor([e.label for e in batch], device=losses.device)
        characters = torch.tensor([e.characters for e in batch], device=losses.device)
        by = losses, losses / lengths, losses / characters
        return torch.cat([torch.stack([x.argmin(1) == labels for x in by], 1), losses], 1)

    means, cut = mean_scores(model, examples, group, score, **options), sum(e.cut for e in examples)
    return means and dict(zip(MEASURES, means, strict=False), examples=len(examples), cut=cut)


def ending_losses(model: GPT, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """Sum of -log p over each ending's tokens, and how many those are: (B, 4) float32 each."""
    scored = run_endings(model, batch)
    losses, lengths = token_losses(model, scored).sum(1), scored.is_target.sum(1).float()
    return losses.view(-1, N_ENDINGS), lengths.view(-1, N_ENDINGS)
