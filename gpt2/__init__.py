"""A fast, exact and readable trainer for GPT-2-class models.

model = gpt2.load_model("gpt2")
tokens = gpt2.generate(model, [[15496, 11]], max_new_tokens=20)
"""

from gpt2.checkpoint import load_model
from gpt2.config import PRESETS, GPTConfig
from gpt2.generate import generate
from gpt2.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "PRESETS", "GPTConfig", "generate", "load_model"]
