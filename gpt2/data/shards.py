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
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
LLAMA_MAGIC = 20240801  # llm.c's shards of uint32 tokens
BLOCK_BYTES = 1 << 22
BLOCK_KEY = "xxh3_64_of_4MiB"


class Shard(NamedTuple):
    """n_tokens uint16 tokens from byte `offset` of `path` on."""

    path: str
    offset: int
    n_tokens: int

    def tokens(self) -> np.ndarray:
        """The tokens as a read-only memory map, (n_tokens,) uint16."""
        return np.memmap(self.path, "<u2", "r", self.offset, (self.n_tokens,))


def shard_header(n_tokens: int) -> bytes:
    """The 1024 bytes before n_tokens tokens in the native format."""
    return struct.pack("<iiq", MAGIC, VERSION, n_tokens).ljust(HEADER_BYTES, b"\0")


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens in the native format: complete under its name, or not there at all.

    tokens (n,) any integer dtype, each in [0, 65536), n >= 1.
    Raises ValueError for tokens out of range, OSError where the file cannot be written.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"shape {tokens.shape} of {tokens.dtype}"
        raise ValueError(f"{path}: tokens must be one dimension of integers, got {found}")
    if tokens.min() < 0 or tokens.max() > 0xFFFF:
        found = f"{tokens.min()} to {tokens.max()}"
        raise ValueError(f"{path}: tokens must lie in [0, 65535] to fit uint16, got {found}")
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
    files, problems = list_shards(Path(data), split)
    for problem in problems:
        raise ValueError(problem)
    if not files:
        names = f"*_{split}_*.bin, {split}_*.bin, {split}.bin or .npy"
        raise OSError(errno.ENOENT, f"no {split} shards ({names}) here", str(data))
    for path, record in files.items():
        if record is not None:
            open_recorded(path, record)
    return list(files)


def list_shards(folder: Path, split: str) -> tuple[dict[Path, dict | None], list[str]]:
    """The files that are named as shards of a split, in order, each with its record in the manifest
    (None: no manifest); and what is missing, or not listed there, and so not among them.

    Raises OSError without the folder, and ValueError for a damaged manifest.
    """
    if not folder.is_dir():
        remedy = "Make one with: gpt2-triton prepare --help"
        raise OSError(errno.ENOENT, f"no such data folder. {remedy}", str(folder))
    there = sorted(path for path in folder.iterdir() if _is_shard_name(path.name, split))
    records = manifest_records(folder)
    if not records:
        return dict.fromkeys(there), []
    listed = {folder / name: r for name, r in records.items() if _is_shard_name(name, split)}
    missing = "missing, but the manifest lists it; copy it again, or prepare the data again"
    extra = ("not in the manifest, but training would read it; if it is a copy, or of another "
             "preparation, move it out of the folder")  # fmt: skip
    differ = sorted(listed.keys() ^ set(there))
    problems = [f"{path}: {missing if path in listed else extra}" for path in differ]
    return {path: listed[path] for path in there if path in listed}, problems


def open_recorded(path: Path, record: dict | None) -> None:
    """Checks a file as open_shards does, and against the size and tokens of its record.

    Raises ValueError, OSError.
    """
    (shard,) = open_shards(path)
    for key, found in (("tokens", shard.n_tokens), ("bytes", path.stat().st_size)):
        if record is not None and record[key] != found:
            raise ValueError(
                f"{path}: has {found} {key}, but manifest.json says {record[key]}: another file "
                "than the one that was prepared; prepare or copy it again"
            )


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
    splits = (read_manifest(folder) or {}).get("splits", {})
    try:
        records = [record for split in splits.values() for record in split["shards"]]
        for record in records:
            _check_record(record)
        return {record["file"]: record for record in records}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder) / 'manifest.json'}: damaged ({error!r}); prepare the data again"
        ) from error


def _check_record(record: dict) -> None:
    blocks, size = record.get(BLOCK_KEY), record["bytes"]
    hashes = [record["sha256"]] if blocks is None else blocks
    digits = 64 if blocks is None else 16
    if not (
        type(size) is type(record["tokens"]) is int
        and Path(record["file"]).name == record["file"]
        and (blocks is None or len(blocks) == -(-size // BLOCK_BYTES))
        and all(re.fullmatch(f"[0-9a-f]{{{digits}}}", text) for text in hashes)
    ):
        raise ValueError(f"a record is {record!r:.200}")


def folder_tokenizer(data: str | Path) -> dict | None:
    """The description of the tokenizer that a folder's shards were made with, None if it has none.

    It stands in manifest.json, or in the meta.pkl of nanoGPT's character data.
    Raises ValueError where either is damaged.
    """
    manifest, path = read_manifest(data), Path(data) / "meta.pkl"
    if manifest is not None:
        return manifest["tokenizer"]
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
            "with gpt2-triton prepare --text FILE --tokenizer char"
        ) from error
    return {"name": "char", "chars": chars}


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _is_shard_name(name: str, split: str) -> bool:
    return re.fullmatch(rf"(?!\.)(.*_)?{split}([_.].*)?\.(bin|npy)", name) is not None


def _open_bin(path: Path) -> Shard:
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    magic, version, n_tokens = struct.unpack("<iiq", head[:16].ljust(16, b"\0"))
    if magic == MAGIC and version == VERSION:
        return _whole(path, HEADER_BYTES, n_tokens)
    if magic in (MAGIC, LLAMA_MAGIC):
        raise _other_width(path, f"a shard of llm.c with magic {magic} and version {version}")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes cannot be a row of uint16 tokens")
    # A damaged header must not be read as tokens. What is numbered has one, in all programs.
    numbered = re.search(r"_\d{6}\.bin$", path.name)
    if numbered or (size >= HEADER_BYTES and 1 <= version <= 16 and not any(head[16:])):
        raise ValueError(
            f"{path}: should begin with a header, but its magic number is {magic} and not "
            f"{MAGIC}: damaged, or another program's file (nanoGPT's, which have no header, are "
            "named train.bin and val.bin)"
        )
    pairs = np.frombuffer(head, "<u2", len(head) // 4 * 2).reshape(-1, 2)
    if len(head) == HEADER_BYTES and pairs[:, 1].max() <= 1 < pairs[:, 0].max():
        raise _other_width(path, "every second number of 16 bits is 0 or 1: numbers of 32")
    return Shard(str(path), 0, size // 2)  # nanoGPT


def _open_npy(path: Path) -> Shard:
    with open(path, "rb") as file:
        try:
            major, minor = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, f"read_array_header_{major}_{minor}")
            shape, _, dtype = read_header(file)
        except OSError:
            raise
        except Exception as error:  # numpy parses it as Python: tokenize.TokenError, KeyError, ...
            raise ValueError(f"{path}: not a .npy file that can be read ({error})") from error
        offset = file.tell()
    if dtype in (np.dtype("<u4"), np.dtype("<i4"), np.dtype("<i8")):
        raise _other_width(path, f"an array of {dtype}")
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise ValueError(f"{path}: needs one dimension of uint16, has shape {shape} of {dtype}")
    return _whole(path, offset, shape[0])


def _whole(path: Path, offset: int, n_tokens: int) -> Shard:
    """The shard that a header promises, if the file has just that size."""
    size, promised = path.stat().st_size, offset + 2 * n_tokens
    if n_tokens < 1 or size != promised:
        raise ValueError(
            f"{path}: the header promises {n_tokens} tokens ({promised} bytes), the file has "
            f"{size} bytes: cut short or damaged, prepare or download it again"
        )
    return Shard(str(path), offset, n_tokens)


def _other_width(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: {what}, with tokens of another width than the 16 bits (version {VERSION}) that "
        "this program reads: prepare the text again with its own tokenizers"
    )
