"""What benchmarks/train_step.py measures: this project's trainer, and what it is compared with.

A contestant has step(), which does one optimizer step without waiting for the device, and
waited_s, the seconds that its steps waited for data. All train GPT-2 of the same shape from random
weights, in the same precision, on rows x accum rows of T tokens a step, with fused AdamW and
clipped gradients.

    trainer     gpt2.train.trainer.Trainer: its own train_step, its feed, its guard
    pytorch     plain PyTorch as nanoGPT's train.py does it, written anew: torch.compile of one
                module, SDPA (cuDNN's where it runs), F.cross_entropy on whole logits, a random
                window of a memory map for each row
    nanogpt     model.py of a nanoGPT checkout, in the loop of the second
"""

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2 import dist
from gpt2.cli import coerce
from gpt2.config import PRESETS, GPTConfig, TrainConfig
from gpt2.data import write_shard
from gpt2.train.pretrain import pretraining
from gpt2.train.trainer import Trainer

SDPA = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
LR, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Setup:
    """What is the same for all contestants."""

    preset: str
    rows: int  # of T tokens in one forward pass
    accum: int  # forward passes in a step
    device: str
    dtype: str  # bfloat16 or float32, of matmuls
    compile: bool
    kernels: str  # of the trainer
    data: str  # folder with train_000000.bin
    nanogpt: str  # a checkout, for the contestant of that name
    options: Sequence[str] = ()  # further options of TrainConfig, as name=value
    length: int = 0  # of rows, if not the preset's block_size

    @property
    def shape(self) -> GPTConfig:
        shape = PRESETS[self.preset]
        return replace(shape, block_size=self.length or shape.block_size)

    @property
    def tokens(self) -> int:
        return self.rows * self.accum * self.shape.block_size


def write_data(folder: Path, vocab_size: int, n_tokens: int) -> None:
    """Random tokens as one shard: how long a step takes does not depend on them.

    Its manifest names that many characters as the tokenizer, which needs no further package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, n_tokens)
    write_shard(folder / "train_000000.bin", tokens)
    chars = "".join(chr(i + (2048 if i >= 0xD800 else 0)) for i in range(vocab_size))
    manifest = {"tokenizer": {"name": "char", "chars": chars}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def make(name: str, setup: Setup):
    """The contestant. Raises OSError for a missing checkout of nanoGPT."""
    torch.manual_seed(1337)
    if name == "trainer":
        return OurTrainer(setup)
    if setup.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # as the trainer does
    plain = PlainGPT(setup.shape) if name == "pytorch" else nanogpt(setup.nanogpt, setup.shape)
    return PlainLoop(setup, plain)


class OurTrainer:
    """The project's trainer, step by step, as its own loop calls it."""

    def __init__(self, setup: Setup):
        config = TrainConfig(
            preset=setup.preset, data=setup.data, tokens_per_step=setup.tokens,
            block_size=setup.shape.block_size,
            micro_batch_size=setup.rows, max_steps=1_000_000, lr=LR, weight_decay=WEIGHT_DECAY,
            beta1=BETAS[0], beta2=BETAS[1], grad_clip=CLIP, eval_every=0, save_every=0,
            device=setup.device, dtype=setup.dtype, kernels=setup.kernels,
            compile="on" if setup.compile else "off",
        )  # fmt: skip
        if setup.options:  # spelled as in YAML files
            import yaml

            options = yaml.safe_load("\n".join(o.replace("=", ": ", 1) for o in setup.options))
            config = replace(config, **coerce(TrainConfig, options, "--option"))
        group = dist.start(config.device)
        parts = pretraining(config, group)
        self.trainer = Trainer(
            config, parts.objective, parts.train_data, None, parts.tokenizer, group
        )
        self.trainer.choose_products()
        self.details = {"kernels": parts.objective.model.ops.describe()}

    @property
    def waited_s(self) -> float:
        return self.trainer.train_feed.waited_s

    def step(self) -> None:
        self.trainer.train_step(self.trainer.step)
        self.trainer.step += 1
        self.trainer.guard.verdicts()  # reads the step before, as the loop does

    def close(self) -> float:
        """Ends its threads; returns the last loss."""
        last = self.trainer.guard.verdicts(all_steps=True)[-1].loss
        self.trainer.train_feed.close()
        return last


class PlainLoop:
    """nanoGPT's loop: model(idx, targets) -> (logits, loss), the next batch fetched meanwhile."""

    def __init__(self, setup: Setup, model: nn.Module):
        self.setup, self.model = setup, model.to(setup.device)
        self.forward = torch.compile(model) if setup.compile else model
        decay = [p for p in model.parameters() if p.dim() >= 2]
        plain = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": WEIGHT_DECAY},
                  {"params": plain, "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, LR, BETAS, fused=True)
        self.details, self.waited_s, self.random = {}, 0.0, np.random.default_rng(1)
        self.batch = self._fetch()

    def _fetch(self) -> list[Tensor]:
        T, device = self.setup.shape.block_size, torch.device(self.setup.device)
        path = Path(self.setup.data) / "train_000000.bin"
        data = np.memmap(path, np.uint16, "r", offset=1024)  # opened anew, as nanoGPT does
        starts = self.random.integers(0, len(data) - T, self.setup.rows)
        rows = [torch.from_numpy(data[i : i + T + 1].astype(np.int64)) for i in starts]
        pair = [torch.stack([row[k : T + k] for row in rows]) for k in (0, 1)]
        if device.type == "cuda":
            pair = [part.pin_memory().to(device, non_blocking=True) for part in pair]
        return pair

    def step(self) -> None:
        kind, in_bf16 = torch.device(self.setup.device).type, self.setup.dtype == "bfloat16"
        for _ in range(self.setup.accum):
            autocast = torch.autocast(kind, torch.bfloat16, enabled=in_bf16)
            with autocast, sdpa_kernel(SDPA, set_priority=True):
                loss = self.forward(*self.batch)[1] / self.setup.accum
            started = time.perf_counter()
            self.batch = self._fetch()  # while the device is at the forward pass
            self.waited_s += time.perf_counter() - started
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach() * self.setup.accum

    def close(self) -> float:
        return self.loss.item()


class PlainGPT(nn.Module):
    """GPT-2 in plain PyTorch: what a compiled, careful reimplementation has."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, V = config.n_embd, config.padded_vocab_size
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(position)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.heads = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn_in, self.attn_out = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
        self.mlp_in, self.mlp_out = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.attn_in(self.ln_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


def nanogpt(checkout: str | Path, shape: GPTConfig) -> nn.Module:
    path = Path(checkout) / "model.py"
    if not path.exists():
        raise OSError(2, "no model.py of nanoGPT here; name a checkout with --nanogpt", str(path))
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "n_layer", "n_head", "n_embd", "bias")
    options = {name: getattr(shape, name) for name in names}
    config = module.GPTConfig(vocab_size=shape.padded_vocab_size, dropout=0.0, **options)
    return module.GPT(config)


def timed_steps(step: Callable[[], None], n: int, device: torch.device) -> list[float]:
    """Milliseconds of n steps in a row; a GPU is waited for only at the end."""
    on_gpu, times = device.type == "cuda", []
    for i in range(n + 1):
        if i:
            step()
        times.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            times[-1].record()
    if on_gpu:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) if on_gpu else (b - a) * 1e3 for a, b in pairwise(times)]
