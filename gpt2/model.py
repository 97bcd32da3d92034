"""GPT-2, as OpenAI built it, with the names Hugging Face gave its parts.

Sources: Radford et al., Language Models are Unsupervised Multitask Learners (2019);
https://github.com/openai/gpt-2. Left out: dropout on attention probabilities, which the fused
kernels do not have; dropout on embeddings and on what each sublayer adds is here.

B batch, T time (new tokens), S time with the cached tokens, C channels = n_embd, H heads,
D = C / H, V vocabulary.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.config import GPTConfig
from gpt2.ops import Ops, select_ops


class KVCache:
    """Keys and values of all layers for the `length` tokens seen so far, `capacity` at most.

    Attention sees the part in use. fixed: it sees all, under a mask, and the place to write is a
    tensor on the device, so that all steps are the same operations on the same memory, as CUDA
    graphs need.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, device, dtype, fixed: bool = False
    ):
        c = config
        shape = (c.n_layer, 2, batch_size, c.n_head, capacity, c.n_embd // c.n_head)
        self.keys_values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity, self.fixed, self.length = capacity, fixed, 0
        # The same number on the device; only kept up to date where fixed.
        self.end = torch.zeros(1, dtype=torch.int64, device=device)
        self.position, self.mask = self.end, None  # of the tokens that are being added

    def begin(self, n_new: int, doc_start: Tensor | None) -> Tensor:
        """Prepares for n_new tokens, doc_start (B, n_new); returns their positions (n_new,)."""
        device, self.mask = self.keys_values.device, None
        start = self.end if self.fixed else self.length
        self.position = start + torch.arange(n_new, device=device)
        n_keys = self.capacity if self.fixed else self.length + n_new
        # Without a mask: one token that sees all keys, or a first call, which is causal.
        if self.fixed or doc_start is not None or 1 < n_new < n_keys:
            key = torch.arange(n_keys, device=device)
            visible = (key <= self.position[:, None])[None]  # (1, T, S)
            if doc_start is not None:
                visible = visible & (key >= doc_start[..., None])  # (B, T, S)
            self.mask = visible[:, None]
        return self.position

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v (B, H, T, D) of one layer; returns what attention is to see, (B, H, S, D)."""
        keys, values = self.keys_values[layer, 0], self.keys_values[layer, 1]  # (B, H, capacity, D)
        if self.fixed:
            keys.index_copy_(2, self.position, k.to(keys.dtype))
            values.index_copy_(2, self.position, v.to(values.dtype))
            return keys, values
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, n_new: int) -> None:
        """The tokens that were begun are part of the cache now."""
        self.length += n_new
        if self.fixed:
            self.end += n_new

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows of the batch, or repeats them; rows (B',) int64."""
        self.keys_values = self.keys_values.index_select(2, rows)


class LayerNorm(nn.Module):
    """Layer norm, optionally of x + residual, and with an optional bias."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return self.ops.layer_norm(x, self.weight, self.bias, residual=residual)


class Linear(nn.Linear):
    """nn.Linear by the operations of ops, which has faster ones on a CPU."""

    def __init__(self, n_in: int, n_out: int, bias: bool, ops: Ops):
        super().__init__(n_in, n_out, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding by the operations of ops, as Linear is."""

    def __init__(self, n: int, width: int, ops: Ops):
        super().__init__(n, width)
        self.ops = ops

    def forward(self, idx: Tensor) -> Tensor:
        return self.ops.embedding(idx, self.weight)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias, ops)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, ops)
        self.dropout = nn.Dropout(config.dropout)
        self.n_head, self.layer, self.ops = config.n_head, layer, ops

    def forward(self, x: Tensor, doc_start: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if cache is None:
            y = self.ops.attention(qkv, doc_start=doc_start)  # (B, T, H, D)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
            y = self.ops.cached_attention(q, k, v, cache.mask)  # (B, T, H, D)
        return self.dropout(self.c_proj(y.reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias, ops)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, ops)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = F.gelu if config.exact_gelu else ops.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """x = x + attn(ln_1(x)); x = x + mlp(ln_2(x)), each addition fused into the next layer norm.

    So a block hands on the residual stream x and, apart from it, the branch still to be added.
    """

    def __init__(self, config: GPTConfig, ops: Ops, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = CausalSelfAttention(config, ops, layer)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self, x: Tensor, branch: Tensor | None, doc_start: Tensor | None, cache: KVCache | None
    ):
        h, x = (self.ln_1(x), x) if branch is None else self.ln_1(branch, residual=x)
        branch = self.attn(h, doc_start, cache)
        h, x = self.ln_2(branch, residual=x)
        return x, self.mlp(h)


class GPT(nn.Module):
    """A GPT-2 of the given shape, with GPT-2's initialisation.

    ops: "auto" (decided by device), "triton", "torch" or an Ops; see gpt2.ops.
    """

    def __init__(self, config: GPTConfig, ops: str | Ops = "auto", device="cpu"):
        super().__init__()
        ops = select_ops(ops, device, config.n_embd // config.n_head)
        self.config, self.ops = config, ops
        self.origin: dict | None = None  # {"path", "xxh3_128"} of what a run started from
        self.n_tokens = config.vocab_size  # ids that the tokenizer has: no others are generated
        # Training keeps only what enters each block, and computes the rest again going backward.
        self.activation_checkpointing = False
        self.stream = torch.float32  # bfloat16: under autocast the residual stream is that, too
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.padded_vocab_size, config.n_embd, ops),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer)),
            ln_f=LayerNorm(config, ops),
        ))  # fmt: skip
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, False, ops)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()
        self.to(device)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices and embeddings N(0, 0.02), biases 0, layer norms 1, the vocabulary's padding 0.

        The projections back into the residual stream are smaller by sqrt(2 n_layer), so that its
        variance does not grow with depth (GPT-2 paper, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    def hidden(self, idx: Tensor, *, cache=None, doc_start=None) -> Tensor:
        """What the head sees: ln_f's output, (B, T, C). Arguments as in forward."""
        T, past = idx.shape[1], 0 if cache is None else cache.length
        if past + T > self.config.block_size:
            words = f"{past + T} tokens do not fit the context of {self.config.block_size}"
            raise ValueError(f"{words} (block_size): shorten the prompt or generate fewer tokens")
        position = cache.begin(T, doc_start) if cache else torch.arange(T, device=idx.device)
        if doc_start is not None:
            position = position - doc_start  # (B, T): each document starts at position 0
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x, branch = self.transformer.drop(x), None
        if self.stream != torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.stream)
        again = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.transformer.h:
            inputs = (x, branch, doc_start, cache)
            x, branch = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        h, _ = self.transformer.ln_f(branch, residual=x)
        if cache is not None:
            cache.advance(T)
        return h

    def forward(
        self, idx: Tensor, *, cache: KVCache | None = None, doc_start: Tensor | None = None
    ) -> Tensor:
        """Logits of the token that follows each position.

        idx (B, T) int64.  cache: the tokens before idx; idx is appended to it.
        doc_start (B, T) int32: the first position each query may see, counted from the cache's
        start; positions are embedded relative to it. For packed documents and left-padded prompts.
        Returns (B, T, V).  Raises ValueError where the tokens do not fit block_size.
        """
        return self.logits(self.hidden(idx, cache=cache, doc_start=doc_start))

    def logits(self, h: Tensor) -> Tensor:
        """The head on hidden states (..., C): (..., V), without the vocabulary's padding."""
        return self.lm_head(h)[..., : self.config.vocab_size]

    def set_dropout(self, p: float) -> None:
        """Changes the dropout of a model that was loaded."""
        self.config = replace(self.config, dropout=p)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def n_params(self) -> int:
        """Parameters without the vocabulary's padding; 124,439,808 for gpt2."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Of a training step: 6 N + 12 L C T, where N leaves out the position embeddings.

        The attention term counts the whole T x T square. With adapters 4 N + 2 n: only the n
        trained weights have gradients. Source: PaLM (arXiv 2204.02311), appendix B.
        """
        c, n = self.config, self.n_params() - self.transformer.wpe.weight.numel()
        n_trained = n
        if not self.lm_head.weight.requires_grad:
            n_trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return 4 * n + 2 * n_trained + 12 * c.n_layer * c.n_embd * c.block_size


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a model and their shapes without padding; takes no memory for them."""
    with torch.device("meta"):
        model = GPT(replace(config, n_layer=1), "torch", "meta")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes["transformer.wte.weight"] = (config.vocab_size, config.n_embd)
    return {
        name.replace(".h.0.", f".h.{layer}."): shape
        for name, shape in shapes.items()
        for layer in range(config.n_layer if ".h.0." in name else 1)
    }
