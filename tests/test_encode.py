"""Tokens do not depend on how text was cut, packed or handed to processes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data.encode import Encoder, Piece, Position, find_cut, make_chunks
from gpt2.data.encode_worker import make_encode
from gpt2.tokenizer import from_dict

GPT2 = from_dict({"name": "gpt2"})
ENCODE = make_encode("gpt2", GPT2.encoding)
# What GPT-2's pattern and UTF-8 make hard: contractions, runs of white space of every kind (the
# last ones are white space to Python only), letters, digits and marks of several scripts.
ATOMS = st.sampled_from(
    ["'s", "'", "'re", " ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "Word", "don't", "1", "23", ".",
     ",", "!?", "-", "_", "\x1c", "\x85", "\xa0", "\u3000", "\u2028", "\u00e9", "e\u0301",
     "\u4e2d\u6587", "\u3002", "\uff0c", "\u0661", "\U0001f600", "<|endoftext|>", "\u200b", "\x00"]
)  # fmt: skip
TEXTS = st.lists(ATOMS | st.text(max_size=3), max_size=30).map("".join)


def pieces(documents: list[list[str]], split=lambda i: 0) -> list[Piece]:
    """Documents that come in blocks, as pieces."""
    result = []
    for i, blocks in enumerate(documents):
        chars = 0
        for block in blocks:
            if block:
                result.append(Piece(split(i), chars == 0, block, Position(0, i, chars)))
            chars += len(block)
    return result


def collect(encoded, split=0) -> tuple[list[int], list[int]]:
    tokens, starts = [], []
    for _, answer in encoded:
        for s, (t, d) in answer.items():
            if s == split:
                starts += (np.frombuffer(d, "<i8") + len(tokens)).tolist()
                tokens += np.frombuffer(t, "<u2").tolist()
    return tokens, starts


@settings(max_examples=1500, deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_cutting_gives_the_tokens_of_the_whole(text, limit):
    cut = find_cut(text, limit)
    assert 0 <= cut < max(1, len(text))
    if cut:
        whole = GPT2.encode(text)
        assert ENCODE(text[:cut]).tolist() + ENCODE(text[cut:]).tolist() == whole


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TEXTS, max_size=4), max_size=5), st.integers(1, 50), st.data())
def test_chunks_of_any_size_give_the_same_stream(documents, chunk_chars, data):
    """And reading on from the end of any chunk gives the rest of it."""
    everything = pieces(documents)
    with Encoder(GPT2, eot=50256, workers=0) as encoder:
        tokens, starts = collect(encoder.encode(make_chunks(everything, chunk_chars)))
        expected = []
        for document in documents:
            if text := "".join(document):
                expected += [50256, *GPT2.encode(text)]
        assert tokens == expected
        assert [tokens[i] for i in starts] == [50256] * sum(map(any, documents))
        chunks = list(make_chunks(everything, chunk_chars))
        if not chunks:
            return
        n = data.draw(st.integers(1, len(chunks)))
        end, rest = chunks[n - 1].end, []
        for piece in everything:
            skip = 0
            if piece.at.items == end.items:
                skip = min(len(piece.text), max(0, end.chars - piece.at.chars))
            if piece.at.items >= end.items and piece.text[skip:]:
                at = piece.at._replace(chars=piece.at.chars + skip)
                rest.append(Piece(0, piece.starts and not skip, piece.text[skip:], at))
        before = collect(encoder.encode(chunks[:n]))[0]
        assert before + collect(encoder.encode(make_chunks(rest, chunk_chars)))[0] == expected


def test_text_without_white_space_or_cuts():
    assert find_cut("a" * 100, 50) == 0
    assert find_cut("ab,cd", 3) == 2
    assert find_cut("\u4e2d\u6587\u3002\u4e2d", 3) == 2
    assert find_cut("aaaa bb", 2) == 4  # none up to the limit: the next one
    assert find_cut(" " * 100, 50) == 0
    chunks = list(make_chunks(pieces([["x" * 300] * 5 + [" y"] * 2000]), 100))
    assert chunks[0].segments[0][2] == "x" * 1500
    assert max(len(s[2]) for c in chunks[1:] for s in c.segments) <= 102


def test_workers_keep_the_order():
    rng = np.random.default_rng(0)
    documents = [["word " * int(n) + str(i)] for i, n in enumerate(rng.integers(1, 400, 300))]
    all_pieces = pieces(documents, split=lambda i: i % 3 == 0)
    streams = []
    for workers in (0, 3):
        with Encoder(GPT2, eot=50256, workers=workers) as encoder:
            encoded = list(encoder.encode(make_chunks(iter(all_pieces), 5000)))
        streams.append([collect(encoded, split) for split in (0, 1)])
    assert streams[0] == streams[1]
    assert len(streams[0][0][1]) == 200 and len(streams[0][1][1]) == 100


def test_a_worker_that_dies_is_an_error_and_none_stays():
    endless = (Piece(0, True, "word " * 2000, Position(0, i)) for i in range(10**9))
    with Encoder(GPT2, eot=None, workers=2) as encoder:
        results = encoder.encode(make_chunks(endless, 10_000))
        next(results)
        processes = [w.process for w in encoder._workers]
        os.kill(processes[0].pid, signal.SIGKILL)
        with pytest.raises(OSError, match="ended with status -9 .*fewer --workers"):
            for _ in results:
                pass
    assert all(p.returncode is not None for p in processes)


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import os\n"
        "from gpt2.data.encode import *\n"
        "from gpt2.tokenizer import from_dict\n"
        "with Encoder(from_dict({'name': 'byte'}), eot=None, workers=2) as e:\n"
        "    pieces = (Piece(0, True, 'a' * 1000, Position(0, i)) for i in range(10**9))\n"
        "    r = e.encode(make_chunks(pieces, 1000)); next(r)\n"
        "    print(*(w.process.pid for w in e._workers), flush=True)\n"
        "    for _ in r: pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        pids = [int(p) for p in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{p}") and not zombie(p) for p in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_other_tokenizers_and_broken_unicode():
    chars = from_dict({"name": "char", "chars": "ab\n\u00e9\U0001f600"})
    text = "ba\n\U0001f600\u00e9"
    assert make_encode("char", chars.chars)(text).tolist() == chars.encode(text)
    assert make_encode("byte", "utf-8")("a\u00e9").tolist() == [97, 0xC3, 0xA9]
    assert make_encode("byte", "latin-1")("a\u00e9").tolist() == [97, 0xE9]
    assert ENCODE("a\ud800b").tolist() == GPT2.encode("a\ufffdb")
    with pytest.raises(ValueError, match="unknown tokenizer"):
        make_encode("word", None)
