"""The training loop and what it needs."""

from gpt2.train.schedule import learning_rate

__all__ = ["learning_rate"]
