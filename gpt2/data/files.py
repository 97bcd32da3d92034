"""The front door for files that people bring: what they are is looked at before they are read.

find_files lets in regular files only and says what it leaves out, check_kind refuses what is not of
the kind wanted, with the option that is, `opened` unpacks, and text_blocks and json_lines read
without holding more than a block or a line.
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
from itertools import count
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
COMPRESSED = ("", ".xz", ".gz", ".bz2", ".zst")
JSON_LIST = re.compile(rb'\s*\[\s*\{\s*"')
BLOCK_CHARS = 1 << 18  # of text, read at once
LONGEST = 1 << 29  # bytes of a line, characters of a list's element: a damaged file has no end


class BadRow(ValueError):
    """A row that cannot be used: place and reason as text; kind, under which such are counted."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class LeftOut(dict[str, tuple[int, str]]):
    """What was read and is not used: kind -> (how many, the first of them with its place)."""

    def add(self, kind: str, text: str) -> None:
        n, first = self.get(kind, (0, text))
        self[kind] = n + 1, first

    def lines(self) -> list[str]:
        """For people: one line for each kind."""
        return [f"left out {n:,}: {kind}, first {first}" for kind, (n, first) in self.items()]


def find_files(
    path: str | Path, suffixes: tuple[str, ...], what: str,
    say: Callable[[str], object] = lambda line: None,
) -> list[Path]:  # fmt: skip
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
        problem = "a pipe or device, not a file that can be read again: write it to a file first"
        raise OSError(errno.EINVAL, problem, str(path))
    left_out, files, folders, seen = LeftOut(), [], [path], set()
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
            elif not _has_suffix(entry, suffixes):
                left_out.add("of another kind", str(entry))
            elif entry.is_file():
                files.append(entry)
            else:
                left_out.add("not a regular file", str(entry))
    for line in left_out.lines():
        say(f"{path}: {line}")
    if not files:
        kinds = f"({', '.join(suffixes)}, or those with {', '.join(COMPRESSED[1:])})"
        raise OSError(errno.ENOENT, f"no {what} files {kinds} here", str(path))
    return sorted(files)


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.endswith(tuple(s + c for s in suffixes for c in COMPRESSED))


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
    skippable = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # a frame of pzstd's
    if magic.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return train_extra("pyarrow", "zstd files").input_stream(raw, compression="zstd")
    if not magic.startswith(b"PK\x03\x04"):
        return raw
    archive = zipfile.ZipFile(raw)
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
    if len(names) != 1:
        some = ", ".join(names[:3]) + " ..." * (len(names) > 3)
        raise ValueError(f"{path}: holds {len(names)} files ({some}): unpack it, name the folder")
    try:
        return archive.open(names[0])
    except RuntimeError as error:  # encrypted, or compressed in an unknown way
        raise ValueError(f"{path}: cannot be unpacked ({error}): unpack it first") from error


def check_kind(path: Path, wanted: str) -> bytes:
    """The first MiB of a file. Raises ValueError if that is not "text" or "JSON", as wanted."""
    with opened(path) as (stream, _):
        head = stream.read(1 << 20)
    text = wanted == "text"
    for found, kind, remedy in (
        (head[257:262] == b"ustar", "a tar archive", "unpack it first, and name the folder"),
        (head.startswith((b"\xff\xfe", b"\xfe\xff")), "UTF-16",
         "convert it first (iconv -f UTF-16 -t UTF-8)"),
        (head.startswith((b"%PDF", b"{\\rtf", b"%!PS")), "a document with a layout",
         "convert it first (pdftotext, pandoc)"),
        (head.startswith(b"PAR1"), "a parquet file", "use --parquet, or name it .parquet"),
        (b"\0" in head, "binary", f"byte {head.find(0)} is NUL"),
        (text and _has_suffix(path, TABLE_SUFFIXES), "a table",
         "write its rows as JSON lines and use --jsonl, or as parquet"),
        (text and (_has_suffix(path, JSON_SUFFIXES) or _looks_like_json(head)), "JSON",
         "use --jsonl"),
    ):  # fmt: skip
        if found:
            raise ValueError(f"{path}: {kind}, not {wanted}: {remedy}")
    return head


def _looks_like_json(head: bytes) -> bool:
    lines = [line for line in head.split(b"\n", 3)[:3] if line.strip()][:2]
    try:
        objects = [isinstance(json.loads(line), dict) for line in lines]
    except (ValueError, RecursionError):
        objects = []
    return all(objects) and bool(objects) or bool(JSON_LIST.match(head))


def text_blocks(path: Path, *, as_bytes: bool = False) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file read so far), in blocks; line ends become newlines.

    as_bytes: each byte is a character, and nothing is looked at or changed.
    Raises OSError, and ValueError for what is not UTF-8 text.
    """
    if not as_bytes:
        check_kind(path, "text")
    encoding, newline = ("latin-1", "") if as_bytes else ("utf-8-sig", None)
    with opened(path) as (stream, raw), io.TextIOWrapper(stream, encoding, newline=newline) as text:
        try:
            while block := text.read(BLOCK_CHARS):
                yield block, raw.tell()
        except UnicodeDecodeError as error:
            at = stream.tell() - len(error.object) + error.start
            raise ValueError(
                f"{path}: not UTF-8 text, byte {at} is {error.object[error.start]:#04x}; convert "
                "it first, for instance with iconv"
            ) from error


def json_lines(path: Path, stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    """(where it stands, what it holds) for each line with JSON; a BadRow for one without.

    Raises ValueError for a line above LONGEST.
    """
    for number in count(1):
        line, where = stream.readline(LONGEST + 1), f"{path}: line {number}"
        if not line:
            return
        if len(line) > LONGEST:
            raise ValueError(f"{where} has more than {LONGEST:,} bytes: damaged, or no JSON lines")
        if not line.isspace():
            try:
                yield where, json.loads(line)
            except ValueError as error:
                yield where, BadRow("not JSON", f"{where} is not UTF-8 JSON: {error}")
            except RecursionError:
                yield where, BadRow("not JSON", f"{where} is nested too deeply")


def train_extra(module: str, what: str):
    """Imports a module that not every installation has."""
    try:
        return __import__(module)
    except ImportError as error:
        raise ImportError(
            f"{what} need {module}, which comes with the train extra: "
            "pip install 'gpt2-triton[train]'"
        ) from error
