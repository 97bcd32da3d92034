"""The pipeline of prepare_data: text in, shards and a manifest out, whatever interrupts it.

A folder that exists is complete. A preparation works in FOLDER.partial beside it, with

    train_000000.bin ...  shards, of which the last of each split may still grow
    journal.json          what was asked for, the shards that are finished, how much of the others
                          counts, and the place in the source after it; replaced atomically after
                          each shard, every CHECKPOINT_S seconds, and when it is interrupted or ends
                          with an error: what is finished is never removed
    lock                  held (flock) by the process that writes, and names it

and ends by writing manifest.json and renaming the folder. A restart cuts the growing shards to what
the journal counts and reads on from its place. The tokens do not depend on where a preparation was
cut (gpt2.data.encode says why), so the shards are the same bytes as without interruption.

End-of-text stands before each document, as build-nanogpt and llm.c have it; a single text has none.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpt2.tokenizer as tok
from gpt2.data.datasets import Dataset, UrlText, find_dataset, make_source
from gpt2.data.encode import (
    CHUNK_CHARS,
    cut_anywhere,
    default_workers,
    encode_chunks,
    find_cut,
    make_chunks,
    make_encode,
)
from gpt2.data.hub_shards import fetch_shards
from gpt2.data.progress import Progress
from gpt2.data.readers import hub_commit
from gpt2.data.shard_writer import ShardWriter, write_json
from gpt2.data.shards import open_shards, read_manifest
from gpt2.data.sources import Position, Source
from gpt2.options import PrepareConfig

MANIFEST_FORMAT, JOURNAL_FORMAT = 1, 2
CHECKPOINT_S = 30.0


def prepare(config: PrepareConfig) -> Path:
    """Tokenizes what config names into its folder, unless it is there; returns the folder.

    Goes on with an interrupted preparation. Raises ValueError (unknown data set, text that is not
    UTF-8, a field that is not there, too little text, damaged folder), OSError (missing file, a
    folder that holds something else or that another process writes, no room, no network) and
    ImportError (a package of the train extra).
    """
    dataset = find_dataset(config.name) if config.name else None
    path = config.text or config.jsonl or config.parquet
    out = Path(config.out or Path("data") / _default_name(config, path))
    name = dataset.source if dataset else config.hf or str(Path(path).resolve())
    job = _Tokens(config, dataset) if dataset and dataset.kind == "shards" else _Texts(config, name)
    made_from = json.loads(json.dumps({"source": name} | job.made_from))
    if out.exists():
        return _check_done(out, made_from)
    if dataset and config.max_documents is None and config.max_shards is None:
        _check_room(out, 2 * dataset.tokens)
    partial = out.with_name(f"{out.name}.partial")
    with _locked(partial, out) as mine:
        if not mine:
            return _check_done(out, made_from)
        start = time.monotonic()
        journal = _read_journal(partial, made_from)
        try:
            found = job.run(partial, made_from, journal)
        except BaseException:
            if not (partial / "journal.json").exists():  # nothing is finished
                shutil.rmtree(partial)
            raise
        manifest = {
            "format": MANIFEST_FORMAT,
            "made_from": made_from,
            "tokenizer": job.tokenizer.to_dict(),
            "tokenizer_sha256": tokenizer_sha256(job.tokenizer),
            "source": name,
            "licence": dataset.licence if dataset else "that of the text",
            "command": shlex.join(["python", *sys.argv]),
            "version": _version(),
            **found,
        }
        write_json(partial / "manifest.json", manifest)
        os.rename(partial, out)
        for leftover in ("journal.json", "lock", "download"):
            (out / leftover).unlink(missing_ok=True)
        shutil.rmtree(out / ".cache", ignore_errors=True)  # huggingface_hub's
    _report(out, found["splits"], job.tokenizer, time.monotonic() - start)
    return out


def tokenizer_sha256(tokenizer: tok.Tokenizer) -> str:
    """Identifies a vocabulary: the hash of each id's bytes, in order."""
    hasher = hashlib.sha256(f"{tokenizer.name} {tokenizer.vocab_size}\n".encode())
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.decode_bytes([i])
        hasher.update(len(piece).to_bytes(4, "little") + piece)
    return hasher.hexdigest()


class _Tokens:
    """Fetching shards that are tokens already; each is one step, so there is no place to note."""

    def __init__(self, config: PrepareConfig, dataset: Dataset):
        if config.tokenizer not in ("", "gpt2") or config.max_documents is not None:
            raise ValueError(
                f"{config.name} is tokenized already: it has neither another tokenizer nor "
                "max_documents; max_shards makes it smaller"
            )
        self.dataset = dataset
        self.tokenizer = tok.from_dict({"name": "gpt2"})
        self.n_train = min(config.max_shards or dataset.train_shards, dataset.train_shards)
        self.made_from = {"max_shards": self.n_train}

    def run(self, folder: Path, made_from: dict, journal: dict | None) -> dict:
        """The rest of the work; returns its part of the manifest."""
        source = self.dataset.source
        commits = journal["commits"] if journal else {source: hub_commit(source)}
        _write_journal(folder, made_from, commits, Position(), None, [])
        splits = fetch_shards(self.dataset, commits[source], folder, self.n_train)
        return {"commits": commits, "splits": splits}


class _Texts:
    """Tokenizing text, from the journal's place on."""

    tokenizer: tok.Tokenizer

    def __init__(self, config: PrepareConfig, name: str):
        if config.max_shards is not None:
            raise ValueError("max_shards goes with data sets of token shards: use max_documents")
        self.name, dataset = name, find_dataset(config.name) if config.name else None
        self.source = make_source(config)
        self.kind = config.tokenizer or (dataset.tokenizer if dataset else "gpt2")
        self.expected = dataset.tokens if dataset and config.max_documents is None else None
        self.shard_tokens = config.shard_tokens
        self.workers = default_workers() if config.workers is None else config.workers
        self.made_from = {
            "tokenizer": self.kind, "shard_tokens": config.shard_tokens,
            "max_documents": config.max_documents, "parts": self.source.fingerprint(),
        }  # fmt: skip

    def run(self, folder: Path, made_from: dict, journal: dict | None) -> dict:
        """Tokenizes the rest; returns its part of the manifest."""
        self.folder, self.full_made_from = folder, made_from
        names = [None] if self.source.first_val else self.source.splits
        self.writers = [ShardWriter(folder, name, self.shard_tokens) for name in names]
        position, bookmark = Position(), None
        if journal:
            for writer, state in zip(self.writers, journal["streams"], strict=True):
                writer.resume(state)
            position, bookmark = Position(*journal["position"]), journal["bookmark"]
            documents, tokens = self._counts()
            print(f"going on after {documents:,} documents, {tokens:,} tokens", flush=True)
        try:
            self.commits = self.source.pin(journal["commits"] if journal else {})
            for reader, _ in self.source.parts:
                if isinstance(reader, UrlText):
                    reader.fetch(folder)
            self.tokenizer = _make_tokenizer(self.kind, self.source, self.name)
            self._tokenize(position, bookmark)
            splits = self._close()
        finally:
            for writer in self.writers:
                writer.abandon()
        for line in self.source.left_out.lines():
            print(line)
        return {"commits": self.commits, "left_out": self.source.left_out, "splits": splits}

    def _tokenize(self, position: Position, bookmark: dict | None) -> None:
        source, before, saved = self.source, self._counts()[1], time.monotonic()
        raw = any(getattr(reader, "encoding", "") == "latin-1" for reader, _ in source.parts)
        cut = find_cut if self.tokenizer.name == "gpt2" else cut_anywhere
        chunks = encode_chunks(
            make_chunks(source.pieces(position, bookmark), CHUNK_CHARS, cut),
            make_encode(self.tokenizer, "latin-1" if raw else "utf-8"),
            eot=self.tokenizer.eot if source.separate else None, workers=self.workers,
        )  # fmt: skip
        progress = Progress(self.folder.name.removesuffix(".partial"))
        # After each chunk; what a later, interrupted chunk has written does not count.
        state = None
        try:
            for chunk, encoded in chunks:
                full = [self.writers[split].append(*found) for split, found in encoded.items()]
                state = chunk.end, [writer.state() for writer in self.writers]
                if any(full) or time.monotonic() - saved > CHECKPOINT_S:
                    self._checkpoint(*state)
                    saved = time.monotonic()
                documents, tokens = self._counts()
                progress.update(documents, tokens, tokens - before, self._fraction(tokens))
        except (KeyboardInterrupt, OSError, ValueError):
            if state is not None:
                with contextlib.suppress(OSError):  # the disk may be full
                    self._checkpoint(*state)
                    print(f"{self.folder}: what is finished is kept, the same command goes on from "
                          "there", flush=True)  # fmt: skip
            raise
        finally:
            progress.close()
            chunks.close()

    def _fraction(self, tokens: int) -> float | None:
        read = self.source.fraction_read()
        return min(1.0, tokens / self.expected) if read is None and self.expected else read

    def _checkpoint(self, position: Position, streams: list[dict]) -> None:
        for writer in self.writers:
            writer.sync()
        bookmark = self.source.bookmark(position)
        _write_journal(
            self.folder, self.full_made_from, self.commits, position, bookmark, streams
        )

    def _counts(self) -> tuple[int, int]:
        return sum(w.n_documents for w in self.writers), sum(w.n_tokens for w in self.writers)

    def _close(self) -> dict:
        splits = {name: {"tokens": 0, "documents": 0, "shards": []} for name in self.source.splits}
        for writer in self.writers:
            writer.close()
            for split, shard in writer.shards:
                splits[split]["shards"].append(shard)
                splits[split]["tokens"] += shard["tokens"]
                splits[split]["documents"] += shard["documents"]
        for name, split in splits.items():
            if not split["tokens"]:
                reasons = "; ".join([f"{self._counts()[0]} documents in all",
                                     *self.source.left_out.lines()])  # fmt: skip
                raise ValueError(
                    f"{self.name}: too little text, the {name} split would be empty ({reasons}); "
                    "take more text, another --val_fraction or --val, or smaller --shard_tokens"
                )
        return splits


def _make_tokenizer(kind: str, source: Source, name: str) -> tok.Tokenizer:
    if kind != "char":
        return tok.from_dict({"name": kind})
    characters = source.characters()
    if not characters:
        raise ValueError(f"{name}: too little text, there is not one character")
    return tok.CharTokenizer(characters)


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[bool]:
    """Makes the working folder this process's own; yields False where `out` got done meanwhile.

    Raises OSError where another process has it, or where it is a folder of something else. The lock
    goes with the process, however it ends.
    """
    while True:
        if partial.exists() and not (partial / "lock").exists() and any(partial.iterdir()):
            raise OSError(
                errno.EEXIST, "holds something else, and would be the place to work in: choose "
                "another --out", str(partial)
            )  # fmt: skip
        partial.mkdir(parents=True, exist_ok=True)
        try:
            file = open(partial / "lock", "a+")
        except FileNotFoundError:  # another process has just finished
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise OSError(
                    errno.EBUSY,
                    f"{owner} is preparing this folder: wait for it, or choose another --out",
                    str(out),
                ) from None
            try:
                current = os.path.samestat(os.stat(partial / "lock"), os.fstat(file.fileno()))
            except FileNotFoundError:
                current = False
            if not current:  # it was renamed or removed between open and flock
                continue
            if out.exists():
                shutil.rmtree(partial)
                yield False
                return
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield True
            return


def _check_done(out: Path, made_from: dict) -> Path:
    """A second run: nothing to do, or an error that says what differs."""
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None or "splits" not in manifest:
        raise OSError(
            errno.EEXIST, "exists and holds something else: choose another --out", str(out)
        )
    if manifest.get("made_from") != made_from:
        raise OSError(
            errno.EEXIST,
            "exists and holds something else "
            f"({_difference(manifest.get('made_from'), made_from)}): choose another --out",
            str(out),
        )
    shards = [s for split in manifest["splits"].values() for s in split["shards"]]
    open_shards([out / s["file"] for s in shards])
    counts = ", ".join(f"{s['tokens']:,} {n} tokens" for n, s in manifest["splits"].items())
    print(f"{out} is prepared already: {counts}")
    return out


def _write_journal(
    folder: Path, made_from: dict, commits: dict, position: Position, bookmark, streams: list[dict]
) -> None:
    journal = {"format": JOURNAL_FORMAT, "made_from": made_from, "commits": commits,
               "position": list(position), "bookmark": bookmark, "streams": streams}  # fmt: skip
    write_json(folder / "journal.json", journal)


def _read_journal(partial: Path, made_from: dict) -> dict | None:
    path = partial / "journal.json"
    if not path.exists():
        return None
    try:
        journal = json.loads(path.read_text())
        before = journal["made_from"]
        complete = {"commits", "position", "bookmark", "streams"} <= journal.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error!r}); delete {partial} and start again"
        ) from error
    if not complete or journal.get("format") != JOURNAL_FORMAT:
        raise ValueError(f"{path}: of another version; delete {partial} and start again")
    if before != made_from:
        raise OSError(
            errno.EEXIST,
            "an interrupted preparation with other arguments lies here "
            f"({_difference(before, made_from)}): finish it with those, or delete this folder",
            str(partial),
        )
    return journal


def _difference(before, now: dict) -> str:
    if not isinstance(before, dict):
        return "made by another program"
    for key, value in now.items():
        if before.get(key) != value:
            if key == "parts":
                return "its text, splits or fields are others"
            return f"{key} is {before.get(key)} there and {value} now"
    return "made by another version"


def _check_room(out: Path, needed: int) -> None:
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    partial = out.with_name(f"{out.name}.partial")
    there = sum(f.stat().st_size for f in partial.glob("*.bin")) if partial.exists() else 0
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"about {needed / 1e9:.1f} GB are needed here and {free / 1e9:.1f} GB are free: make "
            "room, choose another --out, or take fewer --max_documents",
            str(folder),
        )


def _report(out: Path, splits: dict, tokenizer: tok.Tokenizer, seconds: float) -> None:
    counts = ", ".join(f"{s['tokens']:,} {name} tokens" for name, s in splits.items())
    documents = sum(s["documents"] for s in splits.values())
    shards = sum(len(s["shards"]) for s in splits.values())
    print(f"{out}: {counts}, {tokenizer.name} tokenizer with {tokenizer.vocab_size:,} entries")
    print(f"{documents:,} documents in {shards} shards, {seconds:.1f} s")


def _default_name(config: PrepareConfig, path: str) -> str:
    hub = config.hf.replace("/", "_").replace(":", "_")
    return config.name or hub or Path(path).resolve().name.split(".")[0]


def _version() -> str:
    try:
        return f"gpt2-triton {importlib.metadata.version('gpt2-triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "gpt2-triton, not installed"
