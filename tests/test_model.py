"""The model by itself, and on the Triton kernels (interpreted on a CPU) against torch's."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from gpt2.config import IGNORE_INDEX, PRESETS, GPTConfig
from gpt2.generate import generate
from gpt2.model import GPT, KVCache, parameter_shapes
from gpt2.ops import select_ops
from gpt2.train.objectives import LanguageModeling

SIZES = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200, "tinytiny": 62_362_240, "char": 804_096,
}  # fmt: skip
ODD = GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=40, vocab_size=101)
DOCUMENTS = torch.tensor([[0] * 11 + [11] * 20 + [31] * 6, [0] * 37], dtype=torch.int32)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_flops(name):
    c, n = PRESETS[name], SIZES[name]
    with torch.device("meta"):
        model = GPT(c, "torch", device="meta")
    assert model.n_params() == n == sum(map(math.prod, parameter_shapes(c).values()))
    assert set(parameter_shapes(c)) == {name for name, _ in model.named_parameters()}
    attention = 12 * c.n_layer * c.n_embd * c.block_size
    assert model.flops_per_token() == 6 * (n - c.block_size * c.n_embd) + attention


def test_initialisation_is_gpt2s():
    c = GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=50257, block_size=64)
    for name, p in GPT(c, "torch").named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        elif name == "transformer.wte.weight":
            assert not p[c.vocab_size :].any() and p.shape[0] == 50304
            assert p[: c.vocab_size].std().item() == pytest.approx(0.02, rel=0.01)
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert p.mean().abs() < std / 20, name


def test_first_loss_is_ln_of_the_vocabulary_and_padding_stays_zero(tiny):
    model, idx = GPT(tiny, "torch"), torch.randint(0, 65, (8, 33))
    batch = {"idx": idx[:, :-1], "targets": idx[:, 1:].contiguous()}
    batch["targets"][1, 5:9] = IGNORE_INDEX
    logits = model(batch["idx"])
    assert logits.shape == (8, 32, 65)
    loss, _ = LanguageModeling(model)(batch)
    assert loss.item() / (8 * 32 - 4) == pytest.approx(math.log(65), abs=0.1)
    expected = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    assert_close(loss, expected)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        LanguageModeling(model)(batch)[0].backward()
        optimizer.step()
    assert not model.transformer.wte.weight[65:].any()


def test_cache_gives_the_same_logits(tiny):
    model = GPT(tiny, "torch").eval()
    idx = torch.randint(0, 65, (3, 20))
    cache = KVCache(tiny, 3, 20, "cpu", torch.float32)
    cuts = [(0, 7), (7, 12), *((i, i + 1) for i in range(12, 20))]
    parts = [model(idx[:, a:b], cache=cache) for a, b in cuts]
    assert_close(torch.cat(parts, 1), model(idx), rtol=1e-5, atol=1e-6)


def test_documents_in_a_row_do_not_see_each_other(tiny):
    model = GPT(tiny, "torch").eval()
    documents = [torch.randint(0, 65, (1, n)) for n in (5, 11, 1, 15)]
    starts = torch.tensor([[0] * 5 + [5] * 11 + [16] + [17] * 15], dtype=torch.int32)
    packed = model(torch.cat(documents, 1), doc_start=starts)
    alone = torch.cat([model(d) for d in documents], 1)
    assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only(tiny):
    model, idx = GPT(replace(tiny, dropout=0.5), "torch"), torch.arange(8)[None]
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), model(idx))
    model.train().set_dropout(0.0)
    assert torch.equal(model(idx), model(idx))


def test_compiles_without_graph_breaks(tiny):
    model, idx = GPT(tiny, "torch"), torch.randint(0, 65, (2, 16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(idx), model(idx))


def test_too_long(tiny):
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        GPT(tiny, "torch")(torch.zeros(1, 33, dtype=torch.int64))


def test_kernel_choice(monkeypatch):
    auto = select_ops("auto", "cpu")
    assert auto.name in ("cpp", "torch") and select_ops(auto) is auto
    assert select_ops("triton", "cpu").name == "triton"  # interpreted
    with pytest.raises(ValueError, match="unknown kernels 'cuda'"):
        select_ops("cuda")
    with pytest.raises(ValueError, match="head dimension of at most 128, the model has 160"):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=160, block_size=8, vocab_size=9), "triton")
    monkeypatch.setattr(sys.modules["triton_kernels.attention"], "INTERPRETED", False)
    with pytest.raises(ValueError, match="need a CUDA GPU and the device is 'cpu'"):
        select_ops("triton", "cpu")


def pair() -> list[GPT]:
    """On torch's operations and on Triton's, with the same weights."""
    models = [GPT(ODD, ops) for ops in ("torch", "triton")]
    models[1].load_state_dict(models[0].state_dict())
    assert [m.ops.name for m in models] == ["torch", "triton"]
    return models


def batch(**more) -> dict[str, torch.Tensor]:
    idx = torch.randint(0, 101, (2, 38))
    targets = idx[:, 1:].contiguous()
    targets[1, 3:9] = IGNORE_INDEX
    return {"idx": idx[:, :-1], "targets": targets, **more}


def loss_and_gradients(model: GPT, forward, batch) -> dict[str, torch.Tensor]:
    loss = forward(batch)[0] / (batch["targets"] != IGNORE_INDEX).sum()
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("more", [{}, {"doc_start": DOCUMENTS}], ids=["plain", "documents"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_triton_gives_torchs_loss_and_gradients(more, autocast):
    data = batch(**more)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = (loss_and_gradients(m, LanguageModeling(m), data) for m in pair())
    if not autocast:
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        return
    assert_close(ours["loss"], theirs["loss"], rtol=2e-2, atol=2e-3)
    for name in theirs:  # single elements differ by rounding; norms do not
        assert (ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm(), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
def test_triton_compiles_without_graph_breaks():
    _, model = pair()
    forward, data = LanguageModeling(model), batch(doc_start=DOCUMENTS)
    expected = loss_and_gradients(model, forward, data)
    compiled = torch.compile(forward, fullgraph=True)
    assert_close(loss_and_gradients(model, compiled, data), expected, rtol=1e-4, atol=1e-6)


def test_triton_gives_torchs_greedy_tokens():
    ours, theirs = (
        generate(model, [[1, 2, 3], [4]], max_new_tokens=8, temperature=0) for model in pair()
    )
    assert ours == theirs
