"""Generation: one implementation for scripts, chat, evaluation and samples during training.

It knows nothing about text: prompts and results are token ids (gpt2.text has the stop strings).
Prompts of different lengths share a batch: they are padded on the left, and doc_start hides the
padding, as it hides other documents in packed training rows.

A row's tokens follow from its prompt, its seed and the options alone, to rounding: they do not
depend on the rows beside it. So each row draws from random numbers of its own, and with `window`
each row's context is cut when that row fills it.

On a CPU a step sees the part of the cache that is in use, and rows that have ended leave the batch;
up to gpt2.cpu.DECODE_ROWS rows of a plain model it is one call of C++ (csrc/decode.cpp).
On a GPU it sees all of the cache under a mask, which makes all steps the same operations on the
same memory; they are captured once in a CUDA graph and replayed. The host reads the tokens of POLL
steps at a time, so it does not wait for the device in between.

B rows of the batch, R rows in all (prompts times samples), T time, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gpt2 import cpu
from gpt2.config import Sampling, suggest
from gpt2.device import execution
from gpt2.model import GPT, KVCache

POLL = 8  # steps between two looks at the tokens, on a GPU; at most so many steps are in vain
WARM_UP = 3  # steps before a capture, in which libraries allocate what they need
PADS = "prompts of different lengths are padded and masked here: leave it out"
ELSEWHERE = {
    "input_ids": "the prompts come second, as lists of token ids", "attention_mask": PADS,
    "pad_token_id": PADS, "do_sample": "temperature 0 is greedy, above 0 it samples",
    "eos_token_id": "here it is stop_tokens, a list", "num_beams": "there is no beam search",
    "streamer": "here it is stream, called with (row, token)", "generator": "here it is seed",
}  # fmt: skip
"""Arguments of transformers' generate, and what takes their place; see also config.OTHER_NAMES."""


@dataclass
class Completion:
    """What one row became.

    log_probabilities: of each token under the model's own distribution, before penalty,
    temperature and filters; None where they were not asked for.
    reason: why it ended: "stop" (a stop token, or `stop`) or "length".
    """

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] | None = None
    reason: Literal["stop", "length"] = "length"


def generate(
    model: GPT, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    repetition_penalty: float = 1.0, **options,
) -> list[list[int]]:  # fmt: skip
    """Continues each prompt with up to max_new_tokens tokens.

    temperature: 0 is greedy.  top_k, top_p, min_p, repetition_penalty: see filter_logits.
    options: num_samples, stop_tokens, stop, window, seed, stream and dtype, as of complete, which
    gives log probabilities besides.
    Returns the new tokens of each row, without the prompt and without the stop token. Raises as
    complete does, and TypeError for an option that there is not, with the one that is meant.
    """
    known = {*signature(complete).parameters, *signature(generate).parameters} - {"options"}
    for name in options.keys() - known:
        raise TypeError(f"generate has no {name}: {ELSEWHERE.get(name) or suggest(name, known)}")
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    rows = complete(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options)
    return [row.tokens for row in rows]


@torch.no_grad()
def complete(
    model: GPT, prompts: list[list[int]], *, max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008, frozen
    num_samples: int = 1, stop_tokens: Collection[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None, window: bool = False,
    seed: int | Sequence[int] | None = None, stream: Callable[[int, int], None] | None = None,
    log_probabilities: bool = False, dtype: str = "auto",
) -> list[Completion]:  # fmt: skip
    """Continues each prompt with up to max_new_tokens tokens, num_samples times.

    prompts: lists of at least one token id each, of any lengths, each run once for all its samples.
    The samples of the first prompt are the first rows, then those of the second.
    stop_tokens: a row ends before the first of these.
    stop: called with (row, its tokens so far) after every token; True ends the row, which keeps the
    token. For stop strings see gpt2.text.RowTexts.
    window: where a row's context is full, go on from its later half instead of refusing beforehand.
    seed: one a row, or that of the first row, which the others' follow; None: torch's generator's.
    stream: called with (row, token) for every token of the result as soon as it is known.
    Only ids that the tokenizer has (model.n_tokens) are drawn.
    dtype: of matmuls, as in gpt2.device.execution. In bfloat16 the linear layers' weights lie there
    twice meanwhile: 2 more bytes each.
    Returns one Completion a row. Raises TypeError for prompts that are no lists of ids (text, a
    tensor), ValueError for empty prompts, ids beyond the vocabulary, options out of range, where a
    prompt, or without window a prompt and max_new_tokens, do not fit block_size, and where the
    model's logits are not finite numbers.
    """
    _check(model, prompts, max_new_tokens, num_samples, window)
    rows = [
        _Row(log_probabilities=[] if log_probabilities else None, number=number, prompt=prompt)
        for number, prompt in enumerate(p for p in prompts for _ in range(num_samples))
    ]
    block_size, device = model.config.block_size, model.lm_head.weight.device
    keep = max(block_size // 2, 1)  # of a full context, with window
    capacity = min(max(map(len, prompts)) + max_new_tokens, block_size)
    picker = _Picker(model, rows, sampling, _row_seeds(seed, len(rows)), max_new_tokens)
    with evaluating(model, dtype) as cache_dtype:
        decoder = _Decoder(model, capacity, cache_dtype)
        logits = decoder.prefill(prompts, num_samples)  # (B, V)
        running = rows  # those in the batch, some of them may have ended
        drawn = []  # of each step not yet read the tokens (B,), and their log probabilities
        for n in range(1, max_new_tokens + 1):
            token = picker.pick(logits, n - 1)  # (B,)
            drawn.append([token])
            if log_probabilities:
                drawn[-1].append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
            full = decoder.cache.length == block_size
            if n < max_new_tokens and n % decoder.pace.poll and not full:
                logits = decoder.step(token)
                continue
            # Reading waits for the device; stopping, streaming and a full context need it.
            picker.check()
            read = [torch.stack(parts).tolist() for parts in zip(*drawn, strict=True)]
            for step in zip(*read, strict=True):
                for row, *values in zip(running, *step, strict=True):
                    row.take(stop_tokens, stop, stream, *values)
            drawn = []
            going = [place for place, row in enumerate(running) if not row.ended]
            if not going or n == max_new_tokens:
                break
            # Copying the cache costs about as much as a step, so it waits until half have ended.
            if 2 * len(going) <= len(running):
                running = [running[place] for place in going]
                index = torch.tensor(going, device=device)
                token = token[index]
                decoder.select(index)
                picker.select(index)
            if full:
                logits = decoder.prefill([row.context(block_size, keep) for row in running])
            else:
                logits = decoder.step(token)
    return rows


@dataclass
class _Row(Completion):
    number: int = 0
    prompt: list[int] = ()
    start: int = 0  # where the context begins in prompt + tokens

    @property
    def ended(self) -> bool:
        return self.reason == "stop"

    def take(self, stop_tokens, stop, stream, token: int, *log_p: float) -> None:
        """A token that was drawn, perhaps after the row's end."""
        if self.ended:
            return
        if token not in stop_tokens:
            self.tokens.append(token)
            if log_p:
                self.log_probabilities += log_p
            if stream is not None:
                stream(self.number, token)
            if stop is None or not stop(self.number, self.tokens):
                return
        self.reason = "stop"

    def context(self, block_size: int, keep: int) -> list[int]:
        """What the model sees next: all since start; where that fills block_size, its end."""
        tokens = self.prompt + self.tokens
        if len(tokens) - self.start > block_size:  # the newest one is not in the cache yet
            self.start = len(tokens) - keep
        return tokens[self.start :]


class _Decoder:
    """The model on a batch: prefill, then one step a token. Logits are (B, V) float32."""

    def __init__(self, model: GPT, capacity: int, dtype: torch.dtype):
        self.model, self.device = model, model.lm_head.weight.device
        self.pace = pace(self.device)
        self.shape = capacity, self.device, dtype, self.pace.fixed
        # FSDP gathers between its blocks, on streams of its own, so such a step is not captured.
        self.captures = self.pace.captured and all(map(_is_whole, model.parameters()))
        self.decode = cpu.decoder(model)

    def prefill(self, rows: list[list[int]], repeat: int = 1) -> Tensor:
        """Runs rows of any lengths into an empty cache, then has each `repeat` times."""
        idx, padding, doc_start = _left_pad(rows, self.device)
        self.cache = KVCache(self.model.config, len(rows), *self.shape)
        # (B, 1) each, and they stay where they are: a captured step reads and writes them.
        self.token, self.doc_start = idx[:, -1:].clone(), padding
        self.captured = None
        logits = self._run(idx, doc_start)
        if repeat > 1:
            index = torch.arange(len(rows), device=self.device).repeat_interleave(repeat)
            self.select(index)
            logits = logits[index]
        return logits

    def select(self, index: Tensor) -> None:
        """Keeps only these rows of the batch, or repeats them; index (B',) int64."""
        self.cache.select(index)
        self.token = self.token[index]
        self.doc_start = None if self.doc_start is None else self.doc_start[index]
        self.captured = None

    def step(self, token: Tensor) -> Tensor:
        """Appends token (B,) to the rows."""
        if self.decode is not None and len(token) <= cpu.DECODE_ROWS:
            return self.decode(self.cache, token, self.doc_start)
        self.token.copy_(token[:, None])
        if not self.captures:
            return self._run(self.token, self.doc_start)
        if self.captured is None:
            self.captured = self._capture()
        graph, logits = self.captured
        graph.replay()
        self.cache.length += 1  # the graph has advanced the one on the device
        return logits

    def _run(self, idx: Tensor, doc_start: Tensor | None) -> Tensor:
        h = self.model.hidden(idx, cache=self.cache, doc_start=doc_start)
        return self.model.logits(h[:, -1]).float()

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """One step as a graph, and where it leaves its logits. The cache is as it was before.

        The graph reads the weights that evaluating has put into the model.
        """
        length, graph = self.cache.length, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):  # writes the same place again and again
                self._run(self.token, self.doc_start)
                self.cache.length = length
                self.cache.end.fill_(length)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads, such as a run's feed, may allocate meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            logits = self._run(self.token, self.doc_start)
        self.cache.length = length  # capturing ran nothing on the device
        return graph, logits


class Pace(NamedTuple):
    """How decode steps run."""

    fixed: bool  # they see the whole cache under a mask
    captured: bool  # in a CUDA graph, which needs that
    poll: int  # steps from one look at the tokens to the next; on a CPU looking costs nothing


def pace(device: torch.device) -> Pace:
    return Pace(True, True, POLL) if device.type == "cuda" else Pace(False, False, 1)


class _Picker:
    """Chooses the tokens of a batch: one uniform random number a row and step, drawn beforehand."""

    def __init__(self, model: GPT, rows: list[_Row], sampling: Sampling, seeds, n_steps: int):
        device = model.lm_head.weight.device
        self.sampling, self.n_tokens = sampling, model.n_tokens
        self.seen = self.uniform = None
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(rows), self.n_tokens, dtype=torch.bool, device=device)
            for row in rows:
                self.seen[row.number, row.prompt] = True
        if not sampling.greedy:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = [torch.rand(n_steps, dtype=torch.float64, generator=g) for g in generators]
            self.uniform = torch.stack(drawn).to(device)  # (R, n_steps)

    def pick(self, logits: Tensor, step: int) -> Tensor:
        """(B,) int64 from logits (B, V) float32."""
        self.is_finite &= logits.isfinite().all()
        logits = filter_logits(logits[:, : self.n_tokens], self.seen, self.sampling)
        if self.uniform is None:
            token = logits.argmax(-1)
        else:
            token = draw(logits.softmax(-1), self.uniform[:, step])
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token

    def check(self) -> None:
        if not self.is_finite:
            raise ValueError(
                "the model's logits are not finite numbers, so nothing can be generated: its "
                "weights are damaged, or its training has diverged"
            )

    def select(self, index: Tensor) -> None:
        self.seen = None if self.seen is None else self.seen[index]
        self.uniform = None if self.uniform is None else self.uniform[index]


def filter_logits(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """Logits with the unwanted tokens at -inf; logits (B, V) float32, seen (B, V) bool.

    In this order:
    repetition_penalty: divides positive and multiplies negative logits of seen tokens (CTRL, arXiv
    1909.05858).
    temperature: divides the logits; 0 leaves them, and no filter changes which is the largest.
    top_k: keeps the k largest (and their equals).
    top_p: keeps the fewest most likely tokens whose probability reaches p (arXiv 1904.09751).
    min_p: keeps tokens at least min_p times as likely as the likeliest one (arXiv 2407.01082).
    """
    s = sampling
    if s.repetition_penalty != 1.0:
        penalty = s.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if s.greedy:
        return logits
    if s.temperature != 1.0:
        logits = logits / s.temperature
    if s.top_k is not None and s.top_k < logits.shape[-1]:
        kth = logits.topk(s.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if s.top_p is not None and s.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the tokens that are more likely
        least = max(s.top_p, torch.finfo(torch.float32).tiny)  # 0 would drop the likeliest too
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= least)
        logits = logits.masked_fill(drop, float("-inf"))
    if s.min_p is not None:
        probabilities = logits.softmax(-1)
        least = s.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, (B,) int64: the first whose cumulated probability exceeds uniform; of NaN
    the last. probabilities (B, V) float32, of any sums; uniform (B,) float64 in [0, 1)."""
    cumulated = probabilities.double().cumsum(-1)
    # The factor keeps the product below the sum where rounding would not.
    target = cumulated[:, -1] * uniform * (1 - 2**-50)
    token = torch.searchsorted(cumulated, target[:, None], right=True)[:, 0]
    return token.clamp_(max=probabilities.shape[1] - 1)


def _row_seeds(seed: int | Sequence[int] | None, n_rows: int) -> Sequence[int]:
    if seed is None:
        return torch.randint(2**62, (n_rows,)).tolist()
    seeds = range(seed, seed + n_rows) if isinstance(seed, int) else seed
    if len(seeds) != n_rows:
        raise ValueError(f"seed has {len(seeds)} numbers, and there are {n_rows} rows: one each")
    return seeds


@contextmanager
def evaluating(model: GPT, dtype: str):
    """The model without dropout, in the device's precision; gives the dtype of keys and values.

    Where that is bfloat16, copies take the place of the float32 weights that autocast would cast
    for every token, as it does under inference_mode; around several calls of generate, once for all
    of them. What FSDP shares out stays as it is.
    """
    weight, was_training = model.lm_head.weight, model.training
    run = execution(weight.device, dtype)
    low = run.dtype != torch.float32
    layers = [m for m in model.modules() if low and isinstance(m, nn.Linear)]
    cast = [
        (layer, name, p) for layer in layers for name, p in layer.named_parameters(recurse=False)
        if _is_whole(p) and p.dtype == torch.float32
    ]  # fmt: skip
    model.eval()
    try:
        for layer, name, p in cast:
            setattr(layer, name, nn.Parameter(p.to(run.dtype), requires_grad=False))
        with torch.cuda.device_of(weight), run.autocast():
            # Attention of one token in bfloat16 takes torch 4 to 6 times as long on a CPU.
            yield run.dtype if low and weight.is_cuda else weight.dtype
    finally:
        for layer, name, p in cast:
            setattr(layer, name, p)
        model.train(was_training)


def _is_whole(p: nn.Parameter) -> bool:
    """Not shared out by FSDP."""
    return type(p) is nn.Parameter


def _left_pad(rows: list[list[int]], device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows as a batch idx (B, T), the padding before each (B, 1), doc_start (B, T); the latter two
    are None where all rows have one length: then nothing needs hiding."""
    longest = max(map(len, rows))
    idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return idx, None, None
    padding = torch.tensor([[longest - len(row)] for row in rows]).to(device, torch.int32)  # (B, 1)
    # A padding position sees itself only; nothing else sees it.
    position = torch.arange(longest, dtype=torch.int32, device=device)
    return idx, padding, torch.minimum(position, padding)


def _check(model: GPT, prompts, max_new_tokens: int, num_samples: int, window: bool) -> None:
    block_size = model.config.block_size
    others = [prompts] if not isinstance(prompts, list) else prompts
    for wrong in (p for p in others if not isinstance(p, list)):
        raise TypeError(
            "prompts must be a list of lists of token ids, such as [[464, 2159], [15496]], got "
            f"{wrong!r:.40}; gpt2.load_tokenizer(MODEL).encode(TEXT) gives those of a text, "
            ".tolist() those of a tensor"
        )
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token, and there must be one prompt")
    for name, value in dict(max_new_tokens=max_new_tokens, num_samples=num_samples).items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be at least 1, and whole, got {value!r}")
    for row, prompt in enumerate(prompts):
        bad = [t for t in prompt if not isinstance(t, Integral) or not 0 <= t < model.n_tokens]
        if bad:
            raise ValueError(f"prompt {row}: token id {bad[0]!r} lies outside the model's "
                             f"vocabulary of {model.n_tokens}")  # fmt: skip
    longest = max(map(len, prompts))
    room = block_size - longest
    if room < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context (block_size) of "
            f"{block_size}: shorten it to at most {block_size - 1}"
        )
    if max_new_tokens > room and not window:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} do not fit the "
            f"model's context (block_size) of {block_size}: ask for at most {room} new tokens, or "
            "let it go on from the later half of a full context (window)"
        )
