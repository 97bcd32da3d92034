"""AdamW and the learning rate schedules."""

import math

import torch

from gpt2.config import TrainConfig
from gpt2.model import GPT


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Rises linearly to lr over warmup_steps, then by schedule:
        cosine, linear   fall from lr to min_lr at max_steps
        constant         stays at lr
        wsd              stays at lr, then falls linearly over the last decay_fraction of max_steps
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - config.decay_fraction)))
    progress = min(max(step - start, 0) / max(config.max_steps - start, 1), 1.0)
    share = (
        0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    )
    return config.min_lr + share * (config.lr - config.min_lr)


def parameter_groups(model: GPT, config: TrainConfig) -> list[dict]:
    """What is trained: matrices and embeddings decay, biases and layer norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(model: GPT, config: TrainConfig, kind=torch.optim.AdamW) -> torch.optim.AdamW:
    """Fused AdamW of parameter_groups; kind: what is called with AdamW's arguments."""
    betas = (config.beta1, config.beta2)
    return kind(parameter_groups(model, config), config.lr, betas, fused=True)
