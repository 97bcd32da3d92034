"""Which rows and documents a skipped step's batch was made of, for the log."""

import math

import torch
from torch import Tensor, nn

from gpt2.train.guard import Verdict

SHOWN = 3


def tell_of_skipped(trainer, verdict: Verdict) -> None:
    """Logs a skipped step, and the rows and documents of its batch; called by all ranks."""
    group, at = trainer.group, verdict.data_step
    parts = trainer.train_data.batch(at, trainer.rows_per_step, group.rank, group.world_size)
    batch = trainer.name(tuple(part.to(group.device) for part in parts))
    trainer.objective.eval()
    losses = group.gather(row_losses(trainer.objective, batch, trainer.execution.autocast))
    trainer.objective.train()
    if trainer.metrics is None:
        return
    what, rows = suspects(losses, trainer.train_data, at, trainer.rows_per_step)
    text = [f"step {verdict.step:>6}  skipped: {verdict.reason}", f"  {what}:"]
    trainer.metrics.say("\n".join(text + [f"  {spell(row)}" for row in rows]))
    event = {"reason": verdict.reason, "data_step": at, "rows": rows, "skipped": 1}
    trainer.metrics.log(verdict.step + 1, {f"guard/{k}": v for k, v in event.items()})


@torch.no_grad()
def row_losses(objective: nn.Module, batch: dict[str, Tensor], autocast) -> list[float]:
    """The mean loss of each row alone, in a second forward pass."""
    found = []
    for row in range(len(batch["idx"])):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        with autocast():
            loss_sum, _ = objective(one)
        found.append((loss_sum / objective.count(one).clamp(min=1)).item())
    return found


def suspects(
    losses: list[list[float]], data, step: int, rows_per_step: int
) -> tuple[str, list[dict]]:
    """What each rank's row losses say, and the rows to name.

    Those whose loss is not finite, else the worst ones; SHOWN at most. `row` counts in the global
    batch of `step` of data.
    """
    rows = [
        {"rank": rank, "row": rank * len(part) + i, "loss": loss}
        for rank, part in enumerate(losses)
        for i, loss in enumerate(part)
    ]
    bad = [row for row in rows if not math.isfinite(row["loss"])]
    worst = sorted(rows, key=lambda row: -row["loss"])
    what = "no row is bad in a second pass; those with the highest loss"
    what, named = ("rows whose loss is not finite", bad) if bad else (what, worst)
    for row in named[:SHOWN]:
        row["documents"] = _documents(data, step, row["row"], rows_per_step)
        if not math.isfinite(row["loss"]):
            row["loss"] = str(row["loss"])  # JSON has no NaN
    return what, named[:SHOWN]


def spell(row: dict) -> str:
    """A row of suspects() in words."""
    where = " to ".join(row["documents"])
    return f"rank {row['rank']} row {row['row']} loss {row['loss']}: {where}"


def _documents(data, step: int, row: int, rows_per_step: int) -> list[str]:
    """The first and the last document of a row, where the source can tell."""
    if not hasattr(data, "provenance"):
        return []
    places = [data.provenance(step, row, rows_per_step, token) for token in (0, data.block_size)]
    if places[0].shard == places[1].shard and places[0].document == places[1].document:
        del places[1]
    return [f"{place.shard} token {place.offset} document {place.document}" for place in places]
