"""Token shards on disk: three layouts of little-endian uint16 tokens, one way to open them.

    llm.c          .bin with a header of 256 int32: magic 20240520, version 1, token count. Our
                   native format. A count of 2^31 or more continues in the header's next word, which
                   is zero in every file that llm.c writes.
    nanoGPT        .bin without a header, and without a number of six digits at the end of its name
    build-nanogpt  .npy, one dimension, uint16

A data folder holds <split>_000000.bin, <split>_000001.bin, ... (or train.bin / val.bin, or any file
with the split's name between underscores, as llm.c and build-nanogpt name them) and, if
prepare_data made it, manifest.json.
"""

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024


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

    Raises OSError where the folder is missing or has none.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise OSError(
            errno.ENOENT,
            "no such data folder. Make one with: python scripts/prepare_data.py --help",
            str(folder),
        )
    named = re.compile(rf"(^|_){split}(_|\.)")
    suffixes = (".bin", ".npy")
    files = [f for f in folder.iterdir() if f.suffix in suffixes and named.search(f.name)]
    if not files:
        raise OSError(
            errno.ENOENT,
            f"no {split} shards (*_{split}_*.bin, {split}_*.bin, {split}.bin or .npy) here",
            str(folder),
        )
    return sorted(files)


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
            raise ValueError(
                f"{path}: shard version {words[1]}, this program reads version {VERSION} (uint16); "
                "version 7 and others hold tokens of another width"
            )
        n_tokens = int(words[2:4].view("<i8")[0])
        expected = HEADER_BYTES + 2 * n_tokens
        if n_tokens < 1 or size != expected:
            raise ValueError(
                f"{path}: the header promises {n_tokens} tokens ({expected} bytes), "
                f"the file has {size} bytes: cut short or damaged, prepare or download it again"
            )
        return Shard(str(path), HEADER_BYTES, n_tokens)
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
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{path}: needs one dimension of uint16, has shape {shape} of {dtype}")
    size = path.stat().st_size
    if size != offset + 2 * shape[0]:
        raise ValueError(
            f"{path}: the header promises {shape[0]} tokens ({offset + 2 * shape[0]} bytes), "
            f"the file has {size} bytes: cut short or damaged"
        )
    return Shard(str(path), offset, shape[0])
