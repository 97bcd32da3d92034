r"""Perplexity of a text, and the loss over token shards.

The text is one stream of tokens after an end-of-text token, where the tokenizer has one; else its
first token is not scored. Windows of block_size slide over it by a stride, and each token is scored
once, by the first window that holds it: so every token but the first block_size has at least
block_size - stride tokens before it. Words are what white space separates.

WikiText comes cut into words, with spaces around punctuation and " @-@ " for a hyphen. The GPT-2
paper and lm-eval undo that before tokenizing (detokenize), and so does evaluate unless told
not to; words and bytes stay those of the text as it was given.

Sources: Radford et al. (2019), section 3.1; Merity et al., Pointer Sentinel Mixture Models (2016).
"""

import re
from math import log

import torch
from torch import Tensor

from gpt2.config import IGNORE_INDEX
from gpt2.data import Mixture, TokenLoader
from gpt2.dist import Distributed
from gpt2.evals.scoring import TOKENS_PER_BATCH, exp, spread, tails, token_losses
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer


def windows(n_tokens: int, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, n_scored) of the windows over a stream, which score all tokens but the first:
    of tokens[begin:end] the last n_scored. Raises ValueError for a stride outside [1, block_size].
    """
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride must lie between 1 and the context (block_size) of {block_size}, got {stride}"
        )
    found, scored = [], 1  # tokens so far
    for begin in range(0, n_tokens, stride):
        if scored < n_tokens:
            end = min(begin + block_size + 1, n_tokens)
            found.append((begin, end, end - scored))
            scored = end
    return found


def perplexity(
    model: GPT, tokenizer: Tokenizer, text: str, group: Distributed, *, stride: int | None = None,
    detokenized: str | None = None, tokens_per_batch: int = TOKENS_PER_BATCH, **options,
) -> dict[str, float] | None:  # fmt: skip
    """loss, perplexity per token and per word, bits per byte, of a text, over all ranks.

    stride: default half of block_size.  detokenized: what is tokenized in place of text.
    options: as of gpt2.evals.scoring.spread.
    Also returned: counts, and word_perplexity_with_line_ends, which counts one word more for each
    line, as papers on word-level WikiText do (their end-of-sentence token).
    Raises ValueError for a text too short, a bad stride, and what the tokenizer cannot encode.
    """
    block_size = model.config.block_size
    stride = max(block_size // 2, 1) if stride is None else stride
    tokens = tokenizer.encode(text if detokenized is None else detokenized)
    if tokenizer.eot is not None:
        tokens.insert(0, tokenizer.eot)
    n_tokens = len(tokens) - 1
    if n_tokens < 1:
        raise ValueError(f"a text of {len(tokens)} tokens is too short to be evaluated")
    found, rows = windows(len(tokens), block_size, stride), max(tokens_per_batch // block_size, 1)

    def score(batch: list[tuple[int, int, int]]) -> Tensor:
        scored = tails(model, [tokens[b:e] for b, e, _ in batch], [n for _, _, n in batch])
        return token_losses(model, scored).sum(dtype=torch.float64)[None]

    batches = [found[i : i + rows] for i in range(0, len(found), rows)]
    sums = spread(model, batches, group, score, **options)
    if sums is None:
        return None
    [loss], words, lines, n_bytes = sums, len(text.split()), text.count("\n"), len(text.encode())
    return {
        "loss": loss / n_tokens, "token_perplexity": exp(loss / n_tokens),
        "word_perplexity": exp(loss / max(words, 1)),
        "word_perplexity_with_line_ends": exp(loss / max(words + lines, 1)),
        "bits_per_byte": loss / (log(2) * n_bytes),
        "tokens": n_tokens, "words": words, "lines": lines, "bytes": n_bytes,
        "block_size": block_size, "stride": stride,
    }  # fmt: skip


def validation_loss(
    model: GPT, data: TokenLoader | Mixture, group: Distributed, *, limit: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH, **options,
) -> dict[str, float] | None:  # fmt: skip
    """Mean loss a token, its perplexity, and tokens, over all windows of data and all ranks.

    It is what training logs. limit: only the first so many windows.  options: as of spread.
    """
    n_windows = min(limit or data.n_windows, data.n_windows)
    rows = max(tokens_per_batch // data.block_size, 1)

    def score(batch: int) -> Tensor:
        device = model.lm_head.weight.device
        idx, targets, *rest = (part.to(device) for part in data.batch(batch, rows))
        targets[max(n_windows - batch * rows, 0) :] = IGNORE_INDEX  # beyond the end: the next epoch
        h = model.hidden(idx, doc_start=rest[0] if rest else None)
        losses = model.ops.linear_cross_entropy(
            h.flatten(0, 1), model.lm_head.weight, targets.flatten(), ignore_index=IGNORE_INDEX,
            reduction="sum", vocab_size=model.config.vocab_size,
        )  # fmt: skip
        return torch.stack([losses.double(), (targets != IGNORE_INDEX).sum().double()])

    sums = spread(model, range(-(-n_windows // rows)), group, score, **options)
    if sums is None:
        return None
    loss = sums[0] / sums[1]
    return {"loss": loss, "perplexity": exp(loss), "tokens": round(sums[1], 0)}


_JOINS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r" @([-,.])@ ", r"\1"),  # 30 @-@ day, 1 @,@ 000, 2 @.@ 5
    # Straight quotes are paired within a line: nothing else tells an opening from a closing one.
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r" ([,.;:!?%)\]]|\.\.\.)(?=\s)", r"\1"),
    (r"(?<=\s)([(\[$\u00a3\u00a5#]) ", r"\1"),
    (r" '(s|S|d|m|t|ll|ve|re)\b", r"'\1"),
    (r"(?<=s) ' ", "' "),
    (r"(?<=\d) \u2013 (?=\d)", "\u2013"),  # ranges; other dashes keep their spaces
    (r" / ", "/"),
    (r"= (?==)", "="),  # headings: = = Life = =
)]  # fmt: skip


def detokenize(text: str) -> str:
    """WikiText as it was written: joins what its word splitting took apart."""
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text
