"""What a batch is trained for. DDP and torch.compile wrap an objective; checkpoints save .model.

forward(batch) -> (loss_sum, metrics): the loss summed over the batch's units, so that the trainer
can divide by the number of units of the whole step, over all micro steps and ranks; and further
sums over the same units, to log under their names.
count(batch) -> how many units a batch has, a tensor.
"""

from torch import Tensor, nn

from gpt2.model import GPT

IGNORE_INDEX = -100
Batch = dict[str, Tensor]


class LanguageModeling(nn.Module):
    """Next-token prediction; a unit is a target that counts.

    batch: idx (B, T) int64; targets (B, T) int64, -100 where a position does not count; optionally
    doc_start (B, T) int32.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def count(self, batch: Batch) -> Tensor:
        return (batch["targets"] != IGNORE_INDEX).sum()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        h = model.hidden(batch["idx"], doc_start=batch.get("doc_start"))  # (B, T, C)
        loss_sum = model.ops.linear_cross_entropy(
            h.flatten(0, 1),
            model.lm_head.weight,
            batch["targets"].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            vocab_size=model.config.vocab_size,
        )
        return loss_sum, {}
