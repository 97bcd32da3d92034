"""Copies of the training state in host memory, to go back to after a spike.

Each rank copies what it has, so no rank waits for another.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from gpt2.model import GPT
from gpt2.state import host_memory

TRIES = 10  # times that a run goes back to one snapshot


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
        memory = self._kept.pop(0)[1] if len(self._kept) == 2 else []
        for i, tensor in enumerate(_state(model, optimizer)):
            if i == len(memory):
                memory.append(host_memory(tensor))
            memory[i].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._kept.append((step, memory))

    @torch.no_grad()
    def restore(self, model: GPT, optimizer: torch.optim.Optimizer) -> int:
        """Copies the older snapshot back; returns its step, which becomes the newest one kept.

        Raises ValueError where that has been done TRIES times already.
        """
        del self._kept[1:]
        ((step, kept),) = self._kept
        self._restored[step] += 1
        if self._restored[step] > TRIES:
            raise ValueError(
                f"rolled back to step {step} {TRIES} times without getting past it: lower lr, or "
                "go on from an earlier checkpoint with --resume PATH"
            )
        if len(kept) < sum(1 for _ in _state(model, optimizer)):  # from before the first step
            optimizer.state.clear()
        for tensor, value in zip(_state(model, optimizer), kept, strict=True):
            tensor.copy_(value)
        return step


def _state(model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All weights and moments, of what ranks share out this rank's part; in a fixed order."""
    for tensor in model.parameters():
        yield _local(tensor.detach())
    for state in optimizer.state.values():
        for tensor in state.values():
            yield _local(tensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
