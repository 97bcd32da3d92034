"""Tokens on disk and how they reach the model."""

from gpt2.data.loader import TokenLoader
from gpt2.data.shards import find_shards, open_shards, read_manifest, write_shard

__all__ = ["TokenLoader", "find_shards", "open_shards", "read_manifest", "write_shard"]
