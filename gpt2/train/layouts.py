"""Where weights, gradients and moments lie: one process, or one of the layouts of several.

TrainConfig.sharding, and bytes a parameter on each of W ranks (weights, gradients, moments, of
which Muon has 4 instead of 8 for the blocks' matrices):

none       4 + 4 + 8        every rank has everything (DDP)
optimizer  4 + 4 + 8 / W    each rank updates some parameters and sends them to the others (ZeRO-1)
full       (4 + 4 + 8) / W  each rank has a part of every tensor; a block is whole only while it
                            runs (FSDP2)

optimizer gives the same bits as none; full the same to the order of additions. Checkpoints are the
same in all of them, so a run may go on in another, with another number of ranks.

full gathers float32 weights and leaves bf16 to autocast: so its arithmetic is that of the other
layouts, for twice the bytes that gathering bf16 would take. Without activation_checkpointing
autograd keeps those bf16 copies of a pass, 2 bytes a parameter. Gradients are reduced after every
micro step, since one that waits for the last is whole on every rank. A model is made whole on each
device before it is shared out: 4 bytes a parameter must fit. Muon needs whole matrices: a batch of
them at a time is gathered, each rank does some, and takes its part of what comes out.

Sources: Rajbhandari et al., ZeRO (arXiv 1910.02054); Zhao et al., PyTorch FSDP (arXiv 2304.11277).
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import TrainConfig
from gpt2.device import Execution, deterministic
from gpt2.dist import Distributed
from gpt2.model import Block
from gpt2.state import STEP, state_names
from gpt2.train.optim import MuonAdamW, make_optimizer, parameter_groups

T = TypeVar("T")


def make_layout(
    config: TrainConfig, objective: nn.Module, group: Distributed, execution: Execution
) -> "Layout":
    """The layout that config names; one process alone has nothing to share out.

    objective: on the group's device; sharding full makes its parameters DTensors, in place.
    Raises ValueError where the number of ranks does not fit.
    """
    if config.exact_reduction:
        return ExactSum(config, objective, group, execution)
    sharded = {"none": Layout, "optimizer": ShardedOptimizer, "full": FullySharded}
    kind = sharded[config.sharding] if group.world_size > 1 else Layout
    return kind(config, objective, group, execution)


class Layout:
    """One process, or DDP; and what the trainer asks of any layout.

    train_forward, eval_forward: the objective as it is to be called, eval_forward without
    gradients; by all ranks equally often.
    optimizer: of those of params that this rank updates.  params: all that are trained.
    sharded: checkpoint.snapshot needs all ranks.
    """

    sharded = False

    def __init__(
        self, config: TrainConfig, objective: nn.Module, group: Distributed, execution: Execution
    ):
        self.config, self.group, self.ddp = config, group, None
        self._wrap(objective, execution.compiled)
        self.params = [p for g in parameter_groups(objective.model, config) for p in g["params"]]
        self.optimizer = make_optimizer(objective.model, config, self._kind(), execution.dtype)

    def divide_step(self, micro_steps: int) -> None:
        """Says how many micro steps make up a step, before the first one.

        Raises ValueError where they do not fit the number of ranks.
        """
        self.micro_steps = micro_steps

    def begin(self, micro_step: int) -> None:
        """Before the forward pass of a micro step, counted from 0."""
        if self.ddp is not None:
            # Gradients are exchanged once, in the backward pass of the last micro step.
            self.ddp.require_backward_grad_sync = micro_step == self.micro_steps - 1

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro step; loss: its share of the mean over the whole step."""
        # DDP averages over ranks, but this is a sum already divided by the count of all ranks.
        (loss * (self.group.world_size if self.ddp is not None else 1)).backward()

    def finish(self, total: Tensor) -> Tensor:
        """After the last micro step; total: this rank's loss. Returns what adds up to the loss."""
        return total

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients down to a norm of max_norm, over all of them; returns the norm."""
        return torch.nn.utils.clip_grad_norm_(self.params, max_norm)

    def call_model(self, function: Callable[[], T]) -> T:
        """function(), which may call objective.model itself; by all ranks equally often."""
        return function()

    def _wrap(self, objective: nn.Module, compiled: bool) -> None:
        forward = objective
        if self.group.world_size > 1:
            forward = self.ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        self._set_forward(forward, objective, compiled)

    def _set_forward(self, train: nn.Module, evaluate: nn.Module, compiled: bool) -> None:
        self.train_forward = torch.compile(train) if compiled else train
        self.eval_forward = torch.compile(evaluate) if compiled else evaluate

    def _kind(self) -> Callable[..., MuonAdamW]:
        return MuonAdamW


class ExactSum(Layout):
    """Like DDP, with sums that do not depend on the number of ranks (see TreeSum), and passes that
    give the same bits each time."""

    def divide_step(self, micro_steps: int) -> None:
        group = self.group
        self.tree = TreeSum(micro_steps * group.world_size, group.rank, group.world_size)

    def backward(self, loss: Tensor) -> None:
        with deterministic():
            loss.backward()
        self.tree.add([p.grad for p in self.params] + [loss.detach()])
        for p in self.params:
            p.grad = None

    def finish(self, total: Tensor) -> Tensor:
        *grads, total = self.tree.finish()
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        return total if self.group.is_main else torch.zeros_like(total)  # it is everyone's already

    def _wrap(self, objective: nn.Module, compiled: bool) -> None:
        if self.group.device.type == "cuda":  # cuBLAS wants to hear it before its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._set_forward(objective, objective, compiled)
        self.train_forward = deterministic()(self.train_forward)


class TreeSum:
    """Sums of gradients that are the same bits for any number of ranks: it adds lists of tensors,
    one list a micro batch, in an order that belongs to the step and not to the ranks.

    Floating point addition is not associative, so what a sum gives depends on its tree. The
    tree here belongs to the step and not to the ranks: a step has M = 2^k m micro batches (m
    odd); blocks of m consecutive ones are added in order, then blocks pairwise, neighbours
    first. A rank that holds M / W consecutive micro batches (W a power of two up to 2^k) adds
    its own subtree alone; the last log2(W) levels are exchanges between two ranks, and a + b =
    b + a. It costs up to k + 1 copies of the gradients, and no exchange overlaps with a
    backward pass.

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


class ShardedOptimizer(Layout):
    """DDP with ZeRO-1."""

    sharded = True

    def _kind(self) -> Callable[..., MuonAdamW]:
        return partial(ShardedMuonAdamW, self.group)


class ShardedMuonAdamW(MuonAdamW):
    """MuonAdamW of which each rank steps some parameters, has their moments, and sends what came
    out.

    Whole tensors are shared out, the largest first, each to the rank with the least so far; so an
    update is the same bits as MuonAdamW's. One tensor is too large for an equal share: the
    embedding is 31% of gpt2 and 5% of gpt2-xl. found_inf works as MuonAdamW's does.
    Raises ValueError for more ranks than tensors.
    """

    def __init__(self, group: Distributed, groups: list[dict], *args, **options):
        self.rank = group.rank
        trained = [p for g in groups for p in g["params"]]
        self.owner: dict[Tensor, int] = {}
        load = [0] * group.world_size
        for p in sorted(trained, key=lambda p: -p.numel()):
            self.owner[p] = load.index(min(load))
            load[self.owner[p]] += p.numel()
        if min(load) == 0:
            raise ValueError(
                f"sharding optimizer: the {len(trained)} tensors of this model do not go round "
                f"{group.world_size} ranks: use sharding none"
            )
        own = [{**g, "params": [p for p in g["params"] if self._is_own(p)]} for g in groups]
        super().__init__([g for g in own if g["params"]], *args, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step(closure)
        # Also where found_inf kept the step from being applied: the host does not know yet.
        sent = [dist.broadcast(p.data, owner, async_op=True) for p, owner in self.owner.items()]
        for work in sent:
            work.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.owner:
            p.grad = None

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, from the rank that has it; a collective."""
        if p not in self.owner:  # it is not trained
            return {}
        names = state_names(self, p)
        found = {key: self.state[p][key] for key in names} if self._is_own(p) else {
            key: torch.empty(() if key == STEP else p.shape, device=p.device) for key in names
        }  # fmt: skip
        for value in found.values():
            dist.broadcast(value, self.owner[p])
        return found

    def _is_own(self, p: Tensor) -> bool:
        return self.owner[p] == self.rank


class FullySharded(Layout):
    """FSDP2: the units that are gathered are each block, and the rest (embeddings, last norm)."""

    sharded = True

    def clip(self, max_norm: float) -> Tensor:
        return super().clip(max_norm).full_tensor()

    def call_model(self, function: Callable[[], T]) -> T:
        def after_gathering():
            # What inference mode gathers first, it leaves in tensors that cannot be trained.
            for block in self.blocks:
                block.unshard()
                block.reshard()
            return function()

        # Without compiling: each new length of the cache would be compiled again.
        with torch.compiler.set_stance("force_eager"):
            return self.root.call(after_gathering)

    def _wrap(self, objective: nn.Module, compiled: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # A linear layer's output is a view; nothing here is added to one in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.group.device.type, (self.group.world_size,))
        self.root = objective
        self.blocks = [m for m in objective.modules() if isinstance(m, Block)]
        for unit in (*self.blocks, objective):
            if compiled and unit is not objective:
                # Blocks alone, which are compiled once for all: gathering stays outside.
                unit.forward = torch.compile(unit.forward)
            # The root too is shared out again after each pass, so that whoever reads or writes
            # weights between passes finds the ones that the optimizer has.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            # Add, not average: the loss is already divided by the count of all ranks.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        objective.call = lambda function: function()
        register_fsdp_forward_method(objective, "call")  # so that it gathers, as forward does
        self._set_forward(objective, objective, compiled=False)
