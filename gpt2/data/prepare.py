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
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import gpt2.tokenizer as tok
from gpt2.data.datasets import Dataset, UrlText, fetch_shards, find_dataset, make_source
from gpt2.data.encode import default_workers, encode_pieces
from gpt2.data.foreign import MegatronDocuments, is_saved
from gpt2.data.readers import hub_commit
from gpt2.data.shard_writer import ShardWriter, as_splits, write_json
from gpt2.data.shards import open_shards, read_manifest
from gpt2.data.sources import Position
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
    start = time.monotonic()
    dataset = find_dataset(config.name) if config.name else None
    hf = "" if is_saved(config.hf) else config.hf
    local = config.text or config.jsonl or config.parquet or config.megatron or config.hf
    path = Path(local).resolve()
    name = dataset.source if dataset else hf or str(path)
    hub = hf.replace("/", "_").replace(":", "_")
    out = Path(config.out or Path("data") / (config.name or hub or path.name.split(".")[0]))
    tokens = dataset is not None and dataset.kind == "shards"
    job = (_Tokens if tokens else _Texts)(config, dataset, name)
    made_from = json.loads(json.dumps({"source": name} | job.made_from))
    if out.exists():
        return _check_done(out, made_from)
    partial = out.with_name(f"{out.name}.partial")
    if dataset and not partial.exists() and config.max_documents is config.max_shards is None:
        _check_room(out, 2 * dataset.tokens)
    with _locked(partial):
        if out.exists():  # another process has just finished it
            shutil.rmtree(partial, ignore_errors=True)
            return _check_done(out, made_from)
        journal = _read_journal(partial, made_from)

        def note(commits: dict, position: Position, bookmark, streams: list[dict]) -> None:
            write_json(partial / "journal.json", {
                "format": JOURNAL_FORMAT, "made_from": made_from, "commits": commits,
                "position": position, "bookmark": bookmark, "streams": streams,
            })  # fmt: skip

        try:
            found = job.run(partial, note, journal)
        except BaseException:
            if not (partial / "journal.json").exists():  # nothing is finished
                shutil.rmtree(partial)
            raise
        manifest = {
            "format": MANIFEST_FORMAT, "made_from": made_from,
            "tokenizer": job.tokenizer.to_dict(),
            "tokenizer_sha256": tokenizer_sha256(job.tokenizer), "source": name,
            "licence": dataset.licence if dataset else "that of the text",
            "command": shlex.join(sys.orig_argv), "version": _version(), **found,
        }  # fmt: skip
        write_json(partial / "manifest.json", manifest)
        os.rename(partial, out)
        for leftover in ("journal.json", "lock", "download"):
            (out / leftover).unlink(missing_ok=True)
        shutil.rmtree(out / ".cache", ignore_errors=True)  # huggingface_hub's
    splits = found["splits"].values()
    documents, shards = sum(s["documents"] for s in splits), sum(len(s["shards"]) for s in splits)
    print(f"{out}: {_sizes(manifest)}, {job.tokenizer.name} tokenizer with "
          f"{job.tokenizer.vocab_size:,} entries\n{documents:,} documents in {shards} shards, "
          f"{time.monotonic() - start:.1f} s")  # fmt: skip
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

    def __init__(self, config: PrepareConfig, dataset: Dataset, name: str):
        if config.tokenizer not in ("", "gpt2") or config.max_documents is not None:
            raise ValueError(
                f"{config.name} is tokenized already: it has neither another tokenizer nor "
                "max_documents; max_shards makes it smaller"
            )
        self.dataset, self.tokenizer = dataset, tok.from_dict({"name": "gpt2"})
        n_train = min(config.max_shards or dataset.train_shards, dataset.train_shards)
        self.made_from = {"max_shards": n_train}

    def run(self, folder: Path, note: Callable, journal: dict | None) -> dict:
        """The rest of the work; returns its part of the manifest."""
        source = self.dataset.source
        commits = journal["commits"] if journal else {source: hub_commit(source)}
        note(commits, Position(), None, [])
        n_train = self.made_from["max_shards"]
        splits = fetch_shards(self.dataset, commits[source], folder, n_train)
        return {"commits": commits, "splits": splits}


class _Texts:
    """Tokenizing text, from the journal's place on."""

    tokenizer: tok.Tokenizer

    def __init__(self, config: PrepareConfig, dataset: Dataset | None, name: str):
        if config.max_shards is not None:
            raise ValueError("max_shards goes with data sets of token shards: use max_documents")
        self.name, self.source, self.shard_tokens = name, make_source(config), config.shard_tokens
        self.kind = config.tokenizer or (dataset.tokenizer if dataset else "gpt2")
        self.expected = dataset.tokens if dataset and config.max_documents is None else None
        self.workers = default_workers() if config.workers is None else config.workers
        self.made_from = {
            "tokenizer": self.kind, "shard_tokens": config.shard_tokens,
            "max_documents": config.max_documents, "parts": self.source.fingerprint(),
        }  # fmt: skip

    def run(self, folder: Path, note: Callable, journal: dict | None) -> dict:
        """The rest of the work; returns its part of the manifest."""
        source, position, bookmark = self.source, Position(), None
        names = [None] if source.first_val else source.splits
        self.writers = [ShardWriter(folder, name, self.shard_tokens) for name in names]
        try:
            if journal:
                for writer, state in zip(self.writers, journal["streams"], strict=True):
                    writer.resume(state)
                position, bookmark = Position(*journal["position"]), journal["bookmark"]
                documents, tokens = self._counts()
                print(f"going on after {documents:,} documents, {tokens:,} tokens", flush=True)
            commits = source.pin(journal["commits"] if journal else {})
            for reader, _ in source.parts:
                if isinstance(reader, UrlText):
                    reader.fetch(folder)
            self.tokenizer = tok.from_dict({"name": self.kind}) if self.kind != "char" else (
                tok.CharTokenizer(source.characters() or self._too_little("train"))
            )  # fmt: skip

            def checkpoint(position: Position, streams: list[dict]) -> None:
                for writer in self.writers:
                    writer.sync()
                note(commits, position, source.bookmark(position), streams)

            self._tokenize(folder, source.pieces(position, bookmark), checkpoint)
            for writer in self.writers:
                writer.close()
        finally:
            for writer in self.writers:
                writer.abandon()
        splits = as_splits(source.splits, [s for writer in self.writers for s in writer.shards])
        for name, split in splits.items():
            if not split["tokens"]:
                self._too_little(name)
        for line in source.left_out.lines():
            print(line)
        return {"commits": commits, "left_out": source.left_out, "splits": splits}

    def _tokenize(self, folder: Path, pieces, checkpoint) -> None:
        source, saved = self.source, time.monotonic()
        as_bytes, as_tokens = (
            any(isinstance(reader, kind) for reader, _ in source.parts)
            for kind in (UrlText, MegatronDocuments)
        )
        chunks = encode_pieces(pieces, self.tokenizer, separate=source.separate, as_bytes=as_bytes,
                               as_tokens=as_tokens, workers=self.workers)  # fmt: skip
        progress = Progress(folder.name.removesuffix(".partial"), self._counts()[1])
        # After each chunk; what a later, interrupted chunk has written does not count.
        state = None
        try:
            for chunk, encoded in chunks:
                full = [self.writers[split].append(*found) for split, found in encoded.items()]
                state = chunk.end, [writer.state() for writer in self.writers]
                if any(full) or time.monotonic() - saved > CHECKPOINT_S:
                    checkpoint(*state)
                    saved = time.monotonic()
                documents, tokens = self._counts()
                fraction = source.fraction_read()
                if fraction is None and self.expected:
                    fraction = min(1.0, tokens / self.expected)
                progress.update(documents, tokens, fraction)
        except (KeyboardInterrupt, OSError, ValueError):
            if state is not None:
                with contextlib.suppress(OSError):  # the disk may be full
                    checkpoint(*state)
                    print(f"{folder}: what is finished is kept, the same command goes on from "
                          "there", flush=True)  # fmt: skip
            raise
        finally:
            progress.close()
            chunks.close()

    def _counts(self) -> tuple[int, int]:
        return sum(w.n_documents for w in self.writers), sum(w.n_tokens for w in self.writers)

    def _too_little(self, split: str) -> NoReturn:
        found = [f"{self._counts()[0]} documents in all", *self.source.left_out.lines()]
        raise ValueError(
            f"{self.name}: too little text, the {split} split would be empty ({'; '.join(found)}); "
            "take more text, another --val_fraction or --val, or smaller --shard_tokens"
        )


class Progress:
    """Of a long preparation, on stderr: a line now and then, in a terminal always the same."""

    def __init__(self, title: str, tokens: int):
        self._title, self._start, self._before = title, time.monotonic(), tokens
        self._begin, self._end, self._every = (
            ("\r", "\x1b[K", 0.25) if sys.stderr.isatty() else ("", "\n", 10.0)
        )
        self._next = self._start + self._every
        # What a run that goes on skipped says nothing about the time left, nor about the speed.
        self._first: tuple[float, float] | None = None

    def update(self, documents: int, tokens: int, fraction: float | None) -> None:
        """fraction: done of all, None where not known."""
        now = time.monotonic()
        if self._first is None and fraction is not None:
            self._first = now, fraction
        if now < self._next:
            return
        self._next = now + self._every
        speed = (tokens - self._before) / max(now - self._start, 1e-9)
        text = f"{self._title}: {documents:,} documents, {tokens:,} tokens, {speed:,.0f}/s"
        if fraction is not None:
            since, first = self._first
            text += f", {fraction:.1%}"
            if fraction > first:
                left = int((now - since) * (1 - fraction) / (fraction - first))
                text += f", ETA {timedelta(seconds=left)}"
        print(f"{self._begin}{text}", end=self._end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the line of a terminal away."""
        if self._begin:
            print(self._begin, end=self._end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Makes the working folder this process's own, however the process ends.

    Raises OSError where another process has it, or where it is a folder of something else.
    """
    while True:
        if partial.exists() and not (partial / "lock").exists() and any(partial.iterdir()):
            problem = "holds something else, and is where to work in: choose another --out"
            raise OSError(errno.EEXIST, problem, str(partial))
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
                problem = f"{owner} is preparing this folder: wait for it, or choose another --out"
                raise OSError(errno.EBUSY, problem, str(partial)) from None
            if os.fstat(file.fileno()).st_nlink == 0:  # it was removed between open and flock
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
            return


def _check_done(out: Path, made_from: dict) -> Path:
    """A second run: nothing to do, or an error that says what differs."""
    manifest = (read_manifest(out) if out.is_dir() else None) or {}
    if "splits" not in manifest or manifest.get("made_from") != made_from:
        differs = _difference(manifest.get("made_from"), made_from)
        problem = f"exists and holds something else ({differs}): choose another --out"
        raise OSError(errno.EEXIST, problem, str(out))
    open_shards([out / s["file"] for split in manifest["splits"].values() for s in split["shards"]])
    print(f"{out} is prepared already: {_sizes(manifest)}")
    return out


def _sizes(manifest: dict) -> str:
    return ", ".join(f"{s['tokens']:,} {name} tokens" for name, s in manifest["splits"].items())


def _read_journal(partial: Path, made_from: dict) -> dict | None:
    path = partial / "journal.json"
    if not path.exists():
        return None
    try:
        journal = json.loads(path.read_text())
        for key in ("commits", "position", "bookmark", "streams"):
            journal[key]
        if journal["format"] != JOURNAL_FORMAT:
            raise ValueError(f"format {journal['format']}, not {JOURNAL_FORMAT}")
        before = journal["made_from"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged, or of another version ({error!r}); delete {partial} and start again"
        ) from error
    if before != made_from:
        problem = ("an interrupted preparation with other arguments lies here "
                   f"({_difference(before, made_from)}): finish it with those, or delete this "
                   "folder")  # fmt: skip
        raise OSError(errno.EEXIST, problem, str(partial))
    return journal


def _difference(before, now: dict) -> str:
    if not isinstance(before, dict):
        return "made by another program"
    key = next((key for key, value in now.items() if before.get(key) != value), None)
    if key is None:
        return "made by another version"
    if key == "parts":
        return "its text, splits or fields are others"
    return f"{key} is {before.get(key)} there and {now[key]} now"


def _check_room(out: Path, needed: int) -> None:
    folder = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = (f"about {needed / 1e9:.1f} GB are needed here and {free / 1e9:.1f} GB are free: "
                   "make room, choose another --out, or take fewer --max_documents")  # fmt: skip
        raise OSError(errno.ENOSPC, problem, str(folder))


def _version() -> str:
    try:
        return f"gpt2-triton {importlib.metadata.version('gpt2-triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "gpt2-triton, not installed"
