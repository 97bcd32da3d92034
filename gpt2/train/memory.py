"""How many bytes a training step needs on its device, and how long it takes at best: by formula.

What stays: parameters, gradients and AdamW's two moments, in float32. What is saved for the
backward pass: of each block, per token, with s the bytes of the matmuls' dtype and 4 those of the
residual stream,

    two sums x + branch, 4C each, with mean and rstd   (layer norm)
    its output, C s, twice; 3C s, C s and 4H           (c_attn; attention's q, k, v, output and lse)
    4C s before the GELU and 4C s after it             (MLP)

so 36 C bytes a token and block in bfloat16 and 64 C in float32. The peak is the largest of five
moments: the loss with its logits; the start of the backward pass, where the head's gradient is
there twice; the backward pass of the last MLP and of the first; its end, where the embedding's
gradient meets the head's. tests/test_preflight.py compares both sums with what a CPU really saves
and allocates.

B rows, T time, N = B T tokens of a micro batch, C channels, L layers, V vocabulary with padding.
Left out: the allocator's rounding, cuBLAS's and NCCL's buffers (gpt2.train.preflight keeps a
margin for them), and what torch.compile saves, whose own choice is at most this.
"""

from dataclasses import dataclass, replace
from typing import Literal

from gpt2.config import GPTConfig
from gpt2.ops import CPU_LOGITS


@dataclass(frozen=True)
class Setting:
    """What memory and time of a training step depend on."""

    shape: GPTConfig
    rows: int  # of a micro batch, on one device
    block_size: int  # tokens in a row
    micro_steps: int  # micro batches of a step, on one device
    bfloat16: bool  # matmuls under autocast; else all is float32
    cuda: bool
    kernels: Literal["torch", "triton"]
    n_params: int  # with the vocabulary's padding
    n_trained: int  # of these, the ones that have gradients
    compiled: bool = False
    doc_mask: bool = False
    activation_checkpointing: bool = False  # blocks keep their inputs only and compute again
    sharding: Literal["none", "optimizer", "full"] = "none"  # see gpt2.train.parallel
    world_size: int = 1
    exact_reduction: bool = False  # partial sums of gradients are kept; see gpt2.train.exact
    host_copies: int = 0  # of weights and moments, in host memory: checkpoints, snapshots

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.rows * self.block_size

    @property
    def width(self) -> int:
        """Bytes of a number in a matmul."""
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step; the parts add up to it."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # saved for the backward pass by embeddings, blocks and the last layer norm
    bfloat16_weights: int  # copies that autocast makes of the matrices
    logits: int  # logits, and the gradients that the loss computes with them
    working: int  # what is in flight beside them
    batches: int  # this step's tokens and the next one's
    host_copies: int  # on a CPU they share its memory; else 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


def memory(s: Setting) -> Memory:
    """The parts of the peak of a training step."""
    shard = s.world_size if s.sharding == "full" else 1
    gradients, activations, casts, logits, working = max(_moments(s), key=sum)
    return Memory(
        parameters=4 * s.n_params // shard,
        gradients=gradients // shard,
        optimizer=8 * s.n_trained // (1 if s.sharding == "none" else s.world_size),
        activations=activations,
        bfloat16_weights=casts,
        logits=logits,
        working=working + (_unsharded_bytes(s) if s.sharding == "full" else 0),
        batches=2 * s.tokens * s.micro_steps * (20 if s.doc_mask else 16),
        host_copies=0 if s.cuda else s.host_copies * 4 * (s.n_params + 2 * s.n_trained),
    )


def _moments(s: Setting) -> list[tuple[int, int, int, int, int]]:
    """Gradients, activations, bfloat16 weights, logits and working bytes when a step holds most."""
    C, N, w = s.shape.n_embd, s.tokens, s.width
    head = 4 * s.shape.padded_vocab_size * C
    saved, block, casts = activation_bytes(s), _block_bytes(s), _cast_bytes(s)
    all_gradients = 4 * s.n_trained
    # DDP's buckets stay; otherwise .grad is there from the second micro step on.
    kept = s.micro_steps > 1 or s.world_size > 1
    before = all_gradients if kept else 0
    if s.exact_reduction:  # one sum for each level of the tree; two buffers for an exchange
        levels = (s.micro_steps & -s.micro_steps).bit_length() - 1
        before = max(levels, 1) * all_gradients if s.micro_steps > 1 else 0
        all_gradients *= max(levels + 1, 3 if s.world_size > 1 else 1)
    mlp = N * (4 * C * w + 4 * C)  # gradients on both sides of the GELU in turn, and of the stream
    mlp += block if s.activation_checkpointing else 0
    # When the backward pass comes to the first block, the gradients behind it are there.
    made = before or max(all_gradients - head - 4 * 12 * C * C, 0)
    first = N * 4 * C + (0 if s.activation_checkpointing else block)
    return [
        (before, saved, casts, *_loss_bytes(s)),
        (before, saved, casts, 2 * (N * C * w + head), 0),  # the loss's own gradients, scaled
        (before, saved, casts, head, mlp),  # the last MLP
        (made, min(first, saved), casts // s.shape.n_layer, head, mlp),  # the first MLP
        (all_gradients, 0, 0, head, (head if kept else 0) + 8 * N * C),  # the embedding's gradient
    ]


def saved_bytes(s: Setting) -> int:
    """What autograd keeps from the forward pass of a micro batch, the loss's own included."""
    V, C, N, w = s.shape.padded_vocab_size, s.shape.n_embd, s.tokens, s.width
    saved = activation_bytes(s) + _cast_bytes(s)
    if s.kernels == "triton" or _chunk_rows(s) < N:
        return saved + N * C * w + 4 * V * C  # dx and dweight, computed in the forward pass
    copy = V * C * w if s.bfloat16 else 0
    return saved + N * C * w + copy + 4 * N * s.shape.vocab_size  # x, weight, log softmax


def activation_bytes(s: Setting) -> int:
    """What the embeddings, all blocks and the last layer norm keep for the backward pass."""
    C, N, L = s.shape.n_embd, s.tokens, s.shape.n_layer
    ends = N * (4 * C + 8) + N * _dropout_bytes(s, 4)
    if s.doc_mask:
        ends += 8 * N  # positions, by which the gradient goes back to their embeddings
    if s.activation_checkpointing:  # x and branch; the first block has no branch
        return ends + L * N * 4 * C + (L - 1) * N * C * s.width
    return ends + L * _block_bytes(s)


def _block_bytes(s: Setting) -> int:
    C, w = s.shape.n_embd, s.width
    norms = 2 * (4 * C + 8) + 2 * C * w
    attention = 4 * C * w + 4 * s.shape.n_head
    per_token = norms + attention + 8 * C * w + 2 * _dropout_bytes(s, w)
    mask = 0
    if s.doc_mask and s.kernels == "torch":  # (B, 1, T, T), as numbers to add
        mask = s.rows * s.block_size**2 * w
    return s.tokens * per_token + mask


def _dropout_bytes(s: Setting, width: int) -> int:
    """Of one mask, per token: bytes on CUDA, numbers of its input's width on a CPU."""
    if not s.shape.dropout:
        return 0
    return s.shape.n_embd * (1 if s.cuda else width)


def _cast_bytes(s: Setting) -> int:
    return 2 * 12 * s.shape.n_embd**2 * s.shape.n_layer if s.bfloat16 else 0


def _chunk_rows(s: Setting) -> int:
    """Rows of logits that the torch path holds at a time (gpt2.ops, triton_kernels.cpu)."""
    if s.cuda or s.compiled:
        return s.tokens
    return min(max(CPU_LOGITS // s.shape.padded_vocab_size, 1), s.tokens)


def _loss_bytes(s: Setting) -> tuple[int, int]:
    """At the moment when the loss needs most: logits with the gradients they give; the rest."""
    V, C, N, w = s.shape.padded_vocab_size, s.shape.n_embd, s.tokens, s.width
    copy = V * C * 2 if s.bfloat16 else 0  # of the head's weight
    gradients = N * C * w + 4 * V * C
    if s.kernels == "triton":
        return N * V * w + gradients + 8 * N, copy + N * C * w
    h = 4 * N * C + (2 * N * C if s.bfloat16 else 0)  # ln_f's output, and cast
    chunk = _chunk_rows(s)
    if chunk < N:
        logits = chunk * V * w + gradients
        if s.bfloat16:  # in float32 too; a chunk's part of dweight in bfloat16, then in float32
            logits += 4 * chunk * s.shape.vocab_size + 6 * V * C
        return logits, copy + h
    # The log softmax and two gradients of its size, in the backward pass.
    return 3 * 4 * N * s.shape.vocab_size, copy + h


def _unsharded_bytes(s: Setting) -> int:
    """FSDP: whole parameters of two blocks and of what lies outside blocks, and their gradients."""
    C = s.shape.n_embd
    block = 12 * C * C + 13 * C
    outside = s.n_params - s.shape.n_layer * block
    return 4 * (3 * block + 2 * outside)


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach."""

    flops: float  # of a matmul with the model's own shape, FLOP/s
    bandwidth: float  # of a copy, bytes read and written, bytes/s


def step_parts(s: Setting, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each part of a step on one device, if it reached the ceilings that it needs.

    Matmuls, attention and the head count FLOPs (attention the causal half; its backward pass
    computes the scores again), the other parts bytes, as few as fused kernels move. What ranks send
    each other and the wait for data are not counted.
    """
    C, L, N, w = s.shape.n_embd, s.shape.n_layer, s.tokens, s.width
    V, T = s.shape.padded_vocab_size, s.block_size
    again = 1 if s.activation_checkpointing else 0
    trained = s.n_trained >= s.n_params // 2  # else adapters: frozen matrices need no gradient
    per_weight = 6 if trained else 4
    matrices = (per_weight + 2 * again) * 12 * C * C * L * N
    attention = (7 + 2 * again) * C * T * L * N
    # Layer norms: in branch and x, out sum and y; GELU: in and out, 4C; backward passes alike.
    elementwise = L * N * C * (28 * w + 40 + again * (12 * w + 16))
    logits = 3 * N * V * w
    weights = 6 * 12 * C * C * L if s.bfloat16 else 0
    accumulation = 12 * s.n_trained if s.micro_steps > 1 else 0
    share = 1 if s.sharding == "none" else s.world_size
    optimizer = 40 * s.n_trained // share  # norm 4, clip 8, AdamW reads 16 and writes 12
    seconds = {
        "matmuls": matrices / ceilings.flops,
        "attention": attention / ceilings.flops,
        "head": per_weight * V * C * N / ceilings.flops,
        "loss": logits / ceilings.bandwidth,
        "elementwise": elementwise / ceilings.bandwidth,
        "weights": (weights + accumulation) / ceilings.bandwidth,
    }
    seconds = {name: s.micro_steps * value for name, value in seconds.items()}
    return seconds | {"optimizer": optimizer / ceilings.bandwidth}


def largest_fit(s: Setting, budget: int) -> int:
    """The most rows of a micro batch whose peak stays within budget bytes, 0 where none does.

    Of the divisors of the rows that one device has in a step, rows * micro_steps.
    """
    rows = s.rows * s.micro_steps
    for micro_steps in range(1, rows + 1):
        if rows % micro_steps == 0:
            here = replace(s, rows=rows // micro_steps, micro_steps=micro_steps)
            if memory(here).peak <= budget:
                return here.rows
    return 0
