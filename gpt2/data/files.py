"""The front door for files that people bring: what they are is looked at before they are read.

find_files lets in regular files only and says what it leaves out, `opened` unpacks, and check_kind
refuses what is not of a reader's kind with the option that is.
"""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
COMPRESSED = ("", ".xz", ".gz", ".bz2", ".zst")
JSON_LIST = re.compile(rb'\s*\[\s*\{\s*"')


class LeftOut(dict[str, tuple[int, str]]):
    """What was read and is not used: kind -> (how many, the first of them with its place)."""

    def add(self, kind: str, text: str) -> None:
        n, first = self.get(kind, (0, text))
        self[kind] = n + 1, first

    def lines(self) -> list[str]:
        """For people: one line for each kind."""
        return [f"left out {n:,}: {kind}, first {first}" for kind, (n, first) in self.items()]


def find_files(
    path: str | Path,
    suffixes: tuple[str, ...],
    what: str,
    say: Callable[[str], object] = lambda line: None,
) -> list[Path]:
    """The file itself, or the files of these kinds in a folder and below, sorted by path.

    Links are followed, each folder once. say: told what in the folder is left out.
    Raises OSError where there are none, and for what is no regular file.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(errno.ENOENT, f"no such {what} file or folder", str(path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise OSError(
            errno.EINVAL, "a pipe or device, not a file that can be read again: write it to a file "
            "first", str(path)
        )  # fmt: skip
    endings, left_out, files = _with_compressed(suffixes), LeftOut(), []
    folders, seen = [path], set()
    while folders:
        folder = folders.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                left_out.add("hidden", str(entry))
            elif entry.is_dir():
                folders.append(entry)
            elif not entry.name.endswith(endings):
                left_out.add("of another kind", str(entry))
            elif entry.is_file():
                files.append(entry)
            else:
                left_out.add("not a regular file", str(entry))
    for line in left_out.lines():
        say(f"{path}: {line}")
    if not files:
        raise OSError(
            errno.ENOENT, f"no {what} files ({', '.join(suffixes)}, or those with "
            f"{', '.join(COMPRESSED[1:])}) here", str(path)
        )  # fmt: skip
    return sorted(files)


def _with_compressed(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(s + c for s in suffixes for c in COMPRESSED)


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """A file as (decompressed stream, the file itself); xz, gzip, bzip2, zstd and zip by magic.

    Raises OSError, ValueError for damaged files and archives of several files, and ImportError.
    """
    with open(path, "rb") as raw:
        try:
            stream = _unpacked(path, raw)
            yield stream if stream is raw else io.BufferedReader(stream, 1 << 20), raw
        except (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{path}: damaged compressed file ({error}); download it again"
            ) from error


def _unpacked(path: Path, raw: io.BufferedReader) -> io.IOBase:
    magic = raw.read(6)
    raw.seek(0)
    if magic == b"\xfd7zXZ\x00":
        return lzma.open(raw)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(raw)
    if magic.startswith(b"BZh"):
        return bz2.open(raw)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return train_extra("pyarrow", "zstd files").input_stream(raw, compression="zstd")
    if not magic.startswith(b"PK\x03\x04"):
        return raw
    archive = zipfile.ZipFile(raw)
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
    if len(names) != 1:
        raise ValueError(
            f"{path}: holds {len(names)} files ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
            ": unpack it, and name the folder"
        )
    try:
        return archive.open(names[0])
    except RuntimeError as error:  # encrypted, or compressed in an unknown way
        raise ValueError(f"{path}: cannot be unpacked ({error}): unpack it first") from error


def check_kind(path: Path, head: bytes, wanted: str) -> None:
    """Raises ValueError for the beginning of a file that is not "text" or "JSON", as wanted."""

    def refuse(kind: str, remedy: str) -> NoReturn:
        raise ValueError(f"{path}: {kind}, not {wanted}: {remedy}")

    if head[257:262] == b"ustar":
        refuse("a tar archive", "unpack it first (tar xf), and name the folder")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        refuse("UTF-16", "convert it first (iconv -f UTF-16 -t UTF-8)")
    if head.startswith(b"PAR1"):
        refuse("a parquet file", "use --parquet, or name it .parquet")
    if wanted == "JSON":
        if b"\0" in head:
            refuse("binary", f"byte {head.index(0)} is NUL")
    elif path.name.endswith(_with_compressed(TABLE_SUFFIXES)):
        refuse("a table", "write its rows as JSON lines and use --jsonl, or as parquet")
    elif path.name.endswith(_with_compressed(JSON_SUFFIXES)) or _looks_like_json(head):
        refuse("JSON", "use --jsonl")


def _looks_like_json(head: bytes) -> bool:
    lines = [line for line in head.split(b"\n")[:3] if line.strip()][:2]
    try:
        objects = [isinstance(json.loads(line), dict) for line in lines]
    except (ValueError, RecursionError):
        objects = []
    return all(objects) and bool(objects) or bool(JSON_LIST.match(head))


def train_extra(module: str, what: str):
    """Imports a module that not every installation has."""
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(
            f"{what} need {module}, which comes with the train extra: "
            "pip install 'gpt2-triton[train]'"
        ) from error
