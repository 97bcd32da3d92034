import pytest
import torch

from gpt2.config import Sampling
from gpt2.generate import filter_logits, generate
from gpt2.model import GPT


@pytest.fixture
def model(tiny):
    # Larger weights than at initialisation, so that the model has clear preferences.
    model = GPT(tiny, "torch")
    for p in model.parameters():
        p.data *= 4
    return model


PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3]]


def test_a_batch_gives_each_prompt_what_it_gets_alone(model):
    together = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    alone = [generate(model, [p], max_new_tokens=12, temperature=0)[0] for p in PROMPTS]
    assert together == alone
    assert together[0] == together[3] and len({tuple(r) for r in together}) > 1


def test_cache_and_no_cache_agree(model):
    [cached] = generate(model, [[1, 2, 3]], max_new_tokens=20, temperature=0)
    tokens = [1, 2, 3]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert cached == tokens[3:]


def test_seed_makes_it_repeatable(model):
    a, b, c = (generate(model, [[1]], max_new_tokens=20, seed=s) for s in (1, 1, 2))
    assert a == b != c


def test_stop_tokens_end_a_row_and_are_left_out(model):
    free = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    stop = free[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, temperature=0, stop_tokens=[stop])
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_stream_sees_every_token_in_order(model):
    seen = [[] for _ in PROMPTS]
    rows = generate(
        model, PROMPTS, max_new_tokens=9, seed=0, stream=lambda row, token: seen[row].append(token)
    )
    assert seen == rows


def test_window_goes_on_from_the_later_half(model):
    new = generate(model, PROMPTS, max_new_tokens=60, temperature=0, window=True)
    for prompt, row in zip(PROMPTS, new, strict=True):
        assert len(row) == 60
        whole, start = prompt + row, 0
        for i in range(len(prompt), len(whole)):
            if i - start == 33:  # 32 tokens are full; then 16 are kept, and so on
                start = i - 16
            assert whole[i] == int(model(torch.tensor([whole[start:i]]))[0, -1].argmax()), i
    alone = [generate(model, [p], max_new_tokens=60, temperature=0, window=True)[0] for p in PROMPTS]
    assert new == alone


def test_leaves_the_model_in_its_mode(model):
    generate(model.train(), [[1]], max_new_tokens=1)
    assert model.training


def filtered(logits, seen=None, **options):
    return filter_logits(logits, seen, Sampling(**options))


def test_filters():
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]])
    kept = lambda **o: (filtered(p.log(), **o) > float("-inf")).tolist()[0]  # noqa: E731
    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_k=99) == [True] * 5
    assert kept(top_p=0.69) == [True, True, False, False, False]
    assert kept(top_p=0.71) == [True, True, True, False, False]
    assert kept(top_p=0.01) == [True, False, False, False, False]
    assert kept(min_p=0.25) == [True, True, True, False, False]
    assert kept(top_k=3, top_p=0.7) == [True, True, False, False, False]
    assert kept(top_k=1, temperature=0) == [True] * 5
    colder = filtered(p.log(), temperature=0.5).softmax(-1)
    torch.testing.assert_close(colder, p**2 / (p**2).sum())
    seen = torch.tensor([[True, False, True]])
    logits = torch.tensor([[2.0, 2.0, -2.0]])
    result = filtered(logits, repetition_penalty=2.0, seen=seen)
    assert result.tolist() == [[1.0, 2.0, -4.0]]


def test_sampling_follows_the_distribution(model):
    model.lm_head.weight.data.mul_(3)
    rows = generate(model, [[5]] * 4000, max_new_tokens=1, seed=0, temperature=0.7)
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=65) / 4000
    expected = (model(torch.tensor([[5]]))[0, 0] / 0.7).softmax(-1)
    assert (counts - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1], [65]], {}, "prompt 1: token id 65 lies outside the model's vocabulary of 65"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 30], {}, "at most 2 new tokens"),
        ([[1] * 32], {"window": True}, "leaves no room .* of 32"),
        ([[1] * 40], {}, r"leaves no room in the model's context \(block_size\) of 32"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"min_p": 0.0}, "min_p"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_bad_input(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 5} | options)
