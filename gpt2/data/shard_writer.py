"""One stream of tokens into shards of equal size, in a way that can be interrupted."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import xxhash

from gpt2.data.shards import BLOCK_BYTES, BLOCK_KEY, HEADER_BYTES, shard_header
from gpt2.storage import sync, write_text


class ShardWriter:
    """Appends tokens to the shards of a split: <split>_000000.bin, <split>_000001.bin, ...

    split: None makes the first shard val_000000.bin and the rest train_000001.bin, ...
    shards: (split, the manifest's record) of the finished ones.
    """

    def __init__(self, folder: Path, split: str | None, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[tuple[str, dict]] = []
        self.n_tokens = self.n_documents = 0  # finished and open
        self._file = None
        self._tokens = self._documents = 0  # in the open shard

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> bool:
        """Writes tokens (n,) uint16; starts (m,): where documents start. Whether a shard got full.

        Raises OSError (no room).
        """
        finished, at = False, 0
        self.n_tokens += len(tokens)
        self.n_documents += len(starts)
        while at < len(tokens):
            if self._file is None:
                self._file = self._open("wb")
                self._write(bytes(HEADER_BYTES))
            end = min(len(tokens), at + self.shard_tokens - self._tokens)
            self._write(tokens[at:end].data)
            self._tokens += end - at
            self._documents += int(np.searchsorted(starts, end) - np.searchsorted(starts, at))
            at = end
            if self._tokens == self.shard_tokens:
                self.close()
                finished = True
        return finished

    def state(self) -> dict:
        """What resume() takes; it counts once sync() has followed."""
        return {"shards": list(self.shards), "tokens": self._tokens, "documents": self._documents}

    def sync(self) -> None:
        """Makes what was written durable. Raises OSError."""
        if self._file is not None:
            # By name: an interrupt within close() may have closed it before it was synced.
            sync(self.folder / self._name()[1])

    def abandon(self) -> None:
        """Lets go of the open file, whatever state it is in."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def resume(self, state: dict) -> None:
        """Goes on from a state. Raises ValueError where the files are not as it has them.

        They may hold more than the state counts: that is written again.
        """
        self.shards = [tuple(shard) for shard in state["shards"]]
        for _, shard in self.shards:
            self._check_size(shard["file"], shard["bytes"], shard["bytes"])
        self._tokens, self._documents = state["tokens"], state["documents"]
        self.n_tokens = self._tokens + sum(s["tokens"] for _, s in self.shards)
        self.n_documents = self._documents + sum(s["documents"] for _, s in self.shards)
        if self._tokens:
            size = HEADER_BYTES + 2 * self._tokens
            self._check_size(self._name()[1], size)
            self._file = self._open("r+b")
            self._file.truncate(size)
            self._file.seek(size)

    def close(self) -> None:
        """Ends the open shard, if any: its header, its hashes. Raises OSError."""
        if self._file is None:
            return
        split, name = self._name()
        with self._file as file:
            file.seek(0)
            self._write(shard_header(self._tokens))
            os.fsync(file.fileno())
            record = {"file": name, "tokens": self._tokens, "documents": self._documents}
            self.shards.append((split, record | file_hashes(self.folder / name)))
        self._file, self._tokens, self._documents = None, 0, 0

    def _name(self) -> tuple[str, str]:
        split = self.split or ("train" if self.shards else "val")
        return split, f"{split}_{len(self.shards):06}.bin"

    def _open(self, mode: str):
        # Without a buffer: what state() counts is written, also when the next write fails.
        return open(self.folder / self._name()[1], mode, buffering=0)

    def _write(self, data) -> None:
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            problem = (f"{error.strerror} after {self.n_tokens:,} tokens. Make room, and the same "
                       "command goes on from there")  # fmt: skip
            raise OSError(error.errno, problem, str(self.folder)) from error

    def _check_size(self, name: str, least: int, most: float = math.inf) -> None:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else -1
        if not least <= found <= most:
            state = "is missing" if found < 0 else f"has {found}"
            raise ValueError(
                f"{path}: should have {least} bytes and {state}: delete {self.folder} and start "
                "again"
            )


def file_hashes(path: Path) -> dict:
    """The part of a shard's record that is of its file: bytes, sha256, xxh3_64 of each 4 MiB."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            size += len(block)
    return {"bytes": size, "sha256": whole.hexdigest(), BLOCK_KEY: blocks}


def as_splits(names: tuple[str, ...], shards: list[tuple[str, dict]]) -> dict:
    """The manifest's splits, from (split, record) of their shards."""
    found = {name: [record for split, record in shards if split == name] for name in names}
    return {
        name: {key: sum(r[key] for r in records) for key in ("tokens", "documents")}
        | {"shards": records} for name, records in found.items()
    }  # fmt: skip


def write_json(path: Path, value) -> None:
    """Writes a file that is complete, durable and under its name, or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_text(temporary, json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
    sync(path.parent)
