"""A fast, exact and readable trainer for GPT-2-class models.

model = gpt2.load_model("gpt2")
tokens = gpt2.generate(model, [[15496, 11]], max_new_tokens=20)
text = gpt2.load_tokenizer("gpt2").decode(tokens[0])
"""

import importlib
import os
import sys
import types

__version__ = "0.1.0"
_HOMES = {
    "GPT": "model", "GPTConfig": "config", "PRESETS": "config", "load_model": "checkpoint",
    "load_tokenizer": "checkpoint",
}  # fmt: skip
__all__ = [*_HOMES, "generate"]


class _Face(types.ModuleType):
    """Imports what it offers when that is first used, since importing torch takes seconds."""

    def __getattr__(self, name: str):
        if name not in _HOMES:
            raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
        return getattr(importlib.import_module(f"gpt2.{_HOMES[name]}"), name)

    @property
    def generate(self):
        return importlib.import_module("gpt2.generate").generate

    @generate.setter
    def generate(self, module):
        """Nothing: importing the module of this name is not to hide the function."""


# Waiting threads sleep soon instead of spinning: on a busy CPU steps are several times faster, on a
# quiet one as fast (docs/LOG.md). OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.modules[__name__].__class__ = _Face
