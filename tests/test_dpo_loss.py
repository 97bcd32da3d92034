"""The DPO objective against the formula in float64 and against numbers that trl computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gpt2 import GPT
from gpt2.config import IGNORE_INDEX, GPTConfig, LoRAConfig
from gpt2.lora import adapter_parameters, add_lora
from gpt2.train.objectives import DPO, log_probs, preference_losses

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=53)

# What trl 1.16.0's DPOTrainer._compute_loss returned in float64 for these log probabilities, pair
# by pair: (chosen, rejected), (reference's), (tokens of each answer).
PAIRS = [
    ((-4.1788, -6.5191), (-2.9702, -8.2702), (3, 6)),
    ((-12.8252, -2.9128), (-10.6332, -0.8756), (8, 2)),
    ((-9.3929, -6.3893), (-7.1421, -5.3639), (5, 5)),
    ((-1.8858, -8.7305), (-2.2364, -9.6309), (1, 7)),
]
TRL = {
    ("sigmoid", 0.1): [0.8520422298, 0.7009171249, 0.7562930249, 0.7210149911],
    ("sigmoid", 0.5): [1.6849695825, 0.7325957917, 1.0457062809, 0.8400138817],
    ("ipo", 0.1): [32.4297982301, 18.1084287649, 27.5108646458, 22.8295581865],
    ("ipo", 0.5): [2.8720646745, 0.0652291363, 1.5502243107, 0.6053286464],
}
TRL_REWARDS = {  # sigmoid, beta 0.1: means over the four pairs
    "reward_chosen": -0.13252001, "reward_rejected": -0.01027750, "reward_margin": -0.12224251,
    "reward_accuracy": 0.0,
}  # fmt: skip


LOG_P, REFERENCE, LENGTHS = (torch.tensor(part) for part in zip(*PAIRS, strict=True))


def make_batch(B=3, T=20, prompt=6) -> dict[str, torch.Tensor]:
    """Random pairs with a common prompt and answers of different lengths, filled up."""
    idx = torch.randint(0, SHAPE.vocab_size, (B, 2, T + 1))
    idx[:, 1, :prompt] = idx[:, 0, :prompt]
    ends = torch.randint(prompt + 1, T + 1, (B, 2, 1))
    at = torch.arange(T)
    targets = idx[..., 1:].where((at >= prompt - 1) & (at < ends), IGNORE_INDEX)
    return {"idx": idx[..., :-1].contiguous(), "targets": targets}


def make_model(seed=0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(SHAPE, "torch")
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def exact_log_probs(model: GPT, batch) -> torch.Tensor:
    """By the definition, in float64: (B, 2)."""
    targets = batch["targets"].flatten(0, 1)
    log_p = F.log_softmax(model.double()(batch["idx"].flatten(0, 1)), -1)
    chosen = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.where(targets != IGNORE_INDEX, 0.0).sum(-1).view(-1, 2)


@pytest.mark.parametrize(("loss_type", "beta"), TRL)
def test_losses_equal_trls(loss_type, beta):
    ratios = LOG_P.double() - REFERENCE.double()
    losses = preference_losses(ratios, LENGTHS, beta=beta, loss_type=loss_type)
    expected = torch.tensor(TRL[loss_type, beta], dtype=torch.float64)
    assert_close(losses, expected, rtol=2e-5, atol=1e-6)


def test_rewards_equal_trls():
    class Known(DPO):  # the log probabilities above, instead of a model's
        def reference_log_probs(self, batch):
            return log_probs(self.model, batch) - (LOG_P - REFERENCE)

    targets = torch.where(torch.arange(8) < LENGTHS[..., None], 1, IGNORE_INDEX)
    batch = {"idx": torch.zeros(4, 2, 8, dtype=torch.int64), "targets": targets}
    loss, sums = Known(make_model(), beta=0.1)(batch)
    assert_close(loss.item(), sum(TRL["sigmoid", 0.1]), rtol=1e-5, atol=0)
    for name, mean in TRL_REWARDS.items():
        assert_close(sums[name].item() / 4, mean, rtol=1e-4, atol=1e-6)


def test_log_probs_and_gradient_equal_the_formula():
    """grad L = -beta sigmoid(-beta d) (grad log p(chosen) - grad log p(rejected)), all in float64,
    against what autograd makes of the fused float32 path."""
    model, reference, batch, beta = make_model(1), make_model(2), make_batch(), 0.3
    exact = copy.deepcopy(model)
    expected_log_p = exact_log_probs(exact, batch)
    assert_close(log_probs(model, batch).double(), expected_log_p, rtol=1e-5, atol=0)
    loss, sums = DPO(model, reference, beta=beta)(batch)
    loss.backward()

    ratios = expected_log_p - exact_log_probs(copy.deepcopy(reference), batch).detach()
    d = ratios[:, 0] - ratios[:, 1]
    weight = -beta * torch.sigmoid(-beta * d.detach())
    (weight * d).sum().backward()
    assert_close(loss.double(), -F.logsigmoid(beta * d).sum(), rtol=1e-5, atol=0)
    assert_close(sums["reward_margin"].double(), beta * d.sum().detach(), rtol=1e-4, atol=0)
    assert d.abs().min() > 0.01 and sums["reward_accuracy"] == (d > 0).sum()
    expected = dict(exact.named_parameters())
    largest = max(p.grad.abs().max().item() for p in expected.values())
    for name, p in model.named_parameters():
        atol = 1e-5 * largest
        assert_close(p.grad.double(), expected[name].grad, rtol=1e-3, atol=atol, msg=name)
    assert all(p.grad is None for p in reference.parameters())


def test_a_model_and_its_adapters_off_are_the_same_reference():
    base, batch = make_model(), make_batch()
    model = add_lora(copy.deepcopy(base), LoRAConfig(4))
    for p in adapter_parameters(model).values():
        p.data = 0.3 * torch.randn_like(p)
    found = []
    for objective in (DPO(model), DPO(model, copy.deepcopy(base))):
        model.zero_grad()
        loss, sums = objective(batch)
        loss.backward()
        found.append([p.grad for p in adapter_parameters(model).values()] + [loss])
        assert sums["reward_margin"].abs() > 0.01
    assert_close(*found, rtol=1e-4, atol=1e-6)


def test_pairs_that_do_not_count_and_the_rest_of_a_row():
    model, reference, batch = make_model(1), make_model(2), make_batch(4)
    objective = DPO(model, reference)
    assert objective.count(batch) == 4
    batch["targets"][2:] = IGNORE_INDEX
    part = {name: value[:2] for name, value in batch.items()}
    (loss, sums), (expected, expected_sums) = objective(batch), objective(part)
    assert objective.count(batch) == 2 and objective.count(part) == 2
    assert_close(loss, expected)
    assert_close(sums, expected_sums)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # What fills a half up after its answer changes nothing.
    after = part["targets"].ne(IGNORE_INDEX).flip(-1).cumsum(-1).flip(-1) == 0
    part["idx"] = part["idx"].masked_fill(after, 3)
    assert_close(objective(part)[0], expected)


def test_bad_input():
    model = make_model()
    for options, words in (
        (dict(beta=0.0), "beta must be above 0"),
        (dict(loss_type="kto"), "unknown loss_type 'kto': use sigmoid or ipo"),
    ):
        with pytest.raises(ValueError, match=words):
            DPO(model, make_model(), **options)
    with pytest.raises(ValueError, match="needs a reference"):
        DPO(model)(make_batch())
    reference = make_model()
    reference.set_dropout(0.1)
    with pytest.raises(ValueError, match="dropout 0.1"):
        DPO(model, reference)
