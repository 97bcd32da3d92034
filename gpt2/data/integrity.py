"""Whether shards still hold what the manifest beside them says, and what data they are.

gpt2.data.shards compares names, sizes and token counts with the manifest; here it is the content.
A record's hashes of 4 MiB blocks are used where it has them, since they take a fraction of
SHA-256's time and say where the damage is.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock, Thread

import xxhash

from gpt2.data import shards as layout
from gpt2.data.shards import BLOCK_BYTES, BLOCK_KEY, Shard, folder_tokenizer, manifest_records

SAMPLES, SAMPLE_BYTES = 64, 4096  # of a shard that no manifest knows


class Verifier:
    """Compares the content of shards with their manifests, in a thread that check() starts.

    share: (i, n) leaves all shards but every n-th from the i-th on to others; None: nothing is
    compared. Shards that no manifest lists are left out. Raises ValueError (damaged manifest).
    """

    def __init__(self, shards: list[Shard], share: tuple[int, int] | None):
        self._todo: list[tuple[str, dict]] = []
        if share is not None:
            first, step = share
            recorded = [pair for _, group in _recorded(shards) for pair in group]
            self._todo = [(s.path, record) for s, record in recorded if record][first::step]
        self._found: Exception | None = None
        # It reads files by name and holds on to no loader; it ends with the process.
        self._thread, self._once = Thread(target=self._run, daemon=True), Lock()

    def check(self) -> None:
        """Starts the thread, once; raises ValueError or OSError for what it has found."""
        if self._todo and self._once.acquire(blocking=False):
            self._thread.start()
        if self._found is not None:
            raise self._found

    def finish(self, timeout_s: float | None = None) -> None:
        """Waits until everything was read, or not longer than that; raises as check() does."""
        self.check()
        if self._todo:
            self._thread.join(timeout_s)
        self.check()

    def _run(self) -> None:
        try:
            for path, record in self._todo:
                for problem in content_problems(path, record):
                    raise ValueError(problem)
        except (ValueError, OSError) as error:
            self._found = error


def content_problems(path: str | Path, record: dict) -> Iterator[str]:
    """Where a file differs from its record, block by block in constant memory. Raises OSError."""

    def damaged(where: str) -> str:
        return (
            f"{path}: damaged{where}, or its record is: its content is not what manifest.json "
            "says; prepare or copy it again"
        )

    blocks, whole, size = record.get(BLOCK_KEY), hashlib.sha256(), 0
    with open(path, "rb") as file:
        for number, block in enumerate(iter(partial(file.read, BLOCK_BYTES), b"")):
            start, size = size, size + len(block)
            if blocks is None:
                whole.update(block)
            elif blocks[number : number + 1] != [xxhash.xxh3_64_hexdigest(block)]:
                yield damaged(f" between offsets {start} and {size}")
    if size != record["bytes"] or (blocks is None and whole.hexdigest() != record["sha256"]):
        yield damaged(f": {size} bytes of {record['bytes']}")


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared folder, each with file and offset; an empty list if nothing.

    A folder of shards without a manifest (nanoGPT's, llm.c's) has its headers and sizes checked.
    Raises OSError (no such folder, no shards) and ValueError (damaged manifest).
    """
    folder = Path(folder)
    listing = {split: layout.list_shards(folder, split) for split in ("train", "val")}
    if not any(map(any, listing.values())):
        layout.find_shards(folder, "train")  # raises
    problems = []
    for files, found in listing.values():
        problems += found
        for path, record in files.items():
            try:
                layout.open_recorded(path, record)
                problems += content_problems(path, record) if record else ()
            except (ValueError, OSError) as error:
                text = str(error)
                problems.append(text if str(path) in text else f"{path}: {text}")
    return problems


def identity(shards: list[Shard]) -> list[dict]:
    """What tokens these are: for each folder {"path", "tokens", "tokenizer", "hash"}.

    The hash covers the shards in order: by the manifest's hashes, or else by size and a sample of
    SAMPLES blocks. tokenizer: its name and a hash of its description; None where nothing says.
    Raises ValueError (damaged manifest), OSError.
    """
    found = []
    for folder, group in _recorded(shards):
        digest, tokens, tokenizer = xxhash.xxh3_128(), 0, folder_tokenizer(folder)
        for shard, record in group:
            if record is None:
                content = _sample(shard.path)
            else:
                content = "".join(record.get(BLOCK_KEY) or record["sha256"])
            digest.update(f"{shard.n_tokens} {content}\n".encode())
            tokens += shard.n_tokens
        if tokenizer is not None:
            text = json.dumps(tokenizer, sort_keys=True).encode()
            tokenizer = f"{tokenizer.get('name', '')} {xxhash.xxh3_64_hexdigest(text)}".strip()
        entry = {"path": str(folder), "tokens": tokens, "hash": digest.hexdigest()}
        found.append(entry | {"tokenizer": tokenizer})
    return found


def _recorded(shards: list[Shard]) -> Iterator[tuple[Path, list[tuple[Shard, dict | None]]]]:
    """Each folder with its shards, and the record of each in the manifest there, if it has one."""
    for folder, group in groupby(shards, lambda shard: Path(shard.path).parent):
        records = manifest_records(folder)
        yield folder, [(shard, records.get(Path(shard.path).name)) for shard in group]


def _sample(path: str) -> str:
    size, digest = os.path.getsize(path), xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        for i in range(SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size} {digest.hexdigest()}"
