"""What a batch is trained for. DDP and torch.compile wrap an objective; checkpoints save .model.

forward(batch) -> (loss_sum, metrics): the loss summed over the batch's units, so that the trainer
can divide by the number of units of the whole step, over all micro steps and ranks; and further
sums over the same units, to log under their names.
count(batch) -> how many units a batch has, a tensor. unit: what the loss is measured in, in words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import IGNORE_INDEX
from gpt2.lora import adapters_off, lora_config
from gpt2.model import GPT

Batch = dict[str, Tensor]


class LanguageModeling(nn.Module):
    """Next-token prediction; a unit is a target that counts.

    batch: idx (B, T) int64; targets (B, T) int64, -100 where a position does not count; optionally
    doc_start (B, T) int32.
    """

    unit = "nats per token"

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> Tensor:
        return (batch["targets"] != IGNORE_INDEX).sum()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return target_losses(self.model, batch, "sum"), {}


class DPO(nn.Module):
    """Direct preference optimisation; a unit is a pair of answers.

    The chosen one is to gain on the rejected one, measured against a reference.

    batch, a pair a row: idx (B, 2, T) int64, chosen and rejected; targets (B, 2, T) int64, -100
    where a position does not count (a pair without any counts nowhere).
    reference: the frozen model to compare with; without it, it is the model with its adapters off.

    Raises ValueError for options out of range, and for a model with dropout.
    Sources: Rafailov et al., DPO (arXiv 2305.18290); and see preference_losses.
    """

    unit = "per pair"

    def __init__(
        self, model: GPT, reference: GPT | None = None,
        *, beta: float = 0.1, loss_type: str = "sigmoid",
    ):  # fmt: skip
        super().__init__()
        dropout = max(m.config.dropout for m in (model, reference) if m is not None)
        if dropout:
            raise ValueError(
                f"dropout {dropout} would blur the comparison with the reference: "
                "use set_dropout(0.0) of both models"
            )
        self.model, self.reference = model, reference
        if reference is not None:
            reference.requires_grad_(False)
        self.beta, self.loss_type = beta, loss_type
        preference_losses(torch.zeros(1, 2), torch.ones(1, 2), beta=beta, loss_type=loss_type)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        targets = batch["targets"]
        lengths = (targets != IGNORE_INDEX).sum(-1)  # (B, 2)
        counted = lengths.amin(-1) > 0  # (B,)
        ratios = log_probs(self.model, batch) - self.reference_log_probs(batch)  # (B, 2)
        losses = preference_losses(ratios, lengths, beta=self.beta, loss_type=self.loss_type)
        rewards = self.beta * ratios.detach()
        chosen, rejected = rewards.unbind(-1)
        metrics = {
            "reward_margin": chosen - rejected, "reward_accuracy": (chosen > rejected).float(),
            "reward_chosen": chosen, "reward_rejected": rejected,
        }  # fmt: skip
        sums = {name: value.where(counted, 0.0).sum() for name, value in metrics.items()}
        return losses.where(counted, 0.0).sum(), sums

    def count(self, batch: Batch) -> Tensor:
        """The pairs of a batch that count."""
        return (batch["targets"] != IGNORE_INDEX).any(-1).all(-1).sum()

    @torch.no_grad()
    def reference_log_probs(self, batch: Batch) -> Tensor:
        """The reference's log probabilities of both answers, (B, 2) float32."""
        if self.reference is not None:
            return log_probs(self.reference, batch)
        if lora_config(self.model) is None:
            raise ValueError("DPO needs a reference: a second model, or adapters")
        with adapters_off(self.model):
            return log_probs(self.model, batch)


def log_probs(model: GPT, batch: Batch) -> Tensor:
    """Log probabilities of the targets, summed over each sequence that counts.

    batch: idx, targets (..., T). All sequences go through the model at once. Returns (...) float32.
    """
    return -target_losses(model, batch, "none").view(batch["targets"].shape).sum(-1)


def target_losses(model: GPT, batch: Batch, reduction: str) -> Tensor:
    """-log p of each target of idx, targets (..., T): flat, 0 where it does not count; or "sum"."""
    h = model.hidden(batch["idx"].flatten(0, -2), doc_start=batch.get("doc_start"))  # (N, T, C)
    return model.ops.linear_cross_entropy(
        h.flatten(0, 1), model.lm_head.weight, batch["targets"].flatten(),
        ignore_index=IGNORE_INDEX, reduction=reduction, vocab_size=model.config.vocab_size,
    )  # fmt: skip


def preference_losses(
    ratios: Tensor, lengths: Tensor, *, beta: float, loss_type: str = "sigmoid"
) -> Tensor:
    """The loss of each pair, (B,).

    ratios (B, 2): log p_model - log p_reference of the chosen and the rejected answer.
    lengths (B, 2): their tokens. With d = ratio of chosen - ratio of rejected:
        sigmoid   -log sigmoid(beta d)
        ipo       (d - 1 / (2 beta))^2, d of ratios divided by lengths, as in TRL
    Raises ValueError for options out of range.
    Sources: arXiv 2305.18290, eq. 7; Azar et al., IPO (arXiv 2310.12036), eq. 17; the averages: trl
    1.16, trainer/dpo_trainer.py.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if loss_type not in ("sigmoid", "ipo"):
        raise ValueError(f"unknown loss_type {loss_type!r}: use sigmoid or ipo")
    if loss_type == "ipo":
        ratios = ratios / lengths.clamp(min=1)
    d = ratios[:, 0] - ratios[:, 1]
    return -F.logsigmoid(beta * d) if loss_type == "sigmoid" else (d - 1 / (2 * beta)).square()
