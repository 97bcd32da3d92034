"""Whether shards still hold what the manifest beside them says: sizes, and hashes of the content.

A manifest has, under splits / <split> / shards, for each file

    {"file": ..., "tokens": ..., "bytes": ..., "sha256": ..., "xxh3_64_of_4MiB": [...]}

The last, optional, is a hash of each block of 4 MiB: where it is there, it is used, because it
takes a fraction of SHA-256's time and says where the damage is.
"""

import errno
import hashlib
import re
import threading
from pathlib import Path

import xxhash

from gpt2.data.shards import Shard, read_manifest

BLOCK_BYTES = 1 << 22
BLOCK_KEY = "xxh3_64_of_4MiB"


class Verifier:
    """Checks shards against their manifests: their sizes at once, their content as `verify` says.

    verify: "off", nothing. "open", all content at once. "background", all content in a thread that
    check() starts and whose first finding it raises from then on.
    share: (i, n) leaves the content of all shards but every n-th from the i-th on to others.
    Attributes: n_shards, n_known (those whose hashes are known).
    Raises ValueError (another file than the manifest's, damaged content or manifest, "open" without
    hashes, unknown `verify`), OSError.
    """

    def __init__(self, shards: list[Shard], verify: str, share: tuple[int, int] = (0, 1)):
        if verify not in ("off", "background", "open"):
            raise ValueError(f"unknown verify {verify!r}: use off, background or open")
        self._found: Exception | None = None
        self._thread: threading.Thread | None = None
        self._todo: list[tuple[str, dict]] = []
        self._lock = threading.Lock()
        known = _match(shards) if verify != "off" else {}
        self.n_shards, self.n_known = len(shards), len(known)
        if verify == "open":
            for shard in shards:
                if shard.path not in known:
                    raise ValueError(
                        f"{shard.path}: verify is open, but the manifest beside it has no hash of "
                        "it; prepare the data again, or use verify: background"
                    )
        mine = [s.path for s in shards if s.path in known][share[0] :: share[1]]
        self._todo = [(path, known[path]) for path in mine]
        if verify == "open":
            for path, record in self._todo:
                check_content(path, record)
            self._todo = []

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

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread to have read everything."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            for path, record in self._todo:
                check_content(path, record)
        except (ValueError, OSError) as error:
            self._found = error


def check_content(path: str | Path, record: dict) -> None:
    """Compares a file with its manifest's record, block by block in constant memory.

    Raises ValueError with file and offset where the content differs, OSError where it cannot be
    read.
    """
    blocks, sha256 = record.get(BLOCK_KEY), hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for start in range(0, record["bytes"], BLOCK_BYTES):
            block = _read(file, min(BLOCK_BYTES, record["bytes"] - start), path)
            if blocks is None:
                sha256.update(block)
            elif xxhash.xxh3_64_hexdigest(block) != blocks[start // BLOCK_BYTES]:
                raise _damaged(path, f"between bytes {start} and {start + len(block)}")
    if blocks is None and sha256.hexdigest() != record["sha256"]:
        raise _damaged(path, "somewhere")


def _damaged(path: str | Path, where: str) -> ValueError:
    return ValueError(
        f"{path}: its content changed {where} since it was prepared (another hash than in "
        "manifest.json): prepare or copy it again"
    )


def _read(file, size: int, path: str | Path) -> bytes:
    parts = []
    while size:
        part = file.read(size)
        if not part:
            raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _match(shards: list[Shard]) -> dict[str, dict]:
    """The manifests' record of each shard that has one, by path; checks sizes and token counts."""
    folders = {folder: manifest_records(folder) for folder in {Path(s.path).parent for s in shards}}
    known = {}
    for shard in shards:
        path = Path(shard.path)
        record = folders[path.parent].get(path.name)
        if record is None:
            continue
        found = {"tokens": shard.n_tokens, "bytes": path.stat().st_size}
        for key, value in found.items():
            if record[key] != value:
                raise ValueError(
                    f"{path}: has {value} {key}, but manifest.json says {record[key]}: another "
                    "file than the one that was prepared; prepare or copy it again"
                )
        known[shard.path] = record
    return known


def manifest_records(folder: str | Path) -> dict[str, dict]:
    """The record of each shard in a folder's manifest, by file name; none without a manifest.

    Raises ValueError for a manifest that is damaged.
    """
    manifest, records = read_manifest(folder), {}
    if manifest is None or "splits" not in manifest:
        return records
    try:
        for split in manifest["splits"].values():
            for record in split["shards"]:
                _check_record(record)
                records[record["file"]] = record
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder) / 'manifest.json'}: damaged ({error!r}); prepare the data again"
        ) from error
    return records


def _check_record(record: dict) -> None:
    for key, kind in (("file", str), ("tokens", int), ("bytes", int), ("sha256", str)):
        if type(record[key]) is not kind:
            raise ValueError(f"{key} is {record[key]!r}")
    if Path(record["file"]).name != record["file"]:
        raise ValueError(f"file is {record['file']!r}, not a file's name")
    if not re.fullmatch("[0-9a-f]{64}", record["sha256"]):
        raise ValueError(f"sha256 is {record['sha256']!r}")
    blocks = record.get(BLOCK_KEY)
    if blocks is None:
        return
    if not isinstance(blocks, list) or len(blocks) != -(-record["bytes"] // BLOCK_BYTES):
        raise ValueError(f"{BLOCK_KEY} of {record['file']} is not a list of a hash a block")
    for block in blocks:
        if not isinstance(block, str) or not re.fullmatch("[0-9a-f]{16}", block):
            raise ValueError(f"{BLOCK_KEY} of {record['file']} holds {block!r}")
