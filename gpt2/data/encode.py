"""Text in any number and size of documents to tokens: in parallel, in order, in bounded memory.

pieces -> chunks -> threads -> tokens, in the order of the pieces. (Threads: tiktoken and numpy let
go of Python's lock, and nothing has to be sent to processes, watched or ended.)

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from gpt2.data.sources import Piece, Position
from gpt2.tokenizer import Tokenizer, split_long_blanks, well_formed

CHUNK_CHARS = 1 << 19  # about 0.1 s of work
# Characters without a place to cut: tiktoken needs about 60 bytes and a microsecond for each.
LONGEST_UNCUT = 1 << 24
CUT_BEFORE_SPACE = re.compile(r"(?<=\S)[ \n]")
CUT_BEFORE_MARK = re.compile(
    "(?<=[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])[!-/:-@\\[-`{-~\u3001\u3002\uff0c]"
)
Cut = Callable[[str, int], int]
Encode = Callable[[str], np.ndarray]
Encoded = dict[int, tuple[np.ndarray, np.ndarray]]  # split: uint16 tokens, where documents start


class Chunk(NamedTuple):
    """Work for one thread: (split, whether a document starts, text); end: the position after."""

    segments: list[tuple[int, bool, str]]
    end: Position


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, separate: bool, as_bytes: bool, workers: int,
    as_tokens: bool = False,
) -> Iterator[tuple[Chunk, Encoded]]:  # fmt: skip
    """The whole way; separate: end-of-text before each document; the rest as in the parts below."""
    cut = find_cut if tokenizer.name == "gpt2" and not as_tokens else cut_anywhere
    chunks = make_chunks(pieces, CHUNK_CHARS, cut)
    eot = tokenizer.eot if separate else None
    encode = make_encode(tokenizer, as_bytes, as_tokens)
    return encode_chunks(chunks, encode, eot=eot, workers=workers)


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


def cut_anywhere(text: str, limit: int) -> int:
    """find_cut for tokens that are bytes or characters."""
    return limit if len(text) > limit else 0


def make_chunks(
    pieces: Iterable[Piece], chunk_chars: int = CHUNK_CHARS, cut: Cut = find_cut
) -> Iterator[Chunk]:
    """Joins small documents and cuts large ones into chunks of about chunk_chars characters.

    Raises ValueError where a document has no place to cut in LONGEST_UNCUT characters.
    """
    segments, size = [], 0
    for split, starts, text, end in _segments(pieces, chunk_chars, cut):
        segments.append((split, starts, text))
        size += len(text)
        if size >= chunk_chars:
            yield Chunk(segments, end)
            segments, size = [], 0
    if segments:
        yield Chunk(segments, end)


def _segments(
    pieces: Iterable[Piece], limit: int, find: Cut
) -> Iterator[tuple[int, bool, str, Position]]:  # split, starts, text, position after it
    held: list[Piece] = []  # the pieces of one document that are not handed on yet
    size, enough = 0, limit  # enough: characters at which to look for a cut

    def rest_of_document() -> tuple[int, bool, str, Position]:
        at = held[-1].at
        end = at._replace(chars=at.chars + len(held[-1].text))
        return held[0].split, held[0].starts, "".join(p.text for p in held), end

    for piece in pieces:
        if piece.starts and held:
            yield rest_of_document()
            held, size, enough = [], 0, limit
        held.append(piece)
        size += len(piece.text)
        while size >= enough:
            first, text = held[0], "".join(p.text for p in held)
            cut = find(text, limit)
            if not cut:
                if size > LONGEST_UNCUT:
                    raise ValueError(
                        f"{_place(first.at)}: {size:,} characters without a break between words, "
                        f"above {LONGEST_UNCUT:,}: not text? Leave it out, or use --tokenizer byte"
                    )
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
        yield rest_of_document()


def _place(at: Position) -> str:
    return f"file or row {at.items + 1:,}, character {at.chars:,}"


def make_encode(tokenizer: Tokenizer, as_bytes: bool = False, as_tokens: bool = False) -> Encode:
    """The function text -> tokens (n,) uint16; it raises ValueError for what has no token.

    as_bytes: the characters of the text are bytes; otherwise the byte tokenizer takes UTF-8's.
    as_tokens: they are tokens already.
    """
    if as_tokens:
        return lambda text: np.frombuffer(text.encode("utf-16-le"), "<u2")
    if tokenizer.name == "gpt2":
        # Skips the list of Python ints that encode_ordinary makes.
        encode = tokenizer.encoding.encode_to_numpy
        return lambda text: np.concatenate(
            [encode(part, disallowed_special=()) for part in split_long_blanks(well_formed(text))],
            dtype="<u2", casting="unsafe",
        )  # fmt: skip
    if tokenizer.name == "byte":
        code = "latin-1" if as_bytes else "utf-8"
        return lambda text: np.frombuffer(well_formed(text).encode(code), "u1").astype("<u2")
    ids = np.full(0x110000, -1, np.int32)
    ids[_points(tokenizer.chars)] = np.arange(tokenizer.vocab_size)

    def encode_characters(text: str) -> np.ndarray:
        tokens = ids[_points(text)]
        if tokens.min(initial=0) < 0:
            tokenizer.encode(text)  # raises, with the character
        return tokens.astype("<u2")

    return encode_characters


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def encode_chunk(encode: Encode, eot: int | None, chunk: Chunk) -> Encoded:
    """Tokens of each split in a chunk. Raises ValueError, with the place, for what has none."""
    separator = [] if eot is None else [np.array([eot], "<u2")]
    found: dict[int, tuple[list[np.ndarray], list[int]]] = {}
    try:
        for split, is_start, text in chunk.segments:
            parts, starts = found.setdefault(split, ([], []))
            if is_start:
                starts.append(len(parts))
                parts += separator
            parts.append(encode(text))
    except ValueError as error:
        raise ValueError(f"before {_place(chunk.end)}: {error}") from error
    return {
        split: (np.concatenate(parts), np.cumsum([0, *map(len, parts)])[starts])
        for split, (parts, starts) in found.items()
    }


def encode_chunks(
    chunks: Iterable[Chunk], encode: Encode, *, eot: int | None, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its tokens, in order.

    workers: number of threads; 0 tokenizes in this one. eot: put before each document, if not None.
    """
    if workers == 0:
        yield from ((chunk, encode_chunk(encode, eot, chunk)) for chunk in chunks)
        return
    # Each thread has one in work and one at hand; those done wait for their turn.
    pending, pool = deque(), ThreadPoolExecutor(workers)
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(encode_chunk, encode, eot, chunk)))
            if len(pending) >= 4 * workers:
                chunk, done = pending.popleft()
                yield chunk, done.result()
        for chunk, done in pending:
            yield chunk, done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One for each CPU that this process may use; the reading thread needs a few percent of one."""
    return len(os.sched_getaffinity(0))
