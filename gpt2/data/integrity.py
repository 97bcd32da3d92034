"""Whether shards still hold what the manifest beside them says, and what data they are.

gpt2.data.shards describes the manifest and compares names, sizes and token counts with it; here it
is the content. A record's hashes of 4 MiB blocks are used where it has them, since they take a
fraction of SHA-256's time and say where the damage is.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import xxhash

from gpt2.data.shards import (
    BLOCK_BYTES,
    BLOCK_KEY,
    Shard,
    find_shards,
    folder_tokenizer,
    listing_problems,
    manifest_records,
    open_recorded,
    open_shards,
    split_files,
)  # fmt: skip

SAMPLES, SAMPLE_BYTES = 64, 4096  # of a shard that no manifest knows


class Verifier:
    """Compares the content of shards with their manifests, as `verify` says.

    verify: "off", not at all. "open", at once. "background", in a thread that check() starts and
    whose first finding it raises from then on.
    share: (i, n) leaves all shards but every n-th from the i-th on to others.
    Attributes: n_shards, n_known (those whose hashes are known).
    Raises ValueError (damaged content or manifest, "open" without hashes, unknown `verify`),
    OSError.
    """

    def __init__(self, shards: list[Shard], verify: str, share: tuple[int, int] = (0, 1)):
        if verify not in ("off", "background", "open"):
            raise ValueError(f"unknown verify {verify!r}: use off, background or open")
        known = list(_recorded(shards)) if verify != "off" else []
        todo = [(shard.path, record) for shard, record in known if record is not None]
        self.n_shards, self.n_known = len(shards), len(todo)
        if verify == "open" and self.n_known < self.n_shards:
            path = next(shard.path for shard, record in known if record is None)
            raise ValueError(
                f"{path}: verify is open, but the manifest beside it has no hash of it; prepare "
                "the data again, or use verify: background"
            )
        self._todo = todo[share[0] :: share[1]]
        self._found: Exception | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        if verify == "open":
            self._run()
            self._todo = []
            self.check()

    def check(self) -> None:
        """Starts the thread, once, where there is something for it to do; raises what it found."""
        if self._todo and self._thread is None:
            with self._lock:
                if self._thread is None:
                    # It reads files by name and holds on to no loader; it ends with the process.
                    self._thread = threading.Thread(target=self._run, daemon=True)
                    self._thread.start()
        if self._found is not None:
            raise self._found

    def finish(self, timeout_s: float | None = None) -> None:
        """Waits until everything was read, or for timeout_s; then raises as check() does."""
        self.check()
        if self._thread is not None:
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
    blocks, whole, size = record.get(BLOCK_KEY), hashlib.sha256(), 0
    with open(path, "rb") as file:
        for number, block in enumerate(iter(partial(file.read, BLOCK_BYTES), b"")):
            start, size = size, size + len(block)
            if blocks is None:
                whole.update(block)
            elif blocks[number : number + 1] != [xxhash.xxh3_64_hexdigest(block)]:
                yield _damaged(path, f" between offsets {start} and {size}")
    if size != record["bytes"] or (blocks is None and whole.hexdigest() != record["sha256"]):
        yield _damaged(path, f": {size} bytes of {record['bytes']}")


def _damaged(path: str | Path, where: str) -> str:
    return (
        f"{path}: damaged{where}, or its record is: its content is not what manifest.json says; "
        "prepare or copy it again"
    )


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared folder, each with file and offset; an empty list if nothing.

    A folder of shards without a manifest (nanoGPT's, llm.c's) has its headers and sizes checked.
    Raises OSError (no such folder, no shards) and ValueError (damaged manifest).
    """
    folder = Path(folder)
    records, problems = manifest_records(folder), []
    files = {split: split_files(folder, split) for split in ("train", "val")}
    if not records and not any(files.values()):
        find_shards(folder, "train")  # raises
    for split, paths in files.items():
        problems += listing_problems(folder, split, records)
        for path in paths:
            record = records.get(path.name)
            try:
                if record is not None:
                    open_recorded(path, record)
                    problems += content_problems(path, record)
                elif not records:
                    open_shards(path)
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
    for folder, group in groupby(_recorded(shards), lambda pair: Path(pair[0].path).parent):
        digest, tokens = xxhash.xxh3_128(), 0
        for shard, record in group:
            if record is None:
                content = _sample(shard.path)
            else:
                content = "".join(record.get(BLOCK_KEY) or record["sha256"])
            digest.update(f"{shard.n_tokens} {content}\n".encode())
            tokens += shard.n_tokens
        found.append(
            {
                "path": str(folder), "tokens": tokens, "hash": digest.hexdigest(),
                "tokenizer": _name_tokenizer(folder_tokenizer(folder)),
            }
        )  # fmt: skip
    return found


def _recorded(shards: list[Shard]) -> Iterator[tuple[Shard, dict | None]]:
    """Each shard with its record in the manifest beside it, checked as open_recorded does."""
    folders: dict[Path, dict[str, dict]] = {}
    for shard in shards:
        path = Path(shard.path)
        if path.parent not in folders:
            folders[path.parent] = manifest_records(path.parent)
        record = folders[path.parent].get(path.name)
        if record is not None:
            open_recorded(path, record)
        yield shard, record


def _sample(path: str) -> str:
    size, digest = os.path.getsize(path), xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        for i in range(SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size} {digest.hexdigest()}"


def _name_tokenizer(description: dict | None) -> str | None:
    if description is None:
        return None
    content = xxhash.xxh3_64_hexdigest(json.dumps(description, sort_keys=True).encode())
    return f"{description['name']} {content}" if "name" in description else content
