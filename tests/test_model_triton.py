"""A whole GPT on the Triton kernels, interpreted on the CPU, against the same GPT on torch's."""

import pytest
import torch
from torch.testing import assert_close

from gpt2.config import GPTConfig
from gpt2.generate import generate
from gpt2.model import GPT
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
def test_compiled_without_graph_breaks():
    _, model = pair()
    data = batch(DOCUMENTS)
    expected, gradients = loss_and_gradients(model, data)
    compiled = torch.compile(LanguageModeling(model), fullgraph=True)
    loss, compiled_gradients = loss_and_gradients(model, data, compiled)
    assert_close(loss, expected)
    for name, gradient in gradients.items():
        assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_same_greedy_tokens():
    ours, triton = (
        generate(model, [[1, 2, 3], [4]], max_new_tokens=8, temperature=0) for model in pair()
    )
    assert ours == triton
