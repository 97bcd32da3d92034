"""Checks a prepared folder against its manifest: headers, sizes and hashes of every shard."""

import hashlib
from pathlib import Path

import xxhash

from gpt2.data.integrity import BLOCK_BYTES, BLOCK_KEY, manifest_records
from gpt2.data.shards import find_shards, open_shards, read_manifest


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared folder, each with file and offset; an empty list if nothing.

    A folder of shards without a manifest (nanoGPT's, llm.c's) has its headers and sizes checked.
    Raises OSError (no such folder, no shards) and ValueError (damaged manifest).
    """
    folder = Path(folder)
    there = {path.name for split in ("train", "val") for path in _found(folder, split)}
    if not there:
        find_shards(folder, "train")  # raises
    manifest = read_manifest(folder)
    if manifest is None or "splits" not in manifest:
        return [problem for name in sorted(there) for problem in _check_header(folder / name)]
    problems = []
    for name, shard in manifest_records(folder).items():
        path = folder / name
        there.discard(path.name)
        if not path.is_file():
            problems.append(f"{path}: missing, but the manifest has it")
            continue
        problems += _check_header(path) or _check_content(path, shard)
    problems += [f"{folder / name}: not in the manifest, but training would read it"
                 for name in sorted(there)]  # fmt: skip
    return problems


def _found(folder: Path, split: str) -> list[Path]:
    try:
        return find_shards(folder, split)
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        return []


def _check_header(path: Path) -> list[str]:
    try:
        open_shards(path)
    except (ValueError, OSError) as error:
        text = str(error)
        return [text if str(path) in text else f"{path}: {text}"]
    return []


def _check_content(path: Path, shard: dict) -> list[str]:
    size = path.stat().st_size
    if size != shard["bytes"]:
        return [f"{path}: {size} bytes, the manifest has {shard['bytes']}"]
    (opened,) = open_shards(path)
    if opened.n_tokens != shard["tokens"]:
        return [f"{path}: {opened.n_tokens} tokens, the manifest has {shard['tokens']}"]
    whole, expected, problems = hashlib.sha256(), shard.get(BLOCK_KEY, []), []
    with open(path, "rb") as file:
        for number in range(-(-size // BLOCK_BYTES)):
            block = file.read(BLOCK_BYTES)
            whole.update(block)
            known = expected[number] if number < len(expected) else None
            if known is not None and xxhash.xxh3_64_hexdigest(block) != known:
                start = number * BLOCK_BYTES
                problems.append(
                    f"{path}: damaged between offsets {start} and {start + len(block)} (bytes); "
                    "prepare or copy it again"
                )
    if not problems and whole.hexdigest() != shard["sha256"]:
        problems.append(f"{path}: damaged, or its record is: sha256 {whole.hexdigest()}, the "
                        f"manifest has {shard['sha256']}")  # fmt: skip
    return problems
