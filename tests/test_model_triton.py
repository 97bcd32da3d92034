"""A whole GPT on the Triton kernels, interpreted on the CPU, against the same GPT on torch's."""

import sys

import pytest
import torch
from torch.testing import assert_close

from gpt2.config import GPTConfig
from gpt2.generate import generate
from gpt2.model import GPT
from gpt2.ops import select_ops
from gpt2.train.objectives import LanguageModeling

CONFIG = GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=40, vocab_size=101)
DOCUMENTS = torch.tensor([[0] * 11 + [11] * 20 + [31] * 6, [0] * 37], dtype=torch.int32)


def pair():
    models = [GPT(CONFIG, ops) for ops in ("torch", "triton")]
    models[1].load_state_dict(models[0].state_dict())
    assert [m.ops.name for m in models] == ["torch", "triton"]
    return models


def loss_and_gradients(model, batch, forward=None):
    loss, _ = (LanguageModeling(model) if forward is None else forward)(batch)
    loss = loss / (batch["targets"] != -100).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def batch(doc_start=None):
    idx = torch.randint(0, 101, (2, 38))
    targets = idx[:, 1:].contiguous()
    targets[1, 3:9] = -100
    documents = {} if doc_start is None else {"doc_start": doc_start}
    return {"idx": idx[:, :-1], "targets": targets, **documents}


@pytest.mark.parametrize("doc_start", [None, DOCUMENTS], ids=["plain", "documents"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_same_loss_and_gradients(doc_start, autocast):
    ours, triton = pair()
    data = batch(doc_start)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, gradients = loss_and_gradients(ours, data)
        loss, triton_gradients = loss_and_gradients(triton, data)
    tolerance = dict(rtol=2e-2, atol=2e-3) if autocast else dict(rtol=1e-4, atol=1e-6)
    assert_close(loss, expected, **tolerance)
    for name, gradient in gradients.items():
        if autocast:  # single elements of bf16 gradients differ by rounding; their norm does not
            error = (triton_gradients[name] - gradient).norm() / gradient.norm()
            assert error < 0.05, (name, error)
        else:
            assert_close(triton_gradients[name], gradient, **tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks(backend):
    _, model = pair()
    data = batch(DOCUMENTS)
    expected, gradients = loss_and_gradients(model, data)
    compiled = torch.compile(LanguageModeling(model), fullgraph=True, backend=backend)
    loss, compiled_gradients = loss_and_gradients(model, data, compiled)
    assert_close(loss, expected)
    for name, gradient in gradients.items():
        assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_same_logits_and_greedy_tokens():
    ours, triton = pair()
    idx = torch.randint(0, 101, (2, 33))
    with torch.no_grad():
        assert_close(triton(idx), ours(idx), rtol=1e-4, atol=1e-5)
    prompts = [[1, 2, 3], [4]]
    rows = [generate(m, prompts, max_new_tokens=8, temperature=0) for m in (ours, triton)]
    assert rows[0] == rows[1]


def test_choice_on_a_cpu(monkeypatch):
    assert select_ops("auto", "cpu").name == "torch"
    assert select_ops("triton", "cpu").name == "triton"
    with pytest.raises(ValueError, match="head dimension of at most 128, the model has 160"):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=160, block_size=8, vocab_size=9), "triton")
    monkeypatch.setattr(sys.modules["triton_kernels.attention"], "INTERPRETED", False)
    with pytest.raises(ValueError, match="need a CUDA GPU and the device is 'cpu'"):
        select_ops("triton", "cpu")
    assert "CUDA" in select_ops("auto", "cpu").reason
