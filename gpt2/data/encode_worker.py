"""One tokenizing process: chunks of text in, uint16 tokens out.

gpt2.data.encode starts it by its path, as a script of its own, and not with multiprocessing: it
then holds only numpy and tiktoken (60 MB, up in 0.2 s) and not the whole of gpt2 with torch (300
MB, 2 s), shares no threads or locks with its parent, and ends by itself when the parent does,
because its socket closes. So this file imports nothing from gpt2.

A chunk is a list of (split, starts, text): text in the order of the corpus, the split it belongs to
and whether a document starts with it. The answer has, for each split, the tokens and where
documents start among them.
"""

import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

Encode = Callable[[str], np.ndarray]
Segments = list[tuple[int, bool, str]]
Encoded = dict[int, tuple[bytes, bytes]]  # split: uint16 tokens, int64 positions of first tokens


def make_encode(kind: str, data) -> Encode:
    """The function text -> tokens (n,) uint16.

    kind "gpt2": data is the tiktoken.Encoding; "byte": the name of the text's encoding; "char": the
    characters in the order of their ids. Raises ValueError for another kind.
    """
    if kind == "gpt2":
        # Skips the list of Python ints that encode_ordinary makes.
        return lambda text: data.encode_to_numpy(_valid(text), disallowed_special=()).astype("<u2")
    if kind == "byte":
        return lambda text: np.frombuffer(_valid(text).encode(data), np.uint8).astype("<u2")
    if kind == "char":
        points = np.frombuffer(data.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = np.zeros(int(points.max()) + 1, "<u2")
        ids[points] = np.arange(len(points))
        return lambda text: ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
    raise ValueError(f"unknown tokenizer {kind!r}: expected gpt2, byte or char")


def encode_chunk(encode: Encode, eot: int | None, segments: Segments) -> Encoded:
    """Tokens of each split in a chunk; eot, if not None, stands before each document."""
    parts: dict[int, list[np.ndarray]] = {}
    starts: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    separator = np.array([] if eot is None else [eot], "<u2")
    for split, is_start, text in segments:
        tokens = parts.setdefault(split, [])
        length = lengths.get(split, 0)
        if is_start:
            starts.setdefault(split, []).append(length)
            tokens.append(separator)
            length += separator.size
        tokens.append(encode(text))
        lengths[split] = length + tokens[-1].size
    return {
        split: (np.concatenate(p).tobytes(), np.array(starts.get(split, []), "<i8").tobytes())
        for split, p in parts.items()
    }


def _valid(text: str) -> str:
    """text with lone surrogates (JSON can hold them, UTF-8 cannot) replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(int(sys.argv[1]))
    chunks: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        # A thread of its own, so that the parent never waits for this process to be ready to read
        # (both could then wait for each other), and the next chunk is here when one is done.
        try:
            while True:
                chunks.put(connection.recv())
        except (EOFError, OSError):
            chunks.put(None)

    (kind, data), eot = connection.recv()
    encode = make_encode(kind, data)
    threading.Thread(target=receive, daemon=True).start()
    try:
        while (segments := chunks.get()) is not None:
            connection.send(encode_chunk(encode, eot, segments))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone


if __name__ == "__main__":
    main()
