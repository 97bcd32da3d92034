"""Reading text from files (text, JSON, parquet; compressed or not) and from the Hugging Face hub.

A reader counts items (files of text, rows of the rest) and reads one at a time: never a corpus or a
large file at once. items(skip) starts behind so many items; the rows of a stream from the hub can
start from a bookmark, which is nearer than the beginning.
"""

import bz2
import codecs
import dataclasses
import errno
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 1 << 18  # read at once; of rows, characters
TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED = ("", ".xz", ".gz", ".bz2")
BOOKMARK_EVERY = 1000  # rows
LONGEST_ELEMENT = 1 << 28  # bytes of a JSON list's element; a damaged file would be read to its end
BEFORE_FIRST, BEFORE_ELEMENT = re.compile(r"\s*\[?\s*"), re.compile(r"[\s,]*")


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """A file as (decompressed stream, the file itself); xz, gzip, bzip2 and zip by their magic.

    Raises OSError, and ValueError for damaged and for zstd files.
    """
    with open(path, "rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        if magic.startswith(b"\x28\xb5\x2f\xfd"):
            raise ValueError(f"{path}: zstd files are not read: decompress it first (unzstd)")
        stream = raw
        if magic == b"\xfd7zXZ\x00":
            stream = lzma.open(raw)
        elif magic.startswith(b"\x1f\x8b"):
            stream = gzip.open(raw)
        elif magic.startswith(b"BZh"):
            stream = bz2.open(raw)
        elif magic.startswith(b"PK\x03\x04"):
            archive = zipfile.ZipFile(raw)
            stream = archive.open(archive.namelist()[0])
        try:
            yield io.BufferedReader(stream, 1 << 20) if stream is not raw else raw, raw
        except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: damaged compressed file ({error}); download it again"
            ) from error
        except gzip.BadGzipFile as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); download it again") from error


def find_files(path: str | Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The file itself, or the files of these kinds in a folder and below, sorted by path.

    Raises OSError where there are none.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(errno.ENOENT, f"no such {what} file or folder", str(path))
    if not path.is_dir():
        return [path]
    endings = tuple(s + c for s in suffixes for c in COMPRESSED)
    files = sorted(f for f in path.rglob("*") if f.name.endswith(endings) and f.is_file())
    if not files:
        kinds = ", ".join(suffixes)
        raise OSError(
            errno.ENOENT, f"no {what} files ({kinds}, or those with .xz, .gz, .bz2) here", str(path)
        )
    return files


@dataclass
class TextFile:
    """One file as an item."""

    path: Path
    encoding: str
    reader: "LocalFiles"
    starts: bool = True

    def blocks(self) -> Iterator[str]:
        """The text in order, in blocks; line ends become newlines unless it is read as bytes."""
        decoder = codecs.getincrementaldecoder(self.encoding)()
        if self.encoding != "latin-1":
            decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        position = 0
        with opened(self.path) as (stream, raw):
            while True:
                block = stream.read(BLOCK_BYTES)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # The decoder had kept the start of a character from the block before.
                    kept = len(error.object) - len(block)
                    raise ValueError(
                        f"{self.path}: not UTF-8 text, byte {position - kept + error.start} is "
                        f"{error.object[error.start]:#04x}; convert it first, for instance with "
                        "iconv"
                    ) from error
                position += len(block)
                self.reader.bytes_in_file = raw.tell()
                if text:
                    yield text
                if not block:
                    return

    def length(self) -> int:
        """Characters; reads the file."""
        return sum(len(block) for block in self.blocks())

    def hash(self) -> int:
        """64 bits of the text; reads the file."""
        hasher = xxhash.xxh3_64()
        for block in self.blocks():
            hasher.update(block.encode())
        return hasher.intdigest()


@dataclass
class Row:
    """One row's text as an item; starts: a document starts with it."""

    text: str
    starts: bool = True

    def blocks(self) -> Iterator[str]:
        for start in range(0, len(self.text), BLOCK_BYTES):
            yield self.text[start : start + BLOCK_BYTES]

    def length(self) -> int:
        return len(self.text)

    def hash(self) -> int:
        return xxhash.xxh3_64_intdigest(self.text.encode("utf-8", "surrogatepass"))


@dataclass
class LocalFiles:
    """Reading files in order; progress in bytes as they lie on disk."""

    files: list[Path]
    bytes_before: int = 0  # of the files before the one that is being read
    bytes_in_file: int = 0

    def fingerprint(self) -> dict:
        """What identifies the content: a changed file is another source."""
        hasher, total = xxhash.xxh3_128(), 0
        for path in self.files:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    hasher.update(block)
                    total += len(block)
            hasher.update(f"|{total}|".encode())
        return {"files": len(self.files), "bytes": total, "xxh3_128": hasher.hexdigest()}

    def each_file(self) -> Iterator[Path]:
        self.bytes_before = 0
        for path in self.files:
            self.bytes_in_file = 0
            yield path
            self.bytes_before += path.stat().st_size

    def bytes_done(self) -> tuple[int, int]:
        """Bytes read, of bytes in all."""
        total = sum(path.stat().st_size for path in self.files)
        return self.bytes_before + self.bytes_in_file, total

    def bookmark(self, items: int) -> dict | None:
        return None


@dataclass
class TextFiles(LocalFiles):
    """Each file is an item."""

    encoding: str = "utf-8"  # latin-1 reads bytes as they are

    def items(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[TextFile]:
        for number, path in enumerate(self.each_file()):
            if number >= skip:
                yield TextFile(path, self.encoding, self)


@dataclass
class JsonRows(LocalFiles):
    """The rows of JSON files, either an object a line or one list of objects."""

    field: str = "text"

    def items(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row]:
        for where, row in self.objects(skip):
            yield Row(_text_of(row, self.field, where))

    def objects(self, skip: int = 0) -> Iterator[tuple[str, object]]:
        """(where it stands, the whole row)."""
        number = 0
        for path in self.each_file():
            with opened(path) as (stream, raw):
                is_list = _first_byte(stream) == b"["
                for where, row in _json_list(path, stream) if is_list else _lines(stream):
                    number += 1
                    if number <= skip:
                        continue
                    if not is_list:
                        row = _parse_line(path, where, row)
                    self.bytes_in_file = raw.tell()
                    yield f"{path}: {where}", row


@dataclass
class ParquetRows(LocalFiles):
    """The rows of parquet files; of items, only the one column is read."""

    field: str = "text"

    def items(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row]:
        for where, row in self.objects(skip, [self.field]):
            yield Row(_text_of(row, self.field, where))

    def objects(
        self, skip: int = 0, columns: list[str] | None = None
    ) -> Iterator[tuple[str, dict]]:
        """(where it stands, the row with these columns, or with all)."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                "parquet files need pyarrow, which comes with the train extra: "
                "pip install 'gpt2-triton[train]'"
            ) from error
        number = 0
        for path in self.each_file():
            try:
                with pq.ParquetFile(path) as file:
                    names = file.schema_arrow.names
                    for name in columns or ():
                        if name not in names:
                            raise _no_field(name, names, str(path))
                    for group in range(file.num_row_groups):
                        rows = file.metadata.row_group(group).num_rows
                        if number + rows <= skip:
                            number += rows
                            continue
                        for batch in file.iter_batches(256, [group], columns):
                            for row in batch.to_pylist():
                                number += 1
                                if number > skip:
                                    yield f"{path}: row {number}", row
                        size = path.stat().st_size
                        self.bytes_in_file = size * (group + 1) // file.num_row_groups
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error


@dataclass
class HubRows:
    """The rows of a data set on the hub, streamed: nothing of it is kept on disk.

    starts: a pattern; only a row that matches it starts a document, and the rows up to the next
    such row belong to it. None: each row is a document.
    """

    repo: str
    config: str = ""
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    starts: str | None = None
    rows_read: int = 0
    marks: dict[int, dict] = dataclasses.field(
        default_factory=dict
    )  # rows read: the stream's state there

    def fingerprint(self) -> dict:
        return {"hub": self.repo, "config": self.config, "split": self.split, "field": self.field,
                "revision": self.revision}  # fmt: skip

    def bytes_done(self) -> tuple[int, int]:
        return 0, 0

    def bookmark(self, items: int) -> dict | None:
        """The last known state of the stream at or before an item; those before it are dropped."""
        known = max((n for n in self.marks if n <= items), default=None)
        if known is None:
            return None
        self.marks = {n: state for n, state in self.marks.items() if n >= known}
        return {"items": known, "state": self.marks[known]}

    def items(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row]:
        stream = self._load()
        first = 0
        if bookmark is not None:
            stream.load_state_dict(bookmark["state"])
            first = bookmark["items"]
            self.marks = {first: bookmark["state"]}
        starts = re.compile(self.starts) if self.starts else None
        for number, row in self._rows(stream, first):
            if number % BOOKMARK_EVERY == 0:
                self.marks[number] = stream.state_dict()
            if number > skip:
                text = _text_of(row, self.field, f"{self.repo}: row {number}")
                yield Row(text, number == 1 or not starts or bool(starts.match(text)))

    def objects(self) -> Iterator[tuple[str, dict]]:
        """(where it stands, the whole row)."""
        for number, row in self._rows(self._load()):
            yield f"{self.repo}: row {number}", row

    def _rows(self, stream, number: int = 0) -> Iterator[tuple[int, dict]]:
        """Rows with their numbers, counted from 1, of a stream that stands behind `number`."""
        rows = iter(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the network libraries of the hub raise
                raise OSError(
                    f"reading {self.repo} from the hub failed at row {number}: {error}; the same "
                    "command goes on where this one stopped"
                ) from error
            number += 1
            yield number, row

    def _load(self):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "data sets of the hub need the datasets package, which comes with the train extra: "
                "pip install 'gpt2-triton[train]'"
            ) from error
        name = f"{self.repo}:{self.config}" if self.config else self.repo
        try:
            return datasets.load_dataset(
                self.repo, self.config or None, split=self.split, streaming=True,
                revision=self.revision,
            )  # fmt: skip
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise ValueError(f"{name}, split {self.split}: {error}") from error
        except OSError as error:
            raise OSError(
                f"{name}: the hub cannot be reached ({error}); check the network (and "
                "HF_HUB_OFFLINE), or fetch its files elsewhere and name them (prepare_data.py: "
                "--parquet or --jsonl; sft.py and dpo.py: --data)"
            ) from error


def _first_byte(stream) -> bytes:
    return stream.peek(1 << 12)[: 1 << 12].lstrip(b" \t\r\n\xef\xbb\xbf")[:1]


def _lines(stream) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            yield f"line {number}", line


def _parse_line(path: Path, where: str, line: bytes):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: {where} is not UTF-8 JSON: {error}") from error


def _json_list(path: Path, stream) -> Iterator[tuple[str, object]]:
    """The elements of a JSON list, holding no more than a block and an element of it."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder().raw_decode
    text, at, number, wanted, more = "", 0, 0, BLOCK_BYTES, True
    while True:
        if more and len(text) - at < wanted:
            block = stream.read(wanted)
            more = bool(block)
            try:
                text, at = text[at:] + decode(block, final=not block), 0
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: element {number + 1} is not UTF-8: {error}") from error
            continue
        at = (BEFORE_ELEMENT if number else BEFORE_FIRST).match(text, at).end()
        if text[at : at + 1] == "]":
            return
        try:
            value, at = parse(text, at)
        except ValueError as error:
            if not more or wanted > LONGEST_ELEMENT:
                raise ValueError(f"{path}: element {number + 1} of the list: {error}") from error
            wanted *= 2  # the element is longer than what is at hand
            continue
        number, wanted = number + 1, BLOCK_BYTES
        yield f"element {number}", value


def _text_of(row, name: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with fields")
    if name not in row:
        raise _no_field(name, list(row), where)
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{where}: field {name!r} holds {type(value).__name__}, not text; name another --field"
        )
    return value or ""


def _no_field(name: str, names: list[str], where: str) -> ValueError:
    return ValueError(f"{where}: no field {name!r}; its fields are {', '.join(map(repr, names))}")
