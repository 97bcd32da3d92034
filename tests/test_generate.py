"""Generation on tiny models, against itself without a cache and against transformers.

Most models are float64 here, so that which token is the likeliest does not depend on how a BLAS
rounds a batch of another shape.
"""

import importlib
import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.config import GPTConfig, LoRAConfig, Sampling
from gpt2.device import Execution
from gpt2.generate import Pace, complete, draw, filter_logits, generate
from gpt2.hf import export_hf
from gpt2.lora import add_lora
from gpt2.model import GPT

module = importlib.import_module("gpt2.generate")  # gpt2.generate is the function
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3]]


@pytest.fixture
def model(tiny):
    # Larger weights than at initialisation, so that the model has clear preferences.
    model = GPT(tiny, "torch").double()
    for p in model.parameters():
        p.data *= 4
    return model


def greedy(model, prompts, **options) -> list[list[int]]:
    return generate(model, prompts, temperature=0, **{"max_new_tokens": 12} | options)


def test_stream_sees_every_token_in_order_and_the_mode_stays(model):
    seen = [[] for _ in PROMPTS]
    model.set_dropout(0.5)
    options = dict(max_new_tokens=9, seed=0)
    rows = generate(model.train(), PROMPTS, stream=lambda row, t: seen[row].append(t), **options)
    assert seen == rows and model.training
    model.requires_grad_(False).eval()
    assert generate(model, PROMPTS, **options) == rows
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_window_goes_on_from_the_later_half(model):
    new = greedy(model, PROMPTS, max_new_tokens=60, window=True)
    for prompt, row in zip(PROMPTS, new, strict=True):
        assert len(row) == 60
        whole, start = prompt + row, 0
        for i in range(len(prompt), len(whole)):
            if i - start == 33:  # 32 tokens are full; then 16 are kept, and so on
                start = i - 16
            assert whole[i] == int(model(torch.tensor([whole[start:i]]))[0, -1].argmax()), i


def filtered(logits, seen=None, **options):
    return filter_logits(logits, seen, Sampling(**options))


@pytest.mark.parametrize(
    "options, n_kept",
    [
        ({}, 5), ({"top_k": 2}, 2), ({"top_k": 99}, 5), ({"top_p": 0.69}, 2), ({"top_p": 0.71}, 3),
        ({"top_p": 0.01}, 1), ({"top_p": 1e-46}, 1), ({"min_p": 0.25}, 3), ({"min_p": 1e-46}, 5),
        ({"top_k": 3, "top_p": 0.7}, 2), ({"top_k": 1, "temperature": 0}, 5),
    ],
)  # fmt: skip
def test_filters(options, n_kept):
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = filtered(logits, **options) > float("-inf")
    assert kept.tolist() == [[True] * n_kept + [False] * (5 - n_kept)]


@pytest.mark.parametrize(
    "options", [{"temperature": t} for t in (1e-6, 1e-30, 1e-38, 1e-320)] + [{"top_p": 1e-46}]
)
def test_options_near_their_limit_give_the_limit(model, options):
    assert generate(model, PROMPTS, max_new_tokens=12, seed=0, **options) == greedy(model, PROMPTS)


def test_only_the_tokenizers_ids_are_drawn(model):
    model.transformer.wte.weight.data[50:] *= 100
    assert max(map(max, greedy(model, PROMPTS))) >= 50
    model.n_tokens = 50
    prompts = [[token % 50 for token in prompt] for prompt in PROMPTS]
    for temperature in (0.0, 5.0):
        options = dict(max_new_tokens=20, temperature=temperature, repetition_penalty=1.1, seed=0)
        assert max(map(max, generate(model, prompts, **options))) < 50


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_numbers_is_an_error(model, value, temperature):
    model.transformer.ln_f.bias.data[3] = value
    with pytest.raises(ValueError, match="logits are not finite numbers"):
        generate(model, PROMPTS, max_new_tokens=5, temperature=temperature, top_p=0.9)


def test_sampling_follows_the_distribution(model):
    model.lm_head.weight.data.mul_(3)
    rows = generate(model, [[5]] * 4000, max_new_tokens=1, seed=0, temperature=0.7)
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=65) / 4000
    expected = (model(torch.tensor([[5]]))[0, 0] / 0.7).softmax(-1)
    assert (counts - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1]], {"num_samples": 0}, "num_samples must be at least 1"),
        ([[1], [2]], {"seed": [1, 2, 3]}, "seed has 3 numbers, and there are 2 rows"),
        ([], {}, "at least one token"), ([[1], []], {}, "at least one token"),
        ([[1], [65]], {}, "prompt 1: token id 65 lies outside the model's vocabulary of 65"),
        ([[-1]], {}, "token id -1"), ([["a"]], {}, "token id 'a'"),
        ([[1] * 30], {}, "at most 2 new tokens"),
        ([[1] * 32], {"window": True}, r"leaves no room in the .* \(block_size\) of 32"),
        *(([[1]], {name: value}, name) for name, value in [
            ("max_new_tokens", 0), ("max_new_tokens", 2.5), ("max_new_tokens", None),
            ("temperature", -1), ("temperature", math.nan), ("top_k", 0),
            ("top_p", 1.5), ("min_p", 0.0), ("repetition_penalty", 0),
            ("repetition_penalty", 1e-40), ("repetition_penalty", math.nan),
        ]),
    ],
)  # fmt: skip
def test_bad_input(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 5} | options)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ("Hello", {}, r"list of lists of token ids.*got 'Hello'.*load_tokenizer\(MODEL\).encode"),
        (["Hello"], {}, "got 'Hello'"), ([1, 2], {}, "got 1;"), ([[1], (2,)], {}, r"got \(2,\)"),
        (torch.tensor([[1, 2]]), {}, r"got tensor\(\[\[1, 2\]\]\).*tolist\(\) those of a tensor"),
        ([[1]], {"attention_mask": [[1]]}, "no attention_mask: .* padded and masked here: leave"),
        ([[1]], {"input_ids": [[1]]}, "no input_ids: the prompts come second"),
        ([[1]], {"eos_token_id": 5}, "no eos_token_id: here it is stop_tokens, a list"),
        ([[1]], {"max_length": 5}, "no max_length: here it is max_new_tokens"),
        ([[1]], {"num_return_sequences": 2}, "no num_return_sequences: here it is num_samples"),
        ([[1]], {"temprature": 1}, "no temprature: did you mean 'temperature'"),
    ],
)  # fmt: skip
def test_what_is_typed_for_other_libraries_is_answered_with_ours(model, prompts, options, message):
    with pytest.raises(TypeError, match=message):
        generate(model, prompts, max_new_tokens=5, **options)


def test_a_row_follows_from_its_seed_alone(model):
    seeds = [5, 6, 7, 5]
    options = dict(max_new_tokens=12, temperature=1.3, top_k=20, repetition_penalty=1.2)
    together = generate(model, PROMPTS, seed=seeds, **options)
    for prompt, seed, row in zip(PROMPTS, seeds, together, strict=True):
        [alone] = generate(model, [prompt], seed=[seed], **options | {"max_new_tokens": 20})
        assert alone[:12] == row  # more tokens begin with the same ones
    assert together[0] == together[3] and len({tuple(r) for r in together}) == 3
    assert generate(model, PROMPTS, seed=5, **options)[1] == together[1]  # seed 5 + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_of_a_prompt_are_rows_of_their_own(model, temperature):
    seen = []
    model.transformer.wte.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    options = dict(max_new_tokens=8, seed=3, temperature=temperature)
    rows = generate(model, PROMPTS[:2], num_samples=3, **options)
    assert seen[0] == (2, 3) and seen[1:] == [(6, 1)] * 7  # each prompt was run once
    assert rows == generate(model, [p for p in PROMPTS[:2] for _ in range(3)], **options)
    assert len({tuple(row) for row in rows}) == (2 if temperature == 0 else 6)


def test_rows_that_have_ended_leave_the_batch(model):
    widths = []
    model.transformer.wte.register_forward_hook(lambda m, args, out: widths.append(len(out)))
    ends = {0: 3, 1: 9, 2: 5, 3: 1}  # row: tokens
    options = dict(max_new_tokens=12, sampling=Sampling(1.3, 1.5), seed=0)
    stop = lambda row, tokens: len(tokens) == ends[row]  # noqa: E731
    rows = complete(model, PROMPTS, stop=stop, **options)
    assert widths == [4, 4, 4, 2, 2, 1, 1, 1, 1]
    free = complete(model, PROMPTS, **options)
    assert [row.tokens for row in rows] == [free[r].tokens[:n] for r, n in ends.items()]
    assert {row.reason for row in rows} == {"stop"} and {row.reason for row in free} == {"length"}


def test_log_probabilities_are_the_models_own(model):
    options = dict(
        max_new_tokens=15, log_probabilities=True, seed=1,
        sampling=Sampling(1.5, 0.7, top_k=5, min_p=0.01),
    )  # fmt: skip
    [row] = complete(model, [[1, 2, 3]], **options)
    whole = torch.tensor([[1, 2, 3, *row.tokens]])
    expected = model(whole).log_softmax(-1)[0, 2:-1].gather(1, whole[0, 3:, None])[:, 0]
    assert_close(torch.tensor(row.log_probabilities), expected.float(), rtol=1e-4, atol=1e-5)
    assert complete(model, [[1]], max_new_tokens=1)[0].log_probabilities is None
    [stopped] = complete(model, [[1, 2, 3]], stop_tokens=[row.tokens[4]], **options)
    assert stopped.tokens == row.tokens[:4] and len(stopped.log_probabilities) == 4


@pytest.mark.parametrize("poll", [1, 8])
@pytest.mark.parametrize("window", [False, True])
def test_fixed_shapes_and_polling_change_nothing(model, monkeypatch, window, poll):
    """What a GPU does, without the capture: full capacity under a mask, tokens read in groups."""
    options = dict(
        max_new_tokens=40 if window else 20, window=window, seed=2, repetition_penalty=1.2,
        stop=lambda row, tokens: len(tokens) == (30, 3, 17, 18)[row],
    )  # fmt: skip
    streamed = {"usual": [], "fixed": []}
    kept = lambda name: lambda row, token: streamed[name].append((row, token))  # noqa: E731
    expected = generate(model, PROMPTS, **options, stream=kept("usual"))
    monkeypatch.setattr(module, "pace", lambda device: Pace(True, False, poll))
    shapes = set()
    ours = model.ops.cached_attention

    def attention(q, k, v, mask):
        shapes.add((k.shape[2], mask is None))
        return ours(q, k, v, mask)

    object.__setattr__(model.ops, "cached_attention", attention)
    assert generate(model, PROMPTS, **options, stream=kept("fixed")) == expected
    assert shapes == {(32 if window else 28, False)}
    assert sorted(streamed["fixed"]) == sorted(streamed["usual"])


class Casts(TorchDispatchMode):
    """Counts by name how often parameters are cast to bfloat16 while it is on."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor):
            same = result.shape == args[0].shape and result.dtype == torch.bfloat16
            name = self.names.get(args[0].data_ptr()) if same else None
            self.counts.update([name] if name else [])
        return result


@pytest.fixture
def in_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "execution", lambda device, _: Execution(device, torch.bfloat16))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lora", [False, True])
def test_under_bfloat16_weights_are_cast_once_a_call(tiny, in_bfloat16, lora, mode):
    model = GPT(tiny, "torch")
    if lora:
        add_lora(model, LoRAConfig(rank=2))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    held = {p: name for name, p in model.named_parameters()}
    names = [held[p] for m in linear for p in m.parameters(recurse=False)]
    with mode(), Casts(model) as casts:
        before = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    assert casts.counts == Counter(names) and len(names) > 4 * tiny.n_layer
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    with mode():
        assert generate(model, PROMPTS, max_new_tokens=12, temperature=0) != before  # no old copy


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_bfloat16_on_a_cpu_is_float32_but_for_rounding(tiny, kernels):
    model = GPT(tiny, kernels)
    options = dict(max_new_tokens=1, log_probabilities=True, sampling=Sampling(temperature=0))
    rows = [complete(model, PROMPTS, dtype=dtype, **options) for dtype in ("float32", "bfloat16")]
    exact, rounded = (torch.tensor([p for row in of for p in row.log_probabilities]) for of in rows)
    assert 0 < (exact - rounded).abs().max() < 0.05
    assert model.lm_head.weight.dtype == torch.float32


def test_the_copies_give_the_bits_of_autocast_and_leave_the_model(tiny, in_bfloat16):
    model = GPT(tiny, "torch")
    names, trained = [*model.state_dict()], dict(model.named_parameters())
    with torch.no_grad(), Execution(torch.device("cpu"), torch.bfloat16).autocast():
        expected = module._Decoder(model, 12, torch.float32).prefill(PROMPTS)
    with torch.no_grad(), module.evaluating(model, "auto") as dtype:
        weight = model.lm_head.weight
        assert (weight.dtype, dtype) == (torch.bfloat16, torch.float32)
        with module.evaluating(model, "auto"):  # as in generate
            assert model.lm_head.weight is weight
        assert_close(module._Decoder(model, 12, dtype).prefill(PROMPTS), expected, rtol=0, atol=0)

    def fail(row, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=12, stop=fail)
    assert [*model.state_dict()] == names and model.lm_head.weight is model.transformer.wte.weight
    assert all(p is trained[name] for name, p in model.named_parameters())


def test_a_model_that_is_shared_out_is_not_captured(model, monkeypatch):
    class Shared(torch.nn.Parameter):
        pass

    expected = greedy(model, PROMPTS)
    norm = model.transformer.h[0].ln_1
    norm.weight = Shared(norm.weight.data)
    monkeypatch.setattr(module, "pace", lambda device: Pace(True, True, 8))
    assert greedy(model, PROMPTS) == expected


def test_draw_inverts_the_cumulated_probabilities():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniform = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    for scale in (1.0, 0.999):  # sums that rounding has left below 1 change nothing
        assert draw(p.expand(6, -1) * scale, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(p * math.nan, uniform[:1]).tolist() == [5]  # some id of the vocabulary


WARPERS = [
    dict(temperature=0.6), dict(repetition_penalty=1.7), dict(top_k=7), dict(top_p=0.8),
    dict(min_p=0.2), dict(temperature=2.0, top_p=0.95, min_p=0.3),
    dict(repetition_penalty=1.3, temperature=1.4, top_k=30, top_p=0.9, min_p=0.05),
    dict(repetition_penalty=0.8, temperature=0.5, top_k=5, top_p=0.5),
]  # fmt: skip


@pytest.fixture
def theirs(model, tmp_path):
    """transformers' model with the same weights."""
    from transformers import GPT2LMHeadModel

    export_hf(model, tmp_path / "hf", None)
    return GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()


@pytest.mark.parametrize("options", WARPERS, ids=lambda o: "-".join(o))
def test_distributions_are_those_of_transformers(theirs, options):
    """The scores that transformers' generate samples from, step by step."""
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    out = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=20,
        output_scores=True, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, eos_token_id=None, **{"top_k": 0} | options,
    )  # fmt: skip
    n_dropped = 0
    for step, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = torch.zeros(1, 65, dtype=torch.bool)
        seen[0, out.sequences[0, : 5 + step]] = True
        ours = filtered(raw, seen, **options)
        assert torch.equal(ours.isinf(), scores.isinf()), step
        assert_close(ours.softmax(-1), scores.softmax(-1), rtol=1e-5, atol=1e-7)
        n_dropped += int(ours.isinf().sum())
    assert bool(n_dropped) == bool({"top_k", "top_p", "min_p"} & options.keys())


@pytest.mark.parametrize("stops, penalty", [([11, 30], 1.0), ([], 1.5)])
def test_greedy_tokens_are_those_of_transformers(model, theirs, stops, penalty):
    """A left-padded batch gives each prompt what it gets alone, up to its end of text."""
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [60]]
    options = dict(max_new_tokens=20, repetition_penalty=penalty)
    ours = greedy(model, prompts, stop_tokens=stops, **options)
    for prompt, row in zip(prompts, ours, strict=True):
        idx = torch.tensor([prompt])
        whole = theirs.generate(
            idx, attention_mask=torch.ones_like(idx), do_sample=False, eos_token_id=stops or None,
            pad_token_id=0, **options,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert row == [token for token in whole if token not in stops]


def test_threads_change_no_number():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=16, vocab_size=1001)
    model, found = GPT(config, "torch"), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found += complete(model, [[1, 2]], max_new_tokens=8, log_probabilities=True, seed=0)
    finally:
        torch.set_num_threads(1)
    assert found[0].tokens == found[1].tokens
    assert_close(found[0].log_probabilities, found[1].log_probabilities)
