"""Generation on a CUDA GPU: the captured step against the same step run eagerly."""

import importlib
import threading
import time

import pytest
import torch

from gpt2.config import PRESETS, GPTConfig, Sampling
from gpt2.generate import Pace, complete, generate
from gpt2.model import GPT

module = importlib.import_module("gpt2.generate")  # gpt2.generate is the function
EAGER = Pace(fixed=True, captured=False, poll=8)
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=1003)
    model = GPT(shape, "auto", "cuda")
    for p in model.parameters():
        p.data *= 4
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "one"])
def test_graph_gives_the_eager_tokens(model, monkeypatch, temperature, prompts):
    options = dict(
        max_new_tokens=90, num_samples=2, seed=3, log_probabilities=True,
        sampling=Sampling(1.2, temperature, top_k=50),
        stop=lambda row, tokens: len(tokens) == 20 + 10 * row,
    )  # fmt: skip
    graph = complete(model, prompts, **options)
    monkeypatch.setattr(module, "pace", lambda device: EAGER)
    eager = complete(model, prompts, **options)
    assert [row.tokens for row in graph] == [row.tokens for row in eager]
    assert len({tuple(row.tokens) for row in graph}) > 1
    for a, b in zip(graph, eager, strict=True):
        torch.testing.assert_close(a.log_probabilities, b.log_probabilities)


def test_window_captures_again(model, monkeypatch):
    options = dict(max_new_tokens=400, window=True, seed=0)
    graph = generate(model, PROMPTS, **options)
    monkeypatch.setattr(module, "pace", lambda device: EAGER)
    assert graph == generate(model, PROMPTS, **options)


def test_weights_that_changed_are_seen(model):
    """In-training samples: a graph must not outlive the weights that it has read."""
    options = dict(max_new_tokens=30, temperature=0)
    before = generate(model, PROMPTS, **options)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.1
    assert generate(model, PROMPTS, **options) != before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_is_an_error_and_no_device_assert(model, temperature):
    model.transformer.ln_f.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, max_new_tokens=30, temperature=temperature, top_p=0.9)
    torch.cuda.synchronize()


def test_the_host_does_not_wait_between_polls(model, monkeypatch):
    """No synchronising call in a decode step, its sampling included."""
    monkeypatch.setattr(module, "pace", lambda device: Pace(True, True, 10**6))
    step, steps = module._Decoder.step, []

    def watched(self, token):
        logits = step(self, token)
        steps.append(token)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 2 else "default")
        if len(steps) == 40:  # the tokens are read after these
            torch.cuda.set_sync_debug_mode("default")
        return logits

    monkeypatch.setattr(module._Decoder, "step", watched)
    try:
        generate(model, PROMPTS, max_new_tokens=41, top_k=20, top_p=0.9, repetition_penalty=1.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 40


def test_other_threads_may_allocate_during_a_capture(model, monkeypatch):
    expected = generate(model, PROMPTS, max_new_tokens=60, temperature=0)
    run, done, errors = module._Decoder._run, threading.Event(), []

    def allocate():
        for n in range(60):  # each larger than those before, so none of them comes from a cache
            try:
                torch.empty((20 + 2 * n) * 2**20, dtype=torch.int8, device="cuda")
                torch.empty(2**20).pin_memory().to("cuda", non_blocking=True)
            except RuntimeError as error:
                errors.append(error)
            if done.wait(0.02):
                return

    def slow(self, *args):
        time.sleep(0.05)
        return run(self, *args)

    monkeypatch.setattr(module._Decoder, "_run", slow)
    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(5):
            assert generate(model, PROMPTS, max_new_tokens=60, temperature=0) == expected
    finally:
        done.set()
        thread.join()
    assert not errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_than_the_current_device(model):
    expected = generate(model, PROMPTS, max_new_tokens=60, temperature=0)
    assert torch.cuda.current_device() == 0
    assert generate(model.to("cuda:1"), PROMPTS, max_new_tokens=60, temperature=0) == expected
    assert torch.cuda.current_device() == 0


def test_the_shape_of_gpt2_in_bfloat16():
    model = GPT(PRESETS["gpt2"], "auto", "cuda")
    prompts = [[1, 2, 3]] * 4
    rows = generate(model, prompts, max_new_tokens=1000, temperature=0)
    assert rows[0] == rows[1] and len(rows[0]) == 1000
