"""Text in any number and size of documents to tokens: in parallel, in order, in bounded memory.

pieces -> chunks -> worker processes -> tokens, in the order of the pieces.

A document may be longer than memory: it then comes in several pieces and is cut where GPT-2's
pattern provably cuts, so that the tokens are those of the whole document, whatever the sizes of
pieces and chunks. That place is before a space or newline that follows a character which is no
white space:

  - only white space may follow white space in a token of the pattern, except that one space may
    open a token. So the token with the character before the cut ends there, and, as the pattern
    never looks back, what follows is tokenized as if the text began there.
  - what comes before is tokenized the same without what follows: the pattern looks ahead only at
    the end of white space, and before the cut such a run ends with a character that is present.

In text without white space the place is before an ASCII or CJK punctuation mark that follows a
letter or digit, for the same reasons: no token holds a letter and then a mark.
"""

import os
import re
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from gpt2.data import encode_worker
from gpt2.data.encode_worker import Encoded, Segments, encode_chunk, make_encode
from gpt2.tokenizer import Tokenizer

# About 0.1 s of work: small beside the memory of a process, large beside a message's cost.
CHUNK_CHARS = 1 << 19
# Starting processes pays from about here on.
INLINE_CHUNKS = 4
CUT_BEFORE_SPACE = re.compile(r"(?<=\S)[ \n]")
CUT_BEFORE_MARK = re.compile(
    "(?<=[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])[!-/:-@\\[-`{-~\u3001\u3002\uff0c]"
)


class Position(NamedTuple):
    """A place in a source: `chars` characters into item number `items` of its part `part`."""

    part: int = 0
    items: int = 0
    chars: int = 0


class Piece(NamedTuple):
    """Text from `at` on, of one split; starts: a document starts with it."""

    split: int
    starts: bool
    text: str
    at: Position


class Chunk(NamedTuple):
    """Work for one process; end: the source's position behind it."""

    segments: Segments
    end: Position


def find_cut(text: str, limit: int) -> int:
    """A place at which text may be cut: the last up to limit, else the next one; 0 if none."""
    for pattern in (CUT_BEFORE_SPACE, CUT_BEFORE_MARK):
        for start in (max(1, limit - 4096), 1):
            last = 0
            for match in pattern.finditer(text, start, limit + 1):
                last = match.start()
            if last:
                return last
    later = CUT_BEFORE_SPACE.search(text, limit) or CUT_BEFORE_MARK.search(text, limit)
    return later.start() if later else 0


def make_chunks(pieces: Iterable[Piece], chunk_chars: int = CHUNK_CHARS) -> Iterator[Chunk]:
    """Joins small documents and cuts large ones into chunks of about chunk_chars characters."""
    segments: Segments = []
    size = 0
    for split, starts, text, end in _segments(pieces, chunk_chars):
        segments.append((split, starts, text))
        size += len(text)
        if size >= chunk_chars:
            yield Chunk(segments, end)
            segments, size = [], 0
    if segments:
        yield Chunk(segments, end)


def _segments(
    pieces: Iterable[Piece], limit: int
) -> Iterator[tuple[int, bool, str, Position]]:  # split, starts, text, position behind it
    held: list[Piece] = []  # the pieces of one document that are not handed on yet
    size, enough = 0, limit  # enough: characters at which to look for a cut

    def end() -> Position:
        at = held[-1].at
        return at._replace(chars=at.chars + len(held[-1].text))

    for piece in pieces:
        if piece.starts and held:
            yield held[0].split, held[0].starts, "".join(p.text for p in held), end()
            held, size, enough = [], 0, limit
        held.append(piece)
        size += len(piece.text)
        while size >= enough:
            first, text = held[0], "".join(p.text for p in held)
            cut = find_cut(text, limit)
            if not cut:
                enough = 2 * size  # looking again after each piece would take quadratic time
                break
            rest = cut  # of the characters to hand on, those in the pieces not looked at yet
            while rest >= len(held[0].text):
                rest -= len(held.pop(0).text)
            piece = held[0]
            at = piece.at._replace(chars=piece.at.chars + rest)
            held[0] = Piece(piece.split, False, piece.text[rest:], at)
            size, enough = size - cut, limit
            yield first.split, first.starts, text[:cut], at
    if held:
        yield held[0].split, held[0].starts, "".join(p.text for p in held), end()


class _Worker:
    """A tokenizing process and the numbers of the chunks that it has yet to answer, in order."""

    def __init__(self, setup):
        here, there = socket.socketpair()
        with there:
            # -P: the folder of the script is no place to import from.
            self.process = subprocess.Popen(
                [sys.executable, "-P", encode_worker.__file__, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(here.detach())
        self.owes: deque[int] = deque()
        self.call(self.connection.send, setup)

    def call(self, method, *arguments):
        try:
            return method(*arguments)
        except (EOFError, ConnectionError) as error:
            status = self.process.wait()
            raise OSError(
                f"a tokenizing process ended with status {status}"
                + (" (out of memory? fewer --workers need less)" if status == -9 else "")
                + "; the same command goes on where this one stopped"
            ) from error


class Encoder:
    """Tokenizes chunks in worker processes; use it in a `with` block, which ends them.

    workers: number of processes; 0 tokenizes here.  eot: put before each document, if not None.
    text_encoding: what the byte tokenizer counts as the bytes of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, eot: int | None, workers: int, text_encoding: str = "utf-8"
    ):
        data = {"gpt2": "encoding", "char": "chars"}.get(tokenizer.name)
        self._setup = (
            (tokenizer.name, getattr(tokenizer, data) if data else text_encoding), eot
        )  # fmt: skip
        self._n_workers = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *exception) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            try:
                worker.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers = []

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Each chunk with its tokens, in order. Raises OSError where a process dies."""
        chunks = iter(chunks)
        first = list(islice(chunks, INLINE_CHUNKS))
        few = len(first) < INLINE_CHUNKS
        chunks = chain(first, chunks)
        if few or self._n_workers == 0:
            encode, eot = make_encode(*self._setup[0]), self._setup[1]
            for chunk in chunks:
                yield chunk, encode_chunk(encode, eot, chunk.segments)
        else:
            yield from self._encode_in_workers(chunks)

    def _encode_in_workers(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        self._workers = [_Worker(self._setup) for _ in range(self._n_workers)]
        by_connection = {w.connection: w for w in self._workers}
        window = 4 * len(self._workers)  # chunks in memory at most
        given: dict[int, Chunk] = {}
        done: dict[int, Encoded] = {}
        n_given = n_out = 0
        more = True
        while True:
            while more and n_given - n_out < window:
                worker = min(self._workers, key=lambda w: len(w.owes))
                if len(worker.owes) >= 2:  # one in work, one at hand
                    break
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                    break
                worker.call(worker.connection.send, chunk.segments)
                worker.owes.append(n_given)
                given[n_given] = chunk
                n_given += 1
            if not more and n_out == n_given:
                return
            for connection in wait([w.connection for w in self._workers if w.owes]):
                worker = by_connection[connection]
                done[worker.owes.popleft()] = worker.call(connection.recv)
            while n_out in done:
                yield given.pop(n_out), done.pop(n_out)
                n_out += 1


def default_workers() -> int:
    """One for each CPU that this process may use; the parent needs a few percent of one."""
    return len(os.sched_getaffinity(0))
