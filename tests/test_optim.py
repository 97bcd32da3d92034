"""Muon against torch's own, and what must leave everything as it is."""

import math
from dataclasses import replace

import pytest
import torch

from gpt2.config import PRESETS, LoRAConfig, TrainConfig
from gpt2.lora import add_lora
from gpt2.model import GPT
from gpt2.train.optim import MuonAdamW, make_optimizer, muon_matrices, newton_schulz

CONFIG = TrainConfig(optimizer="muon", lr=0.02, weight_decay=0.3)


def muon(shapes, parts=1, dtype=torch.float32):
    """An optimizer of matrices alone, and these."""
    matrices = {torch.nn.Parameter(torch.randn(shape)): parts for shape in shapes}
    options = dict(weight_decay=0.3, fused=True, matrices=matrices, dtype=dtype)
    return MuonAdamW(list(matrices), 0.02, **options), list(matrices)


def set_gradients(params, seed: int) -> None:
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape)


def train(model: GPT, optimizer, steps: int, found_inf=None) -> None:
    for seed in range(steps):
        set_gradients(model.parameters(), seed)
        optimizer.found_inf = found_inf
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-4), ("float32", 2e-2)])
def test_an_update_is_torchs(dtype, tolerance):
    """Of square, wide and tall matrices, with decay and momentum; torch's is always in bf16."""
    ours, params = muon(
        [(24, 24), (16, 48), (48, 16), (24, 24), (1, 8)], dtype=getattr(torch, dtype)
    )
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.Muon(copies, 0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        before = [p.detach().clone() for p in params]
        for optimizer, of in ((ours, params), (theirs, copies)):
            set_gradients(of, seed)
            optimizer.step()
        for p, q, old in zip(params, copies, before, strict=True):
            assert (p - q).norm() < tolerance * (seed + 1) * (p - old).norm()


def test_q_k_and_v_are_matrices_of_their_own(tiny):
    model = GPT(tiny, "torch")
    packed = model.transformer.h[0].attn.c_attn.weight
    assert {p: n for p, n in muon_matrices(model).items() if n == 3}.keys() == {
        block.attn.c_attn.weight for block in model.transformer.h
    }
    apart, matrices = muon([(32, 32)] * 3)
    for p, part in zip(matrices, packed.detach().chunk(3), strict=True):
        p.data = part.clone()
    train(model, make_optimizer(model, CONFIG), 1)
    set_gradients(model.parameters(), 0)
    for p, part in zip(matrices, packed.grad.chunk(3), strict=True):
        p.grad = part
    apart.step()
    assert torch.equal(packed, torch.cat(matrices))


def test_the_rest_is_adamws(tiny):
    """Embeddings and vectors, and with optimizer adamw all, to the bit."""
    models = [GPT(tiny, "torch") for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    adamw = replace(CONFIG, optimizer="adamw")
    train(models[0], make_optimizer(models[0], CONFIG), 3)
    train(models[1], make_optimizer(models[1], adamw), 3)
    groups = make_optimizer(models[2], adamw).param_groups
    train(models[2], torch.optim.AdamW(groups, fused=True), 3)
    matrices = muon_matrices(models[0])
    assert len(matrices) == 4 * tiny.n_layer
    for p, q, torchs in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(q, torchs)
        assert torch.equal(p, q) == (p not in matrices)


def test_batches_of_any_size_give_the_same_bits(tiny, monkeypatch):
    """So ranks may share matrices out."""
    models = [GPT(tiny, "torch") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train(models[0], make_optimizer(models[0], CONFIG), 2)
    monkeypatch.setattr("gpt2.train.optim.BATCH", 1)
    train(models[1], make_optimizer(models[1], CONFIG), 2)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_nothing(tiny, bad, steps_before):
    model = GPT(tiny, "torch")
    optimizer = make_optimizer(model, CONFIG)
    train(model, optimizer, steps_before, torch.tensor(0.0))

    def everything():
        moments = [v for s in optimizer.state.values() for v in s.values()]
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    before = everything()
    for p in model.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert not any(t.any() for t in after[len(before) :])  # moments made by that step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_zero_only_decay(dtype):
    optimizer, (p, q) = muon([(8, 8), (8, 8)], dtype=getattr(torch, dtype))
    before = p.detach().clone()
    set_gradients([q], 0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before * (1 - 0.02 * 0.3)) and q.isfinite().all()


@pytest.mark.parametrize("dtype, noise", [("float32", 1e-3), ("bfloat16", 1.3)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("columns", [48, 96])
def test_a_matrix_of_low_rank_does_not_blow_up(columns, rank, dtype, noise):
    x = torch.randn(1, 32, rank) @ torch.randn(1, rank, columns)
    sizes = torch.linalg.svdvals(newton_schulz(x.to(getattr(torch, dtype))).float())[0]
    assert ((sizes[:rank] > 0.6) & (sizes[:rank] < 1.3)).all() and (sizes[rank:] < noise).all()


def test_adapters_are_matrices_too(tiny):
    model = add_lora(GPT(tiny, "torch"), LoRAConfig(4))
    optimizer = make_optimizer(model, CONFIG)
    assert sorted(optimizer.matrices.values()) == [1] * 14 + [3] * 2  # c_attn's B is q, k and v
    (only,) = optimizer.param_groups
    assert set(only["params"]) == set(optimizer.matrices)
    train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_it_costs_under_a_hundredth_of_gpt2s_step():
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2"], "torch", "meta")
    flops = make_optimizer(model, CONFIG).flops()
    assert flops == 12 * 5 * (4 * 6 + 2 * 18) * 768**3  # 4 of C x C, 2 of C x 4 C
    assert flops / (524_288 * model.flops_per_token()) < 0.005
