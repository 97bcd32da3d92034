"""Token shards that people share on the Hugging Face hub, in llm.c's format."""

import re
from pathlib import Path

import numpy as np

from gpt2.data.datasets import Dataset
from gpt2.data.files import train_extra
from gpt2.data.shard_writer import file_hashes
from gpt2.data.shards import open_shards

EOT = 50256  # these are all GPT-2 tokens


def fetch_shards(dataset: Dataset, commit: str, folder: Path, n_train: int) -> dict:
    """Downloads val and n_train shards, unless they are here; returns the manifest's splits.

    A file in the folder is complete: a download ends with its renaming. Raises ImportError, OSError
    (no network, no room) and ValueError (not a shard; it alone is removed).
    """
    hub = train_extra("huggingface_hub", "the hub's files")
    prefix = re.match(r".*/(\w+?)10B", dataset.source).group(1)
    names = [("val", 0)] + [("train", i) for i in range(1, n_train + 1)]
    splits = {s: {"tokens": 0, "documents": 0, "shards": []} for s in ("train", "val")}
    for done, (split, number) in enumerate(names):
        path = folder / f"{prefix}_{split}_{number:06}.bin"
        if not path.exists():
            print(f"fetching {path.name}, {done} of {len(names)} are here", flush=True)
            try:
                hub.hf_hub_download(
                    dataset.source, path.name, repo_type="dataset", local_dir=folder,
                    revision=commit,
                )  # fmt: skip
            except Exception as error:  # whatever the network libraries of the hub raise
                raise OSError(
                    f"{dataset.source}: {path.name} cannot be fetched ({error}); check the network "
                    "(and HF_HUB_OFFLINE); the same command goes on from there"
                ) from error
        try:
            (shard,) = open_shards(path)
        except ValueError as error:
            path.unlink()
            raise ValueError(f"{error}; it was removed, run the same command again") from error
        record = {
            "file": path.name, "tokens": shard.n_tokens,
            "documents": int(np.count_nonzero(shard.tokens() == EOT)),
        }  # fmt: skip
        splits[split]["shards"].append(record | file_hashes(path))
        for key in ("tokens", "documents"):
            splits[split][key] += record[key]
    return splits
