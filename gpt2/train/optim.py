"""AdamW, and Muon for the blocks' matrices; what they train.

AdamW divides each number of a momentum by its usual size. Muon looks at the whole matrix: it makes
all singular values of the momentum about 1, so that directions which gradients seldom take are
learnt as fast as the others. For a matrix w with gradient g,

    m = 0.95 m + 0.05 g                     momentum
    x = 0.95 m + 0.05 g, / its norm         Nesterov's
    5 times: x = a x + b (x x') x + c (x x')^2 x            Newton-Schulz
    w = (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) x

The last factor gives x the size of AdamW's usual update, so that both have one lr and one decay.
c_attn is three matrices, q, k and v. A tall one is transposed, so that x x' is the small product.
All matrices of one shape, of all blocks, are one batch. Its result does not depend on what else is
in it (on a GPU: as far as cuBLAS chooses the same kernel), so ranks may share matrices out.

Cost: 10 r^2 (r + 2 c) FLOPs for r x c, r <= c; 1.6 TFLOP for gpt2, 0.4% of a step of 524,288
tokens. Every rank does all of it, unless they share out moments (sharding optimizer or full).

Sources: Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for
LLM Training (arXiv 2502.16982), for the factor; torch.optim.Muon, which is neither batched nor
sharded. Left out: Muon for embeddings, which it does not suit.
"""

import functools
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from gpt2.config import TrainConfig
from gpt2.model import GPT
from gpt2.state import MOMENTUM, is_shared_out, part_of

BETA = 0.95  # of the momentum
NEWTON_SCHULZ, STEPS = (3.4445, -4.775, 2.0315), 5
BATCH = 1 << 24  # numbers in a batch at most: it bounds the memory that a step needs besides
PACKED = ("c_attn.weight", "c_attn.lora_B.weight")  # q, k and v, one below the other


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict]:
    """What is trained: matrices and embeddings decay, biases and layer norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def muon_matrices(model: GPT) -> dict[Tensor, int]:
    """The parameters that are Muon's, and how many matrices lie in each, one below the other."""
    named = model.transformer.h.named_parameters()
    trained = {name: p for name, p in named if p.requires_grad and p.dim() == 2}
    return {p: 3 if name.endswith(PACKED) else 1 for name, p in trained.items()}


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW; but Muon for the parameters in matrices, see muon_matrices.

    dtype: of Newton-Schulz.  found_inf: as for fused AdamW, a tensor on the device; where it is 1 a
    step changes no weight and no moment. A step uses up gradients: they hold something else then.
    """

    def __init__(self, *args, matrices: dict[Tensor, int], dtype: torch.dtype, **options):
        super().__init__(*args, **options)
        self.matrices, self.dtype = matrices, dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            own = [p for p in group["params"] if p in self.matrices and p.grad is not None]
            if own:
                self._step_matrices(own, group["lr"], group["weight_decay"])
            for p in own:
                p.grad = None  # AdamW passes over what has none
        super().step(closure)

    def flops(self) -> int:
        """Of Newton-Schulz in a step, on this rank."""
        total = 0
        for p in (p for group in self.param_groups for p in group["params"] if p in self.matrices):
            rows, columns = self._shape(p)
            squares, wides = (17, 2) if by_gram(rows, columns, self.dtype, p.device) else (5, 10)
            share = _local(p).numel() / p.numel()
            total += share * self.matrices[p] * 2 * rows**2 * (squares * rows + wides * columns)
        return int(total)

    def _step_matrices(self, params: list[Tensor], lr: float, decay: float) -> None:
        skip = getattr(self, "found_inf", None)
        applied = 1.0 if skip is None else 1.0 - skip
        for p in params:
            if not self.state[p]:
                self.state[p][MOMENTUM] = torch.zeros_like(p)
        grads = [_local(p.grad) for p in params]
        for grad in grads if skip is not None else ():
            grad.masked_fill_(skip > 0, 0.0)  # it may be NaN
        momenta = [_local(self.state[p][MOMENTUM]) for p in params]
        torch._foreach_mul_(momenta, 1.0 - (1.0 - BETA) * applied)
        torch._foreach_add_(momenta, grads, alpha=1.0 - BETA)
        torch._foreach_lerp_(grads, momenta, BETA)
        for batch in self._batches(params):
            self._orthogonalize(batch)
            factor = 0.2 * max(self._shape(batch[0])) ** 0.5
            torch._foreach_mul_([_local(p.grad) for p in batch], -lr * factor * applied)
        weights = [_local(p) for p in params]
        torch._foreach_mul_(weights, 1.0 - lr * decay * applied)
        torch._foreach_add_(weights, grads)

    def _orthogonalize(self, batch: list[Tensor]) -> None:
        """Newton-Schulz of gradients, in place; those that ranks share out are gathered for it."""
        wholes = [
            p.grad.to(self.dtype).full_tensor() if is_shared_out(p) else p.grad for p in batch
        ]
        parts = [
            part if len(part) <= part.shape[1] else part.mT
            for p, whole in zip(batch, wholes, strict=True)
            for part in whole.chunk(self.matrices[p])
        ]
        x = torch.stack(parts).to(self.dtype)  # (B, rows, columns), rows <= columns
        if is_shared_out(batch[0]):
            x = _on_all_ranks(x, batch[0].device_mesh)
        else:
            x = newton_schulz(x)
        torch._foreach_copy_(parts, x.unbind())
        for p, whole in zip(batch, wholes, strict=True):
            if whole is not p.grad:
                p.grad.copy_(part_of(whole, p))

    def _batches(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters whose matrices have one shape, with up to BATCH numbers."""
        for _, group in groupby(sorted(params, key=self._shape), self._shape):
            same = list(group)
            n = max(BATCH // max(p.numel() for p in same), 1)
            yield from (same[i : i + n] for i in range(0, len(same), n))

    def _shape(self, p: Tensor) -> tuple[int, int]:
        """Of its matrices: the smaller size, then the larger one."""
        rows, columns = p.shape[0] // self.matrices[p], p.shape[1]
        return min(rows, columns), max(rows, columns)


def newton_schulz(x: Tensor) -> Tensor:
    """x (B, rows, columns), rows <= columns, with singular values of about 1 (0.7 to 1.2 where they
    were not tiny); the same singular vectors. A matrix of zeros stays zero."""
    a, b, c = NEWTON_SCHULZ
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if not by_gram(*x.shape[1:], x.dtype, x.device):
        for _ in range(STEPS):
            gram = x @ x.mT  # (B, rows, rows)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram, factors = x @ x.mT, []
    for step in range(STEPS):
        gram = factors[-1] @ gram @ factors[-1] if step else gram
        factors.append(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        factors[-1].diagonal(dim1=1, dim2=2).add_(a)
    return functools.reduce(torch.bmm, factors) @ x


def by_gram(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all steps work on x x' instead of x, which is less work where x is wide: 5/9 of it
    for 4 times as many columns. It needs float32 (and not a GPU's TF32): in bf16 it diverges for
    matrices of low rank."""
    return 2 * rows <= columns and dtype == torch.float32 and device.type == "cpu"


def _on_all_ranks(x: Tensor, mesh) -> Tensor:
    """newton_schulz(x), of which each rank does some matrices."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    own = newton_schulz(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).to_local())
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride()
    ).full_tensor()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_shared_out(tensor) else tensor


def make_optimizer(
    model: GPT, config: TrainConfig, kind=MuonAdamW, dtype: torch.dtype = torch.float32
) -> MuonAdamW:
    """What config.optimizer names; kind: what is called with MuonAdamW's arguments."""
    return kind(
        parameter_groups(model, config), config.lr, (config.beta1, config.beta2), fused=True,
        matrices=muon_matrices(model) if config.optimizer == "muon" else {}, dtype=dtype,
    )  # fmt: skip
