"""Keeps bad steps away from the weights: a loss or gradient that is not finite, or a spike.

The device decides before the optimizer runs, without the host waiting: fused AdamW leaves weights,
moments and its step count alone where found_inf is 1. The host reads the numbers one step later, so
the limit for step s comes from the accepted steps up to s - 2, wherever they were read: a resumed
run decides as the uninterrupted one would. Losses of skipped steps never enter the statistics.

A spike is a loss more than SPIKE_Z standard deviations above the mean of the last WINDOW accepted
steps (z-score). A large gradient alone is none: clipping bounds what it does, and healthy small
models have them. All ranks decide alike, from sums over all of them.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.dist import Distributed

WINDOW = 128  # accepted steps that the limit comes from
SPIKE_Z = 8.0
ENOUGH = 32  # with fewer of them there is none
PATIENCE = 10  # skipped steps in a row: then it is no spike but a new level, or has diverged


class Verdict(NamedTuple):
    """On one step; step counts from 0."""

    step: int
    data_step: int  # which step's batch it was; differs from step after a rollback
    loss: float
    grad_norm: float
    reason: str  # why it was skipped; empty where it was applied


class Guard:
    """Judges every step between its backward pass and the optimizer.

    See the module's docstring.
    """

    def __init__(self, group: Distributed):
        self.group = group
        self._accepted: deque[tuple[int, float]] = deque(maxlen=WINDOW + 2)
        self._restart = -1  # accepted steps before this one are of another level
        self._skipped_in_a_row = 0
        self._unread: deque = deque()

    def judge(self, step: int, data_step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 where the step is to be skipped, else 0.0, on the device; a collective.

        loss: this rank's share of the mean loss; grad_norm: of the gradients summed over ranks.
        """
        limit = self.limit(step)
        norm_is_bad = ~torch.isfinite(grad_norm)
        facts = self.group.sum(torch.stack([loss, norm_is_bad.to(loss.dtype)]))
        skip = ~(torch.isfinite(facts[0]) & (facts[0] <= limit)) | (facts[1] > 0)
        found = torch.stack([facts[0], grad_norm.to(loss.dtype), skip.to(loss.dtype)])
        on_gpu = found.device.type == "cuda"
        host = torch.empty(3, dtype=found.dtype, pin_memory=on_gpu)
        host.copy_(found, non_blocking=True)
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record()
        self._unread.append((step, data_step, limit, host, done))
        return found[2]

    def verdicts(self, *, all_steps: bool = False) -> list[Verdict]:
        """What became of the steps judged so far, each told once.

        Without the last one, whose numbers may still be on their way, unless all_steps.

        Raises ValueError after PATIENCE steps in a row that were not finite.
        """
        told = []
        while len(self._unread) > (0 if all_steps else 1):
            step, data_step, limit, host, done = self._unread.popleft()
            if done is not None:
                done.synchronize()
            loss, grad_norm, skipped = host.tolist()
            reason = _reason(loss, grad_norm, limit) if skipped else ""
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if not skipped:
                self._accepted.append((step, loss))
            elif self._skipped_in_a_row == PATIENCE:
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise ValueError(
                        f"{PATIENCE} steps in a row were not finite, the last one step {step}: the "
                        "run has diverged; lower lr or raise warmup_steps, or go on from an "
                        "earlier checkpoint with --resume PATH"
                    )
                self._restart, self._skipped_in_a_row = step, 0  # a new level, not a spike
            told.append(Verdict(step, data_step, loss, grad_norm, reason))
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
