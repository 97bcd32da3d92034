r"""Perplexity of a text, and the loss over token shards.

The windows over a text slide by a stride, and each token is scored once.
The text is one stream of tokens after an end-of-text token, where the tokenizer has one; else its
first token is not scored. The first window scores all its block_size targets, each later one begins
stride tokens after the one before and scores what is new. So every token but the first block_size
has at least block_size - stride tokens before it.

    per token   exp(loss / tokens)
    per word    exp(loss / words), words = what white space separates in the text as it was given
    per byte    loss / (ln 2 * UTF-8 bytes of the text as it was given), in bits

WikiText comes cut into words, with spaces around punctuation and " @-@ " for a hyphen. The GPT-2
paper and lm-eval undo that before tokenizing (detokenize), and so does scripts/evaluate.py unless
told not to; words and bytes stay those of the text as it was given.

Sources: Radford et al. (2019), section 3.1; Merity et al., Pointer Sentinel Mixture Models (2016).
"""

import re
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.config import IGNORE_INDEX
from gpt2.data import Mixture, TokenLoader
from gpt2.dist import Distributed
from gpt2.evals.scoring import TOKENS_PER_BATCH, exp, spread, tails, token_losses
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer


class Window(NamedTuple):
    """tokens[begin : end] are fed and predicted, shifted by one; the last n_scored count."""

    begin: int
    end: int
    n_scored: int


def windows(n_tokens: int, block_size: int, stride: int) -> list[Window]:
    """The windows over a stream of n_tokens, all of whose tokens but the first are scored once.

    Raises ValueError for a stride outside [1, block_size].
    """
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride must lie between 1 and the context (block_size) of {block_size}, got {stride}"
        )
    found, scored = [], 0  # scored: targets so far; target t is token t + 1
    for begin in range(0, max(n_tokens - 1, 0), stride):
        end = min(begin + block_size, n_tokens - 1)
        found.append(Window(begin, end + 1, end - scored))
        scored = end
        if end == n_tokens - 1:
            break
    return found


def perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    group: Distributed,
    *,
    stride: int | None = None,
    detokenized: str | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    **options,
) -> dict[str, float] | None:
    """loss, perplexity per token and per word, bits per byte, of a text, over all ranks.

    stride: default half of block_size.  detokenized: what is tokenized in place of text.
    options: as in gpt2.evals.hellaswag.
    Also returned: tokens, words, lines, bytes, and word_perplexity_with_line_ends, which counts one
    word more for each line, as papers on word-level WikiText do (their end-of-sentence token).
    Raises ValueError for a text too short, a bad stride, and what the tokenizer cannot encode.
    """
    block_size = model.config.block_size
    stride = max(block_size // 2, 1) if stride is None else stride
    tokens = tokenizer.encode(text if detokenized is None else detokenized)
    if tokenizer.eot is not None:
        tokens.insert(0, tokenizer.eot)
    if len(tokens) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens is too short to be evaluated")
    found = windows(len(tokens), block_size, stride)
    rows = max(tokens_per_batch // block_size, 1)
    batches = [found[i : i + rows] for i in range(0, len(found), rows)]

    def score(batch: list[Window]) -> Tensor:
        return window_losses(model, tokens, batch).sum(dtype=torch.float64)[None]

    sums = spread(model, batches, group, score, 1, **options)
    if sums is None:
        return None
    loss, n_tokens = sums[0], len(tokens) - 1
    words, lines, n_bytes = len(text.split()), text.count("\n"), len(text.encode())
    return {
        "loss": loss / n_tokens,
        "token_perplexity": exp(loss / n_tokens),
        "word_perplexity": exp(loss / max(words, 1)),
        "word_perplexity_with_line_ends": exp(loss / max(words + lines, 1)),
        "bits_per_byte": loss / (log(2) * n_bytes),
        "tokens": n_tokens, "words": words, "lines": lines, "bytes": n_bytes,
        "block_size": block_size, "stride": stride,
    }  # fmt: skip


def window_losses(model: GPT, tokens: list[int], batch: list[Window]) -> Tensor:
    """-log p of the tokens that each window scores, (B, E) float32, zero where there are fewer."""
    rows = [tokens[w.begin : w.end] for w in batch]
    return token_losses(model, tails(model, rows, [w.n_scored for w in batch]))


def validation_loss(
    model: GPT,
    data: TokenLoader | Mixture,
    group: Distributed,
    *,
    limit: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    **options,
) -> dict[str, float] | None:
    """Mean loss a token, its perplexity, and tokens, over all windows of data and all ranks.

    It is what training logs. limit: only the first so many windows.  options: as in
    gpt2.evals.hellaswag.
    """
    n_windows = data.n_windows if limit is None else min(limit, data.n_windows)
    rows = max(tokens_per_batch // data.block_size, 1)
    device = model.lm_head.weight.device

    def score(batch: int) -> Tensor:
        idx, targets, *rest = (part.to(device) for part in data.batch(batch, rows))
        targets[max(n_windows - batch * rows, 0) :] = IGNORE_INDEX  # beyond the end: the next epoch
        h = model.hidden(idx, doc_start=rest[0] if rest else None)
        losses = model.ops.linear_cross_entropy(
            h.flatten(0, 1), model.lm_head.weight, targets.flatten(), ignore_index=IGNORE_INDEX,
            reduction="sum", vocab_size=model.config.vocab_size,
        )  # fmt: skip
        return torch.stack([losses.double(), (targets != IGNORE_INDEX).sum().double()])

    batches = range(-(-n_windows // rows))
    sums = spread(model, batches, group, score, 2, **options)
    if sums is None:
        return None
    loss = sums[0] / sums[1]
    return {"loss": loss, "perplexity": exp(loss), "tokens": round(sums[1], 0)}


def detokenize(text: str) -> str:
    """WikiText as it was written: joins what its word splitting took apart.

    Straight quotes are paired within a line, since nothing else tells an opening from a closing
    one.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # 30 @-@ day, 1 @,@ 000, 2 @.@ 5
    lines = [_QUOTED.sub(r"\1\2\1", line) for line in text.split("\n")]
    text = "\n".join(lines)
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text


_QUOTED = re.compile(r"(\") ([^\"]*?) \"")
_JOINS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" ([,.;:!?%)\]]|\.\.\.)(?=\s)", r"\1"),
        (r"(?<=\s)([(\[$\u00a3\u00a5#]) ", r"\1"),
        (r" '(s|S|d|m|t|ll|ve|re)\b", r"'\1"),
        (r"(?<=s) ' ", "' "),
        (r"(?<=\d) \u2013 (?=\d)", "\u2013"),  # ranges; other dashes keep their spaces
        (r" / ", "/"),
        (r"= (?==)", "="),  # headings: = = Life = =
    )
)
