"""Checks a prepared folder against its manifest: headers, sizes and hashes of every shard."""

from pathlib import Path

from gpt2.data.integrity import BLOCK_KEY, check_content, manifest_records
from gpt2.data.shards import find_shards, open_shards


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared folder, each with file and place; an empty list if nothing.

    A folder of shards without a manifest (nanoGPT's, llm.c's) has its headers and sizes checked.
    Raises OSError (no such folder, no shards) and ValueError (damaged manifest).
    """
    folder = Path(folder)
    records = manifest_records(folder)
    there = {path.name for split in ("train", "val") for path in _found(folder, split)}
    if not there and not records:
        find_shards(folder, "train")  # raises
    problems = []
    for name in [*records, *sorted(there - records.keys())]:
        try:
            _check(folder / name, records.get(name))
            if records and name not in records:
                problems.append(
                    f"{folder / name}: not in the manifest, but training would read it"
                )
        except FileNotFoundError:
            problems.append(f"{folder / name}: missing, but the manifest has it")
        except (ValueError, OSError) as error:
            text = str(error)
            problems.append(text if name in text else f"{folder / name}: {text}")
    return problems


def _found(folder: Path, split: str) -> list[Path]:
    try:
        return find_shards(folder, split)
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        return []


def _check(path: Path, record: dict | None) -> None:
    (shard,) = open_shards(path)
    if record is None:
        return
    for key, found in (("bytes", path.stat().st_size), ("tokens", shard.n_tokens)):
        if found != record[key]:
            raise ValueError(f"{path}: {found} {key}, the manifest has {record[key]}")
    check_content(path, record)  # by blocks, where they are known: it says in which
    check_content(path, {key: record[key] for key in record if key != BLOCK_KEY})
