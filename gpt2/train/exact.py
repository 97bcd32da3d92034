"""Sums of gradients that are the same bits for any number of ranks.

Floating point addition is not associative, so what a sum gives depends on its tree. The tree here
belongs to the step and not to the ranks: a step has M = 2^k m micro batches (m odd); blocks of m
consecutive ones are added in order, then blocks pairwise, neighbours first. A rank that holds M / W
consecutive micro batches (W a power of two up to 2^k) adds its own subtree alone; the last log2(W)
levels are exchanges between two ranks, and a + b = b + a. It costs up to k + 1 copies of the
gradients, and no exchange overlaps with a backward pass.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class TreeSum:
    """Adds lists of tensors, one list a micro batch, in the order of that tree.

    micro_batches: of the whole step, on all ranks. Raises ValueError where the ranks do not fit.
    """

    def __init__(self, micro_batches: int, rank: int, world_size: int):
        power = micro_batches & -micro_batches
        if power % world_size:
            raise ValueError(
                f"exact_reduction: the {micro_batches} micro batches of a step do not split into "
                f"equal subtrees for {world_size} ranks: {power} ranks or a smaller power of two, "
                "or another micro_batch_size"
            )
        self.rank, self.world_size = rank, world_size
        self.block = micro_batches // power  # m
        self.leaves = 0
        self.stack: list[tuple[int, list[Tensor]]] = []  # (blocks in it, their sum)

    def add(self, tensors: list[Tensor]) -> None:
        """The next micro batch's; they are kept, and written over."""
        in_block, self.leaves = self.leaves % self.block, self.leaves + 1
        if in_block:
            torch._foreach_add_(self.stack[-1][1], tensors)
        else:
            self.stack.append((1, tensors))
        if in_block == self.block - 1:
            while len(self.stack) > 1 and self.stack[-2][0] == self.stack[-1][0]:
                n, right = self.stack.pop()
                torch._foreach_add_(self.stack[-1][1], right)
                self.stack[-1] = (2 * n, self.stack[-1][1])

    def finish(self) -> list[Tensor]:
        """The sum over all ranks' micro batches; ready for the next step's."""
        ((_, total),) = self.stack
        self.stack, self.leaves = [], 0
        distance = 1
        while distance < self.world_size:
            _add_partners(total, self.rank ^ distance)
            distance *= 2
        return total


def _add_partners(tensors: list[Tensor], partner: int) -> None:
    """Adds another rank's tensors to these, as it adds these to its own."""
    own = torch.cat([t.flatten() for t in tensors])
    theirs = torch.empty_like(own)
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, own, partner), dist.P2POp(dist.irecv, theirs, partner)]
    ):
        work.wait()
    parts = theirs.split([t.numel() for t in tensors])
    torch._foreach_add_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
