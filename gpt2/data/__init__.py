"""Tokens on disk and how they reach the model."""

import importlib

_HOMES = {
    "Mixture": "mixture", "TokenLoader": "loader", "find_shards": "shards", "open_shards": "shards",
    "read_manifest": "shards", "write_shard": "shards",
}  # fmt: skip
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Imports what is offered here when it is first used, since importing torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpt2.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gpt2.data.{_HOMES[name]}"), name)
