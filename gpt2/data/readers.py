"""Reading text from files (text, JSON, parquet; compressed or not) and from the Hugging Face hub.

A reader counts items (files of text, rows of the rest) and reads one at a time: never a corpus or a
large file at once, and no line or element above LONGEST. A row that cannot be used comes out as a
BadRow with its place, so that nothing is dropped without being seen. read(skip) starts after so
many items; the rows of a stream from the hub can start from a bookmark, which is nearer than the
beginning.
"""

import codecs
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import xxhash

from gpt2.data.files import (  # noqa: F401, for those who read files
    COMPRESSED,
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    check_kind,
    find_files,
    opened,
    train_extra,
)

BLOCK_BYTES = 1 << 18  # read at once; of rows, characters
LONGEST = 1 << 29  # bytes of a line, characters of a list's element: a damaged file has no end
BOOKMARK_EVERY = 1000  # rows
BEFORE_FIRST, BEFORE_ELEMENT = re.compile(r"\s*\[?\s*"), re.compile(r"[\s,]*")


class BadRow(ValueError):
    """A row that cannot be used: place and reason as text; kind, under which such are counted."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def split_documents(blocks: Iterator[str], separator: str) -> Iterator[tuple[int, bool, str]]:
    """(characters before it, whether a document starts with it, text), without separators.

    A separator takes the newlines after it along, as those that stand on lines of their own have.
    """
    marks = re.compile(f"{re.escape(separator)}\n*") if separator else re.compile("(?!)")
    keep = max(0, len(separator) - 1)  # the end of a block may be the beginning of a separator
    offset, starts, held, fresh = 0, True, "", False
    for block in chain(blocks, [""]):
        text = held + block
        at = len(text) - len(text.lstrip("\n")) if fresh else 0
        for mark in marks.finditer(text, at):
            if mark.start() > at:
                yield offset + at, starts, text[at : mark.start()]
            at, starts = mark.end(), True
        fresh = at == len(text)  # more newlines may follow
        end = max(at, len(text) - keep) if block else len(text)
        if end > at:
            yield offset + at, starts, text[at:end]
            starts = False
        offset, held = offset + end, text[end:]


class Survey(NamedTuple):
    """What a first reading of a text finds: its characters, 64 bits of hash, documents."""

    characters: int
    hash: int
    documents: int


@dataclass
class TextFile:
    """One file as an item."""

    path: Path
    reader: "TextFiles"

    @property
    def where(self) -> str:
        return str(self.path)

    def blocks(self) -> Iterator[str]:
        """The text in order, in blocks; line ends become newlines unless it is read as bytes."""
        as_bytes, position = self.reader.encoding == "latin-1", 0
        decoder = codecs.getincrementaldecoder("latin-1" if as_bytes else "utf-8-sig")()
        if not as_bytes:
            decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
        with opened(self.path) as (stream, raw):
            while True:
                block = stream.read(BLOCK_BYTES)
                if position == 0 and not as_bytes:
                    check_kind(self.path, block, "text")
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # The decoder had kept the start of a character from the block before.
                    at = position - (len(error.object) - len(block)) + error.start
                    raise ValueError(
                        f"{self.path}: not UTF-8 text, byte {at} is "
                        f"{error.object[error.start]:#04x}; convert it first, for instance with "
                        "iconv"
                    ) from error
                if not as_bytes and b"\0" in block:
                    at = position + block.index(0)
                    raise ValueError(f"{self.path}: binary, not text: byte {at} is NUL")
                position += len(block)
                self.reader.bytes_in_file = raw.tell()
                if text:
                    yield text
                if not block:
                    return

    def parts(self) -> Iterator[tuple[int, bool, str]]:
        """What split_documents makes of it. Raises ValueError where it changed since last time."""
        hasher, characters, documents = xxhash.xxh3_64(), 0, 0

        def noted() -> Iterator[str]:
            nonlocal characters
            for block in self.blocks():
                hasher.update(block.encode())
                characters += len(block)
                yield block

        for part in split_documents(noted(), self.reader.separator):
            documents += part[1]
            yield part
        found = Survey(characters, hasher.intdigest(), documents)
        if self.reader.surveys.setdefault(self.path, found) != found:
            raise ValueError(f"{self.path}: changed while it was read; start again")

    @property
    def survey(self) -> Survey:
        """Reads the file, unless that was done."""
        if self.path not in self.reader.surveys:
            for _ in self.parts():
                pass
        return self.reader.surveys[self.path]

    def length(self) -> int:
        """Characters."""
        return self.survey.characters

    def hash(self) -> int:
        """64 bits of the text."""
        return self.survey.hash


@dataclass
class Row:
    """One row's text as an item; starts: a document starts with it."""

    text: str
    starts: bool = True
    where: str = ""

    def parts(self) -> Iterator[tuple[int, bool, str]]:
        for start in range(0, len(self.text), BLOCK_BYTES):
            yield start, self.starts and not start, self.text[start : start + BLOCK_BYTES]

    def length(self) -> int:
        return len(self.text)

    def hash(self) -> int:
        return xxhash.xxh3_64_intdigest(self.text.encode("utf-8", "surrogatepass"))


class Reader:
    """What all readers have."""

    def items(self) -> Iterator["TextFile | Row"]:
        """All items. Raises the first BadRow."""
        for item in self.read():
            if isinstance(item, BadRow):
                raise item
            yield item

    def bookmark(self, items: int) -> dict | None:
        return None


@dataclass
class LocalFiles(Reader):
    """Reading files in order; progress in bytes as they lie on disk."""

    files: list[Path]
    bytes_before: int = dataclasses.field(default=0, kw_only=True)  # of the files already read
    bytes_in_file: int = dataclasses.field(default=0, kw_only=True)

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
            self.bytes_before, self.bytes_in_file = self.bytes_before + path.stat().st_size, 0

    @cached_property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def bytes_done(self) -> tuple[int, int]:
        """Bytes read, of bytes in all."""
        return self.bytes_before + self.bytes_in_file, self.bytes


@dataclass
class TextFiles(LocalFiles):
    """Each file is an item; separator: stands between documents within a file, if not empty."""

    encoding: str = "utf-8"  # latin-1 reads bytes as they are
    separator: str = ""
    surveys: dict[Path, Survey] = dataclasses.field(default_factory=dict)

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[TextFile]:
        for number, path in enumerate(self.each_file()):
            if number >= skip:
                yield TextFile(path, self)

    def survey(self) -> Survey:
        """Of all files together; reads those that were not read yet."""
        found = [TextFile(path, self).survey for path in self.files]
        together = xxhash.xxh3_64_intdigest(repr([s[:2] for s in found]).encode())
        return Survey(sum(s[0] for s in found), together, sum(s[2] for s in found))

    def fingerprint(self) -> dict:
        characters, digest, _ = self.survey()
        return {"files": len(self.files), "characters": characters, "xxh3_64": f"{digest:016x}",
                "separator": self.separator}  # fmt: skip


@dataclass
class JsonRows(LocalFiles):
    """The rows of JSON files: an object (or a list) a line, or one list of objects."""

    field: str = "text"

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row | BadRow]:
        for where, row in self._rows(skip):
            yield _row_of(row, self.field, where)

    def objects(
        self, refuse: Callable[[BadRow], object] | None = None
    ) -> Iterator[tuple[str, object]]:
        """(where it stands, the whole row); refuse: given each line that is no JSON, not raised."""
        for where, row in self._rows():
            if not isinstance(row, BadRow):
                yield where, row
            elif refuse is None:
                raise row
            else:
                refuse(row)

    def _rows(self, skip: int = 0) -> Iterator[tuple[str, object]]:
        number = 0
        for path in self.each_file():
            with opened(path) as (stream, _):
                head = stream.read(1 << 20)
            check_kind(path, head, "JSON")
            is_list = _is_one_list(head)
            with opened(path) as (stream, raw):
                for where, row in (_json_list if is_list else _lines)(path, stream):
                    number += 1
                    if number > skip:
                        self.bytes_in_file = raw.tell()
                        yield where, row if is_list else _parse_line(where, row)


@dataclass
class ParquetRows(LocalFiles):
    """The rows of parquet files; of items, only the one column is read."""

    field: str = "text"

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row | BadRow]:
        for where, row in self.objects(skip, [self.field]):
            yield _row_of(row, self.field, where)

    def objects(
        self, skip: int = 0, columns: list[str] | None = None
    ) -> Iterator[tuple[str, dict]]:
        """(where it stands, the row with these columns, or with all)."""
        pa = train_extra("pyarrow", "parquet files")
        import pyarrow.parquet as pq

        number = 0
        for path in self.each_file():
            try:
                with pq.ParquetFile(path) as file:
                    names = file.schema_arrow.names
                    for name in columns or ():
                        if name not in names:
                            raise ValueError(_no_field(name, names, path))
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
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = " ".join(str(error).split())
                raise ValueError(f"{path}: not a parquet file that is read: {reason}") from error


@dataclass
class HubRows(Reader):
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
    commit: str | None = None  # of that revision, so that a stream that goes on is the same
    # The stream's state after so many rows.
    marks: dict[int, dict] = dataclasses.field(default_factory=dict)

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

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row | BadRow]:
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
                item = _row_of(row, self.field, f"{self.repo}: row {number}")
                if starts and number > 1 and isinstance(item, Row):
                    item.starts = bool(starts.match(item.text))
                yield item

    def objects(self) -> Iterator[tuple[str, dict]]:
        """(where it stands, the whole row)."""
        for number, row in self._rows(self._load()):
            yield f"{self.repo}: row {number}", row

    def _rows(self, stream, number: int = 0) -> Iterator[tuple[int, dict]]:
        """Rows with their numbers, counted from 1, of a stream that stands after `number`."""
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
        hub = train_extra("datasets", "data sets of the hub")
        name = f"{self.repo}:{self.config}" if self.config else self.repo
        try:
            return hub.load_dataset(
                self.repo, self.config or None, split=self.split, streaming=True,
                revision=self.commit or self.revision,
            )  # fmt: skip
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise ValueError(f"{name}, split {self.split}: {error}") from error
        except OSError as error:
            raise _unreachable(name, error) from error


def hub_commit(repo: str, revision: str | None = None) -> str:
    """The commit that a revision of a data set on the hub is now. Raises OSError, ImportError."""
    hub = train_extra("huggingface_hub", "the hub's files")
    try:
        return hub.HfApi().dataset_info(repo, revision=revision).sha
    except Exception as error:  # whatever the network libraries of the hub raise
        raise _unreachable(repo, error) from error


def _unreachable(name: str, error: Exception) -> OSError:
    reason = str(error).strip().split("\n")[0]
    return OSError(
        f"{name}: the hub cannot be reached ({reason}); check the name and the network (and "
        "HF_HUB_OFFLINE), or fetch its files elsewhere and name them (prepare_data.py: --parquet "
        "or --jsonl; sft.py and dpo.py: --data)"
    )


def _is_one_list(head: bytes) -> bool:
    """Whether a JSON file is one list; else each line is a row, which may be a list as well."""
    head = head.lstrip(b" \t\r\n\xef\xbb\xbf")
    line, _, rest = head.partition(b"\n")
    return head[:1] == b"[" and not (line.rstrip()[-1:] == b"]" and rest.lstrip()[:1] == b"[")


def _lines(path: Path, stream) -> Iterator[tuple[str, bytes]]:
    for number in count(1):
        line = stream.readline(LONGEST + 1)
        if not line:
            return
        if len(line) > LONGEST:
            raise ValueError(
                f"{path}: line {number} has more than {LONGEST:,} bytes: damaged, or not JSON lines"
            )
        if not line.isspace():
            yield f"{path}: line {number}", line


def _parse_line(where: str, line: bytes):
    try:
        return json.loads(line)
    except ValueError as error:
        return BadRow("not JSON", f"{where} is not UTF-8 JSON: {error}")
    except RecursionError:
        return BadRow("not JSON", f"{where} is nested too deeply")


def _json_list(path: Path, stream) -> Iterator[tuple[str, object]]:
    """The elements of a JSON list, holding no more than a block and an element of it."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parse = json.JSONDecoder().raw_decode
    text, at, number, wanted, more = "", 0, 0, BLOCK_BYTES, True
    while True:
        where = f"{path}: element {number + 1} of the list"
        if more and len(text) - at < wanted:
            block = stream.read(wanted)
            more = bool(block)
            try:
                text, at = text[at:] + decode(block, final=not block), 0
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8: {error}") from error
            continue
        at = (BEFORE_ELEMENT if number else BEFORE_FIRST).match(text, at).end()
        if text[at : at + 1] == "]":
            break
        try:
            value, at = parse(text, at)
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deeply") from error
        except ValueError as error:
            if not more or wanted >= LONGEST:
                raise ValueError(f"{where}: {error}") from error
            wanted *= 2  # the element is longer than what is at hand
            continue
        number, wanted = number + 1, BLOCK_BYTES
        yield f"{path}: element {number}", value
    rest = text[at + 1 :].strip() or stream.read(BLOCK_BYTES).strip()
    if rest:
        raise ValueError(
            f"{path}: more stands after the list's end (after element {number}): {rest[:20]!r}; "
            "make it one list, or an object a line"
        )


def _row_of(row, name: str, where: str) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        kind = type(row).__name__
        return BadRow("not an object", f"{where} is a {kind}, not an object with fields")
    if name not in row:
        return BadRow(f"no field {name!r}", _no_field(name, list(row), where))
    value = row[name]
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        text = f"{where}: field {name!r} holds {kind}, not text; name another --field"
        return BadRow(f"field {name!r} is not text", text)
    return Row(value or "", where=where)


def _no_field(name: str, names: list[str], where: str | Path) -> str:
    return f"{where}: no field {name!r}; its fields are {', '.join(map(repr, names))}"
