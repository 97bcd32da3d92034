"""AdamW and what it trains."""

import torch

from gpt2.config import TrainConfig
from gpt2.model import GPT


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
