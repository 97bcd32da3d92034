"""Sources of items: text files, rows of JSON and parquet files, rows from the Hugging Face hub.

A reader counts items (files of text, rows of the rest) and reads one at a time: never a corpus or a
large file at once. A row that cannot be used comes out as a BadRow with its place, so that nothing
is dropped without being seen. read(skip) starts after so many items; the rows of a stream from the
hub can start from a bookmark, which is nearer than the beginning.
"""

import codecs
import dataclasses
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import xxhash

from gpt2.data import files
from gpt2.data.files import TEXT_SUFFIXES, BadRow, find_files  # noqa: F401, for those who read

BOOKMARK_EVERY = 1000  # rows
BEFORE_FIRST, BEFORE_ELEMENT = re.compile(r"\s*\[?\s*"), re.compile(r"[\s,]*")


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


class Survey(NamedTuple):  # what a first reading of a text finds
    characters: int
    hash: int
    documents: int


@dataclass
class TextFile:
    """One file as an item."""

    where: Path
    reader: "TextFiles"

    def parts(self) -> Iterator[tuple[int, bool, str]]:
        """What split_documents makes of it. Raises ValueError where it changed since last time."""
        hasher, characters, documents = xxhash.xxh3_64(), 0, 0

        def noted() -> Iterator[str]:
            nonlocal characters
            for block, done in files.text_blocks(self.where, as_bytes=self.reader.as_bytes):
                self.reader.bytes_in_file = done
                hasher.update(block.encode())
                characters += len(block)
                yield block

        for part in split_documents(noted(), self.reader.separator):
            documents += part[1]
            yield part
        found = Survey(characters, hasher.intdigest(), documents)
        if self.reader.surveys.setdefault(self.where, found) != found:
            raise ValueError(f"{self.where}: changed while it was read; start again")

    def survey(self) -> Survey:
        """Reads the file, unless that was done."""
        if self.where not in self.reader.surveys:
            deque(self.parts(), maxlen=0)
        return self.reader.surveys[self.where]

    def length(self) -> int:
        return self.survey().characters

    def hash(self) -> int:
        return self.survey().hash


@dataclass
class Row:
    """One row's text as an item; starts: a document starts with it."""

    text: str
    starts: bool = True
    where: str = ""

    def parts(self) -> Iterator[tuple[int, bool, str]]:
        for start in range(0, len(self.text), files.BLOCK_CHARS):
            yield start, self.starts and not start, self.text[start : start + files.BLOCK_CHARS]

    def length(self) -> int:
        return len(self.text)

    def hash(self) -> int:
        """64 bits of the text."""
        return xxhash.xxh3_64_intdigest(self.text.encode("utf-8", "surrogatepass"))


class Reader:
    def items(self) -> Iterator[TextFile | Row]:
        """All items. Raises the first BadRow."""
        for item in self.read():
            if isinstance(item, BadRow):
                raise item
            yield item

    def bookmark(self, items: int) -> dict | None:
        return None

    def bytes_done(self) -> tuple[int, int]:
        """Bytes read, of bytes in all."""
        return 0, 0


@dataclass
class LocalFiles(Reader):
    """Reading files in order; field: of rows, the one that holds the text."""

    files: list[Path]
    field: str = "text"
    bytes_before, bytes_in_file = 0, 0  # in the files already read, in this one; as on disk

    def fingerprint(self) -> dict:
        """What identifies the content: a changed file is another source."""
        hasher, total = xxhash.xxh3_128(), 0
        for path in self.files:
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: hasher)
                total += file.tell()
            hasher.update(f"|{total}|".encode())
        return {"files": len(self.files), "bytes": total, "xxh3_128": hasher.hexdigest()}

    def each_file(self) -> Iterator[Path]:
        self.bytes_before, self.bytes_in_file = 0, 0
        for path in self.files:
            yield path
            self.bytes_before, self.bytes_in_file = self.bytes_before + path.stat().st_size, 0

    @cached_property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def bytes_done(self) -> tuple[int, int]:
        return self.bytes_before + self.bytes_in_file, self.bytes

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row | BadRow]:
        for where, row in self._rows(skip, [self.field]):
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


@dataclass
class TextFiles(LocalFiles):
    """Each file is an item; separator: stands between documents within a file, if not empty."""

    separator: str = ""
    as_bytes: bool = False  # each byte is a character
    surveys: dict[Path, Survey] = dataclasses.field(default_factory=dict)

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[TextFile]:
        return islice((TextFile(path, self) for path in self.each_file()), skip, None)

    def survey(self) -> list[Survey]:
        """Of each file; reads those that were not read yet."""
        return [TextFile(path, self).survey() for path in self.files]

    def fingerprint(self) -> dict:
        found = [survey[:2] for survey in self.survey()]
        return {"files": len(found), "characters": sum(n for n, _ in found),
                "xxh3_64": xxhash.xxh3_64_hexdigest(repr(found).encode()),
                "separator": self.separator}  # fmt: skip


class JsonRows(LocalFiles):
    """The rows of JSON files: an object (or a list) a line, or one list of objects."""

    def _rows(self, skip: int = 0, columns: object = None) -> Iterator[tuple[str, object]]:
        number = 0
        for path in self.each_file():
            rows = _json_list if _is_one_list(files.check_kind(path, "JSON")) else files.json_lines
            with files.opened(path) as (stream, raw):
                for where, row in rows(path, stream):
                    number += 1
                    if number > skip:
                        self.bytes_in_file = raw.tell()
                        yield where, row


class ParquetRows(LocalFiles):
    """The rows of parquet files; of items, only the one column is read."""

    def _rows(
        self, skip: int = 0, columns: list[str] | None = None
    ) -> Iterator[tuple[str, object]]:
        pa = files.train_extra("pyarrow", "parquet files")
        import pyarrow.parquet as pq

        number = 0
        for path in self.each_file():
            try:
                with pq.ParquetFile(path) as file:
                    names = file.schema_arrow.names
                    for name in set(columns or ()) - set(names):
                        raise ValueError(no_field(name, names, path))
                    done, rows, size = 0, file.metadata.num_rows, path.stat().st_size
                    for batch in file.iter_batches(256, columns=columns):
                        done += len(batch)
                        self.bytes_in_file = size * done // rows
                        unread = batch[min(len(batch), max(0, skip - number)) :]
                        number += len(batch)
                        for n, row in enumerate(unread.to_pylist(), number - len(unread) + 1):
                            yield f"{path}: row {n}", row
            except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
                if getattr(error, "errno", None) is not None:
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

    def bookmark(self, items: int) -> dict | None:
        """The last known state of the stream at or before an item; those before it are dropped."""
        if not (known := max((n for n in self.marks if n <= items), default=0)):
            return None
        self.marks = {n: state for n, state in self.marks.items() if n >= known}
        return {"items": known, "state": self.marks[known]}

    def read(self, skip: int = 0, bookmark: dict | None = None) -> Iterator[Row | BadRow]:
        stream, first = self._load(), 0
        if bookmark is not None:
            stream.load_state_dict(bookmark["state"])
            first = bookmark["items"]
            self.marks = {first: bookmark["state"]}
        for number, (where, row) in enumerate(self._rows(stream, first), first + 1):
            if number % BOOKMARK_EVERY == 0:
                self.marks[number] = stream.state_dict()
            if number > skip:
                item = _row_of(row, self.field, where)
                if self.starts and number > 1 and isinstance(item, Row):
                    item.starts = bool(re.match(self.starts, item.text))
                yield item

    def objects(self) -> Iterator[tuple[str, dict]]:
        return self._rows(self._load(), 0)

    def _rows(self, stream, number: int) -> Iterator[tuple[str, dict]]:
        """Of a stream that stands after so many rows."""
        rows, end = iter(stream), object()
        while True:
            try:
                row = next(rows, end)
            except Exception as error:  # whatever the network libraries of the hub raise
                raise OSError(
                    f"reading {self.repo} from the hub failed at row {number}: {error}; the same "
                    "command goes on where this one stopped"
                ) from error
            if row is end:
                return
            number += 1
            yield f"{self.repo}: row {number}", row

    def _load(self):
        hub = files.train_extra("datasets", "data sets of the hub")
        try:
            return hub.load_dataset(
                self.repo, self.config or None, split=self.split, streaming=True,
                revision=self.commit or self.revision,
            )  # fmt: skip
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise ValueError(f"{self.repo}:{self.config}, split {self.split}: {error}") from error
        except OSError as error:
            raise _unreachable(self.repo, error) from error


def hub_commit(repo: str, revision: str | None = None) -> str:
    """The commit that a revision of a data set on the hub is now. Raises OSError, ImportError."""
    hub = files.train_extra("huggingface_hub", "the hub's files")
    try:
        return hub.HfApi().dataset_info(repo, revision=revision).sha
    except Exception as error:  # whatever the network libraries of the hub raise
        raise _unreachable(repo, error) from error


def _unreachable(name: str, error: Exception) -> OSError:
    reason = str(error).strip().split("\n")[0]
    if Path(name).exists():
        return OSError(
            f"{name}: no data set of the hub ({reason}); what lies here is not of save_to_disk: "
            "name it with --text, --jsonl or --parquet"
        )
    return OSError(
        f"{name}: the hub cannot be reached ({reason}); check the name and the network (and "
        "HF_HUB_OFFLINE), or fetch its files elsewhere and name them (prepare: --parquet or "
        "--jsonl; sft and dpo: --data)"
    )


def _is_one_list(head: bytes) -> bool:
    """Whether a JSON file is one list; else each line is a row, which may be a list as well."""
    head = head.lstrip(b" \t\r\n\xef\xbb\xbf")
    line, _, rest = head.partition(b"\n")
    return head[:1] == b"[" and not (line.rstrip()[-1:] == b"]" and rest.lstrip()[:1] == b"[")


def _json_list(path: Path, stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    """The elements of a JSON list, holding no more than a block and an element of it."""
    blocks, parse = codecs.getreader("utf-8-sig")(stream), json.JSONDecoder().raw_decode
    text, at, number, wanted, more = "", 0, 0, files.BLOCK_CHARS, True
    while True:
        where = f"{path}: element {number + 1} of the list"
        try:
            if more and len(text) - at < wanted:
                block = blocks.read(wanted)
                text, at, more = text[at:] + block, 0, bool(block)
                continue
            at = (BEFORE_ELEMENT if number else BEFORE_FIRST).match(text, at).end()
            if text[at : at + 1] == "]":
                break
            value, at = parse(text, at)
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deeply") from error
        except ValueError as error:
            if not more or wanted >= files.LONGEST or isinstance(error, UnicodeDecodeError):
                raise ValueError(f"{where}: {error}") from error
            wanted *= 2  # the element is longer than what is at hand
            continue
        number, wanted = number + 1, files.BLOCK_CHARS
        yield f"{path}: element {number}", value
    rest = text[at + 1 :].strip() or blocks.read(files.BLOCK_CHARS).strip()
    if rest:
        raise ValueError(
            f"{path}: more stands after the list's end (after element {number}): {rest[:20]!r}; "
            "make it one list, or an object a line"
        )


def _row_of(row, name: str, where: str) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        text = f"{where} is a {type(row).__name__}, not an object with fields"
        return BadRow("not an object", text)
    if name not in row:
        return BadRow(f"no field {name!r}", no_field(name, list(row), where))
    if not isinstance(row[name], str | None):
        kind = type(row[name]).__name__
        text = f"{where}: field {name!r} holds {kind}, not text; name another --field"
        return BadRow(f"field {name!r} is not text", text)
    return Row(row[name] or "", where=where)


def no_field(name: str, names: list[str], where: str | Path) -> str:
    return f"{where}: no field {name!r}; its fields are {', '.join(map(repr, names))}"
