"""Copies of the training state in host memory, to go back to after a spike."""

from collections import Counter

import torch

from gpt2 import checkpoint
from gpt2.model import GPT

TRIES = 10  # times that a run goes back to one snapshot


class Snapshots:
    """The two newest snapshots; rollback takes the older one.

    What makes a loss spike is often an update some steps before, so the distance is between one and
    two times the steps between snapshots.
    """

    def __init__(self):
        self._kept: list[tuple[int, checkpoint.Tensors]] = []
        self._restored: Counter[int] = Counter()

    def take(self, step: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Copies the state of a step, unless that is kept already."""
        if self._kept and self._kept[-1][0] == step:
            return
        memory = self._kept.pop(0)[1] if len(self._kept) == 2 else None
        self._kept.append((step, checkpoint.snapshot(model, optimizer, memory)))

    def restore(self, model: GPT, optimizer: torch.optim.Optimizer) -> int:
        """Copies the older snapshot back; returns its step, which becomes the newest one kept.

        Raises ValueError where that has been done TRIES times already.
        """
        del self._kept[1:]
        ((step, tensors),) = self._kept
        self._restored[step] += 1
        if self._restored[step] > TRIES:
            raise ValueError(
                f"rolled back to step {step} {TRIES} times without getting past it: lower lr, or "
                "go on from an earlier checkpoint with --resume PATH"
            )
        checkpoint.restore(tensors, model, optimizer)
        return step
