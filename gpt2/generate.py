"""Generation: one implementation for scripts, chat, evaluation and samples during training.

It knows nothing about text: prompts and results are token ids. Prompts of different lengths share a
batch: they are padded on the left, and doc_start hides the padding, as it hides other documents in
packed training rows.

B rows (prompts), T time, V vocabulary.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from gpt2.model import GPT, KVCache


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    window: bool = False,
    seed: int | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt with up to max_new_tokens tokens.

    prompts: B lists of at least one token id each, of any lengths.
    temperature: 0 is greedy.  top_k, top_p, min_p, repetition_penalty: see filter_logits.
    stop_tokens: a row ends before the first of these.
    window: where the context is full, go on from its later half instead of refusing beforehand.
    seed: makes the result repeatable; None draws from torch's global generator.
    stream: called with (row, token) for every new token as soon as it is known.
    Returns the new tokens of each row, without the prompt and without the stop token.
    Raises ValueError for empty prompts, ids beyond the vocabulary, options out of range, and where
    a prompt, or without window a prompt and max_new_tokens, do not fit block_size.
    """
    _check(model, prompts, max_new_tokens, window, temperature, top_k, top_p, min_p)
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")
    config, device = model.config, model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if use_bf16 else model.lm_head.weight.dtype
    keep = max(config.block_size // 2, 1)  # of a full context, with window
    capacity = min(max(map(len, prompts)) + max_new_tokens, config.block_size)

    seen = torch.zeros(len(prompts), config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    rows = [list(prompt) for prompt in prompts]  # all that the model has seen, or would have
    results: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            idx, padding, doc_start = _left_pad(rows, device)
            cache = KVCache(config, len(rows), capacity, device, dtype)
            for _ in range(max_new_tokens):
                if cache.length == config.block_size:
                    # The context is full: go on from the later half of it.
                    tails = [row[-keep:] for row in rows]
                    idx, padding, doc_start = _left_pad(tails, device)
                    cache.length = 0
                h = model.hidden(idx, cache=cache, doc_start=doc_start)
                logits = model.logits(h[:, -1]).float()  # (B, V)
                logits = filter_logits(
                    logits, seen, temperature, top_k, top_p, min_p, repetition_penalty
                )
                token = sample_token(logits, temperature, generator)  # (B,)
                seen.scatter_(1, token[:, None], True)
                idx, doc_start = token[:, None], None if padding is None else padding[:, None]
                # Reading the tokens waits for the device; stopping and streaming need them.
                for row, value in enumerate(token.tolist()):
                    rows[row].append(value)
                    finished[row] = finished[row] or value in stop_tokens
                    if not finished[row]:
                        results[row].append(value)
                        if stream is not None:
                            stream(row, value)
                if all(finished):
                    break
    finally:
        model.train(was_training)
    return results


def _left_pad(rows: list[list[int]], device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows as a batch idx (B, T), the padding before each (B,), doc_start (B, T).

    The latter two are None where all rows have one length: then nothing needs hiding.
    """
    longest = max(map(len, rows))
    idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return idx, None, None
    padding = torch.tensor([longest - len(row) for row in rows], dtype=torch.int32, device=device)
    # A padding position sees itself only; nothing else sees it.
    position = torch.arange(longest, dtype=torch.int32, device=device)
    return idx, padding, torch.minimum(position, padding[:, None])


def filter_logits(
    logits: Tensor,
    seen: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
) -> Tensor:
    """Logits with the unwanted tokens at -inf; logits (B, V) float32, seen (B, V) bool.

    repetition_penalty: divides positive and multiplies negative logits of seen tokens (CTRL, arXiv
    1909.05858).
    temperature: divides the logits; 0 leaves them.
    top_k: keeps the k largest (and their equals).
    top_p: keeps the smallest set of most likely tokens whose probability reaches p (arXiv
    1904.09751).
    min_p: keeps tokens at least min_p times as likely as the likeliest one (arXiv 2407.01082).
    """
    if repetition_penalty != 1.0:
        penalised = torch.where(
            logits > 0, logits / repetition_penalty, logits * repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if temperature > 0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the tokens that are more likely
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p is not None:
        probabilities = logits.softmax(-1)
        least = min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def sample_token(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, (B,) int64: the likeliest at temperature 0, else drawn from the softmax."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(model: GPT, prompts, max_new_tokens, window, temperature, top_k, top_p, min_p) -> None:
    config = model.config
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token, and there must be one prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(
                f"prompt {row}: token id {bad[0]} lies outside the model's vocabulary of "
                f"{config.vocab_size}"
            )
    longest, room = max(map(len, prompts)), config.block_size - max(map(len, prompts))
    if room < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context (block_size) of "
            f"{config.block_size}: shorten it to at most {config.block_size - 1}"
        )
    if max_new_tokens > room and not window:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} do not fit the "
            f"model's context (block_size) of {config.block_size}: ask for at most {room} new "
            "tokens, or let it go on from the later half of a full context (window)"
        )
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {value}")
