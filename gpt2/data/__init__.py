"""Tokens on disk and how they reach the model."""

from gpt2.data.loader import TokenLoader
from gpt2.data.mixture import Mixture
from gpt2.data.shards import find_shards, open_shards, read_manifest, write_shard

__all__ = [
    "Mixture", "TokenLoader", "find_shards", "open_shards", "read_manifest", "write_shard"
]  # fmt: skip
