"""Token shards on disk: three layouts of little-endian uint16 tokens, one way to open them.

    llm.c          .bin with a header of 256 int32: magic 20240520, version 1, token count. Our
                   native format. A count of 2^31 or more continues in the header's next word, which
                   is zero in every file that llm.c writes.
    nanoGPT        .bin without a header, and without a number of six digits at the end of its name
    build-nanogpt  .npy, one dimension, uint16

A data folder holds <split>_000000.bin, <split>_000001.bin, ... (or train.bin / val.bin, or any file
with the split's name between underscores, as llm.c and build-nanogpt name them) and, if
prepare_data made it, manifest.json. The manifest has, under splits / <split> / shards, for each
file {"file", "tokens", "bytes", "sha256", "xxh3_64_of_4MiB": [...]}, where one of the hashes may
be missing; the last one has a hash for each block of 4 MiB. With a manifest the files must be those
that it lists.
"""

import errno
import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
LLAMA_MAGIC = 20240801  # llm.c's shards of uint32 tokens
BLOCK_BYTES = 1 << 22
BLOCK_KEY = "xxh3_64_of_4MiB"


@dataclass(frozen=True)
class Shard:
    """n_tokens uint16 tokens from byte `offset` of `path` on."""

    path: str
    offset: int
    n_tokens: int

    def tokens(self) -> np.ndarray:
        """The tokens as a read-only memory map, (n_tokens,) uint16."""
        return np.memmap(self.path, "<u2", "r", self.offset, (self.n_tokens,))


def shard_header(n_tokens: int) -> bytes:
    """The 1024 bytes before n_tokens tokens in the native format."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:2] = MAGIC, VERSION
    header[2:4] = np.array([n_tokens], dtype="<i8").view("<i4")
    return header.tobytes()


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens in the native format: complete under its name, or not there at all.

    tokens (n,) any integer dtype, each in [0, 65536), n >= 1.
    Raises ValueError for tokens out of range, OSError where the file cannot be written.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path}: tokens must be one dimension of at least one integer, "
            f"got shape {tokens.shape} of {tokens.dtype}"
        )
    if tokens.min() < 0 or tokens.max() > 0xFFFF:
        raise ValueError(
            f"{path}: tokens must lie in [0, 65535] to fit uint16, "
            f"got {tokens.min()} to {tokens.max()}"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(shard_header(tokens.size))
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_shards(paths: str | Path | list[str | Path]) -> list[Shard]:
    """Checks each file's header and size and says where its tokens lie; reads no tokens.

    Raises ValueError (what is wrong with which file) and OSError (missing, unreadable).
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    return [_open_npy(Path(p)) if str(p).endswith(".npy") else _open_bin(Path(p)) for p in paths]


def find_shards(data: str | Path, split: str) -> list[Path]:
    """The shard files of a split ("train" or "val") in a data folder, in order.

    Raises OSError where the folder is missing or has none, and ValueError where they are not those
    of the folder's manifest.
    """
    folder = Path(data)
    files = split_files(folder, split)
    records = manifest_records(folder)
    for problem in listing_problems(folder, split, records):
        raise ValueError(problem)
    if not files:
        raise OSError(
            errno.ENOENT,
            f"no {split} shards (*_{split}_*.bin, {split}_*.bin, {split}.bin or .npy) here",
            str(folder),
        )
    for path in files:
        if records:
            open_recorded(path, records[path.name])
    return files


def split_files(folder: Path, split: str) -> list[Path]:
    """Files that are named as shards of a split, in order. Raises OSError without the folder."""
    if not folder.is_dir():
        raise OSError(
            errno.ENOENT,
            "no such data folder. Make one with: python scripts/prepare_data.py --help",
            str(folder),
        )
    return sorted(f for f in folder.iterdir() if _is_shard_name(f.name, split))


def listing_problems(folder: Path, split: str, records: dict[str, dict]) -> list[str]:
    """Files of a split that are missing, or not listed, by the records of the folder's manifest."""
    there = {path.name for path in split_files(folder, split)} if records else set()
    listed = {name for name in records if _is_shard_name(name, split)}
    missing = "missing, but the manifest lists it; copy it again, or prepare the data again"
    extra = ("not in the manifest, but training would read it; if it is a copy, or of another "
             "preparation, move it out of the folder")  # fmt: skip
    return [f"{folder / name}: {missing}" for name in sorted(listed - there)] + [
        f"{folder / name}: {extra}" for name in sorted(there - listed)
    ]


def open_recorded(path: Path, record: dict) -> Shard:
    """open_shards for one file, which must have the size and tokens of its record.

    Raises ValueError, OSError.
    """
    (shard,) = open_shards(path)
    for key, found in (("tokens", shard.n_tokens), ("bytes", path.stat().st_size)):
        if record[key] != found:
            raise ValueError(
                f"{path}: has {found} {key}, but manifest.json says {record[key]}: another file "
                "than the one that was prepared; prepare or copy it again"
            )
    return shard


def read_manifest(data: str | Path) -> dict | None:
    """The manifest.json that prepare_data left in a data folder, or None where there is none."""
    path = Path(data) / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); prepare the data again") from error
    if not isinstance(manifest, dict) or "tokenizer" not in manifest:
        raise ValueError(f"{path}: has no 'tokenizer' entry; prepare the data again")
    return manifest


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


def folder_tokenizer(data: str | Path) -> dict | None:
    """The description of the tokenizer that a folder's shards were made with, None if it has none.

    It stands in manifest.json, or in the meta.pkl of nanoGPT's character data.
    Raises ValueError where either is damaged.
    """
    manifest = read_manifest(data)
    if manifest is not None:
        return manifest["tokenizer"]
    path = Path(data) / "meta.pkl"
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        chars = "".join(itos[i] for i in range(len(itos)))
        if len(chars) != len(itos) or list(chars) != sorted(set(chars)):
            raise ValueError("its characters are not single ones in order")
    except OSError:
        raise
    except Exception as error:  # pickle raises whatever a damaged file leads it to
        raise ValueError(
            f"{path}: not the vocabulary of nanoGPT's character data ({error}); prepare the text "
            "with scripts/prepare_data.py --text FILE --tokenizer char"
        ) from error
    return {"name": "char", "chars": chars}


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _is_shard_name(name: str, split: str) -> bool:
    if name.startswith(".") or not name.endswith((".bin", ".npy")):
        return False
    return re.search(rf"(^|_){split}(_|\.)", name) is not None


def _check_record(record: dict) -> None:
    for key, kind in (("file", str), ("tokens", int), ("bytes", int)):
        if type(record[key]) is not kind:
            raise ValueError(f"{key} is {record[key]!r}")
    if Path(record["file"]).name != record["file"]:
        raise ValueError(f"file is {record['file']!r}, not a file's name")
    blocks = record.get(BLOCK_KEY)
    if blocks is None:
        if not re.fullmatch("[0-9a-f]{64}", record["sha256"]):
            raise ValueError(f"sha256 is {record['sha256']!r}")
    elif not isinstance(blocks, list) or len(blocks) != -(-record["bytes"] // BLOCK_BYTES):
        raise ValueError(f"{BLOCK_KEY} of {record['file']} is not a list of a hash a block")
    elif not all(isinstance(b, str) and re.fullmatch("[0-9a-f]{16}", b) for b in blocks):
        raise ValueError(f"{BLOCK_KEY} of {record['file']} holds what is no hash")


def _open_bin(path: Path) -> Shard:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    words = np.frombuffer(head[: len(head) // 4 * 4], dtype="<i4")
    if words.size and words[0] == MAGIC:
        if size < HEADER_BYTES:
            raise ValueError(
                f"{path}: cut short: {size} bytes, the header alone has {HEADER_BYTES}"
            )
        if words[1] != VERSION:
            raise _other_width(path, f"shard version {words[1]} of llm.c")
        n_tokens = int(words[2:4].view("<i8")[0])
        expected = HEADER_BYTES + 2 * n_tokens
        if n_tokens < 1 or size != expected:
            raise ValueError(
                f"{path}: the header promises {n_tokens} tokens ({expected} bytes), "
                f"the file has {size} bytes: cut short or damaged, prepare or download it again"
            )
        return Shard(str(path), HEADER_BYTES, n_tokens)
    if words.size and words[0] == LLAMA_MAGIC:
        raise _other_width(path, "llm.c's shard of Llama 3 tokens")
    # A damaged header must not be read as tokens. What is numbered has one, in all programs.
    numbered = re.search(r"_\d{6}\.bin$", path.name)
    if (
        words.size
        and numbered
        or (size >= HEADER_BYTES and 1 <= words[1] <= 16 and not words[4:].any())
    ):
        raise ValueError(
            f"{path}: should begin with a header, but its magic number is {words[0]} and not "
            f"{MAGIC}: damaged, or another program's file (nanoGPT's, which have no header, are "
            "named train.bin and val.bin)"
        )
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes cannot be a row of uint16 tokens")
    return Shard(str(path), 0, size // 2)  # nanoGPT


def _other_width(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: {what}, with tokens of another width than the 16 bits (version {VERSION}) that "
        "this program reads: prepare the text again with its own tokenizers"
    )


def _open_npy(path: Path) -> Shard:
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
        except OSError:
            raise
        except Exception as error:  # numpy parses it as Python: tokenize.TokenError, KeyError, ...
            raise ValueError(f"{path}: not a .npy file that can be read ({error})") from error
        offset = file.tell()
    if dtype in (np.dtype("<u4"), np.dtype("<i4"), np.dtype("<i8")):
        raise _other_width(path, f"an array of {dtype}")
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{path}: needs one dimension of uint16, has shape {shape} of {dtype}")
    size = path.stat().st_size
    if size != offset + 2 * shape[0]:
        raise ValueError(
            f"{path}: the header promises {shape[0]} tokens ({offset + 2 * shape[0]} bytes), "
            f"the file has {size} bytes: cut short or damaged"
        )
    return Shard(str(path), offset, shape[0])
