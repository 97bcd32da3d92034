"""The training loop and what it needs."""

from gpt2.train.between import learning_rate

__all__ = ["learning_rate"]
