"""Keeps bad steps away from the weights: a loss or gradient that is not finite, or a spike; names
the documents that they were made of; and goes back to earlier weights where asked to.

The device decides before the optimizer runs, without the host waiting: fused AdamW leaves weights,
moments and its step count alone where found_inf is 1. The host reads the numbers one step later, so
the limit for step s comes from the accepted steps up to s - 2, wherever they were read: a resumed
run decides as the uninterrupted one would. Losses of skipped steps never enter the statistics.

A spike is a loss more than SPIKE_Z standard deviations above the mean of the last WINDOW accepted
steps (z-score). A large gradient alone is none: clipping bounds what it does, and healthy small
models have them. All ranks decide alike, from sums over all of them.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2.data.loader import BatchSource
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.state import host_memory

WINDOW = 128  # accepted steps that the limit comes from
SPIKE_Z = 8.0
ENOUGH = 32  # with fewer of them there is none
SHOWN = 3  # rows that are named of a bad step
TRIES = 10  # times that a run goes back to one snapshot
PATIENCE = 10  # skipped steps in a row: then it is no spike but a new level, or has diverged


class Verdict(NamedTuple):
    """On one step; step counts from 0."""

    step: int
    loss: float
    grad_norm: float
    reason: str  # why it was skipped; empty where it was applied


class GaveUp(ValueError):
    """The run cannot go on; its weights are those of the last good step."""


class Guard:
    """Judges every step between its backward pass and the optimizer."""

    def __init__(self, group: Distributed):
        self.group = group
        self._accepted: deque[tuple[int, float]] = deque(maxlen=WINDOW + 2)
        self._restart = -1  # accepted steps before this one are of another level
        self._skipped_in_a_row = 0
        self._unread: deque = deque()

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 where the step is to be skipped, else 0.0, on the device; a collective.

        loss: this rank's share of the mean loss; grad_norm: of the gradients summed over ranks.
        """
        limit = self.limit(step)
        norm_is_bad = ~torch.isfinite(grad_norm)
        facts = self.group.sum(torch.stack([loss, norm_is_bad.to(loss.dtype)]))
        skip = ~(torch.isfinite(facts[0]) & (facts[0] <= limit)) | (facts[1] > 0)
        found = torch.stack([facts[0], grad_norm.to(loss.dtype), skip.to(loss.dtype)])
        host, done = host_memory(found), None
        host.copy_(found, non_blocking=True)
        if found.is_cuda:
            done = torch.cuda.Event()
            done.record()
        self._unread.append((step, limit, host, done))
        return found[2]

    def verdicts(self, *, all_steps: bool = False) -> list[Verdict]:
        """What became of the steps judged so far, each told once; without the last one, whose
        numbers may still be on their way, unless all_steps.

        Raises GaveUp after PATIENCE steps in a row that were not finite.
        """
        told = []
        while len(self._unread) > (0 if all_steps else 1):
            step, limit, host, done = self._unread.popleft()
            if done is not None:
                done.synchronize()
            loss, grad_norm, skipped = host.tolist()
            reason = _reason(loss, grad_norm, limit) if skipped else ""
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if not skipped:
                self._accepted.append((step, loss))
            elif self._skipped_in_a_row == PATIENCE:
                self._skipped_in_a_row = 0
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise GaveUp(
                        f"{PATIENCE} steps in a row were not finite, the last one step {step}: the "
                        "run has diverged; lower lr or raise warmup_steps, or go on from an "
                        "earlier checkpoint with --resume PATH"
                    )
                self._restart = step  # a new level, not a spike
            told.append(Verdict(step, loss, grad_norm, reason))
        return told

    def limit(self, step: int) -> float:
        """The largest loss that passes at a step; inf where there is no limit."""
        first = self._restart if self._restart <= step - 2 else -1
        known = [loss for at, loss in self._accepted if first <= at <= step - 2][-WINDOW:]
        if len(known) < ENOUGH:
            return math.inf
        mean = math.fsum(known) / len(known)
        std = math.sqrt(math.fsum((loss - mean) ** 2 for loss in known) / len(known))
        # At least a hundredth of the mean, so that a loss that hardly moves has room above it.
        return mean + SPIKE_Z * max(std, 0.01 * abs(mean))

    def forget(self, from_step: int) -> None:
        """Leaves out what was judged from a step on, after going back to it."""
        self._unread.clear()
        kept = [entry for entry in self._accepted if entry[0] < from_step]
        self._accepted = deque(kept, maxlen=WINDOW + 2)

    def state_dict(self) -> dict:
        """As plain values; all verdicts must have been read."""
        assert not self._unread
        return {
            "accepted": [list(entry) for entry in self._accepted],
            "restart": self._restart, "skipped_in_a_row": self._skipped_in_a_row,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        entries = [tuple(entry) for entry in state.get("accepted", [])]
        self._accepted = deque(entries, maxlen=WINDOW + 2)
        self._restart = state.get("restart", -1)
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)


def _reason(loss: float, grad_norm: float, limit: float) -> str:
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        return f"not finite (loss {loss:.4g}, gradient norm {grad_norm:.4g})"
    return f"a spike (loss {loss:.4f}, limit {limit:.4f}; gradient norm {grad_norm:.3g})"


@torch.no_grad()
def row_losses(
    objective: nn.Module,
    batch: dict[str, Tensor],
    autocast: Callable[[], AbstractContextManager],
) -> list[float]:
    """The mean loss of each row alone, in a second forward pass, without dropout."""
    found = []
    objective.eval()
    for row in range(len(batch["idx"])):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        with autocast():
            loss_sum, _ = objective(one)
        found.append((loss_sum / objective.count(one).clamp(min=1)).item())
    objective.train()
    return found


def suspects(
    losses: list[list[float]], data: BatchSource, step: int, rows_per_step: int, offset: int
) -> tuple[str, list[dict]]:
    """What each rank's row losses say, and the rows to name.

    Those whose loss is not finite, else the worst ones; SHOWN at most. `row` counts in the global
    batch of `step` of data, at an offset.
    """
    rows = [
        {"rank": rank, "row": rank * len(part) + i, "loss": loss}
        for rank, part in enumerate(losses)
        for i, loss in enumerate(part)
    ]
    what = "rows whose loss is not finite"
    named = [row for row in rows if not math.isfinite(row["loss"])][:SHOWN]
    if not named:
        what = "no row is bad in a second pass; those with the highest loss"
        named = sorted(rows, key=lambda row: -row["loss"])[:SHOWN]
    for row in named:
        first, last = (
            data.provenance(step, row["row"], rows_per_step, token, offset=offset)
            for token in (0, data.block_size)
        )
        same = (first.shard, first.document) == (last.shard, last.document)
        row["documents"] = [
            f"{place.shard} token {place.offset} document {place.document}"
            for place in ([first] if same else [first, last])
        ]
        if not math.isfinite(row["loss"]):
            row["loss"] = str(row["loss"])  # JSON has no NaN
    return what, named


def spell(row: dict) -> str:
    """A row of suspects() in words."""
    where = " to ".join(row["documents"])
    return f"rank {row['rank']} row {row['row']} loss {row['loss']}: {where}"


class Snapshots:
    """The two newest snapshots; rollback takes the older one.

    What makes a loss spike is often an update some steps before, so the distance is between one and
    two times the steps between snapshots.
    """

    def __init__(self):
        self._kept: list[tuple[int, list[Tensor]]] = []
        self._restored: Counter[int] = Counter()

    def take(self, step: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Copies the state of a step, unless that is kept already."""
        if self._kept and self._kept[-1][0] == step:
            return
        state = list(_state(model, optimizer))
        memory = self._kept.pop(0)[1] if len(self._kept) == 2 else []
        memory += map(host_memory, state[len(memory) :])  # all, or moments since the first step
        for copy, tensor in zip(memory, state, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._kept.append((step, memory))

    @torch.no_grad()
    def restore(self, model: GPT, optimizer: torch.optim.Optimizer) -> int:
        """Copies the older snapshot back; returns its step, which becomes the newest one kept.

        Raises GaveUp where that has been done TRIES times already.
        """
        del self._kept[1:]
        ((step, kept),) = self._kept
        self._restored[step] += 1
        if self._restored[step] > TRIES:
            raise GaveUp(
                f"rolled back to step {step} {TRIES} times without getting past it: lower lr, or "
                "go on from an earlier checkpoint with --resume PATH"
            )
        if len(kept) < len(list(_state(model, optimizer))):  # from before the first step
            optimizer.state.clear()
        for tensor, value in zip(_state(model, optimizer), kept, strict=True):
            tensor.copy_(value)
        return step


def _state(model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All weights and moments, of what ranks share out this rank's part; in a fixed order."""
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    for tensor in (*model.parameters(), *moments):
        tensor = tensor.detach()
        yield tensor.to_local() if hasattr(tensor, "to_local") else tensor
