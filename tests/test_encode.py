"""Tokens do not depend on how text was cut, packed or handed to threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data import encode as module
from gpt2.data.encode import cut_anywhere, encode_chunks, find_cut, make_chunks, make_encode
from gpt2.data.readers import split_documents
from gpt2.data.sources import Piece, Position
from gpt2.tokenizer import from_dict

GPT2 = from_dict({"name": "gpt2"})
ENCODE = make_encode(GPT2)
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


def collect(chunks, split=0, workers=0) -> tuple[list[int], list[int]]:
    tokens, starts = [], []
    for _, answer in encode_chunks(chunks, ENCODE, eot=50256, workers=workers):
        if split in answer:
            starts += (answer[split][1] + len(tokens)).tolist()
            tokens += answer[split][0].tolist()
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
    tokens, starts = collect(make_chunks(everything, chunk_chars))
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
    assert collect(chunks[:n])[0] + collect(make_chunks(rest, chunk_chars))[0] == expected


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["<|", "|>", "<|x|>", "\n", "a", "\n<|x|>\n"])), st.integers(1, 9))
def test_separators_part_documents_whatever_the_blocks(parts, size):
    """A separator takes the newlines after it along; offsets are those of the whole text."""
    text = "".join(parts)
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    found = []
    for offset, starts, part in split_documents(iter(blocks), "<|x|>"):
        assert part and text[offset:].startswith(part)
        if starts:
            found.append("")
        found[-1] += part
    first, *others = text.split("<|x|>")
    assert found == [d for d in (first, *(o.lstrip("\n") for o in others)) if d]


def test_text_without_white_space_or_cuts(monkeypatch):
    assert find_cut("a" * 100, 50) == 0
    assert find_cut("ab,cd", 3) == 2
    assert find_cut("\u4e2d\u6587\u3002\u4e2d", 3) == 2
    assert find_cut("aaaa bb", 2) == 4  # none up to the limit: the next one
    assert find_cut(" " * 100, 50) == 0
    document = pieces([["x" * 300] * 5 + [" y"] * 2000])
    chunks = list(make_chunks(document, 100))
    assert chunks[0].segments[0][2] == "x" * 1500
    assert max(len(s[2]) for c in chunks[1:] for s in c.segments) <= 102
    chunks = list(make_chunks(document, 100, cut_anywhere))
    assert {len(s[2]) for c in chunks for s in c.segments} == {100}
    monkeypatch.setattr(module, "LONGEST_UNCUT", 1000)
    with pytest.raises(ValueError, match="row 1, character 0: 1,500 characters without a break"):
        list(make_chunks(pieces([["x" * 1500]]), 100))


def test_workers_keep_the_order_and_end_with_an_error():
    rng = np.random.default_rng(0)
    documents = [["word " * int(n) + str(i)] for i, n in enumerate(rng.integers(1, 400, 300))]
    all_pieces = pieces(documents, split=lambda i: i % 3 == 0)
    for split, n_documents in ((0, 200), (1, 100)):
        tokens, starts = collect(make_chunks(iter(all_pieces), 5000), split, workers=3)
        assert (tokens, starts) == collect(make_chunks(all_pieces, 5000), split)
        assert len(starts) == n_documents
    encode = make_encode(from_dict({"name": "char", "chars": "word 0123456789"}))
    bad = make_chunks(pieces([*documents, ["w\u00e9"], *documents]), 5000, cut_anywhere)
    with pytest.raises(ValueError, match="before file or row .*'\u00e9' at position 1 does not"):
        list(encode_chunks(bad, encode, eot=None, workers=3))


def test_other_tokenizers_and_broken_unicode():
    chars = from_dict({"name": "char", "chars": "ab\n\u00e9\U0001f600"})
    text = "ba\n\U0001f600\u00e9"
    assert make_encode(chars)(text).tolist() == chars.encode(text)
    byte = from_dict({"name": "byte"})
    assert make_encode(byte)("a\u00e9").tolist() == [97, 0xC3, 0xA9]
    assert make_encode(byte, as_bytes=True)("a\u00e9").tolist() == [97, 0xE9]
    assert ENCODE("a\ud800b").tolist() == GPT2.encode("a\ufffdb")
    blank = "x" + " " * 1_000_001 + "end"
    assert ENCODE(blank).tolist() == [87, *[220] * 1_000_000, *GPT2.encode(" end")]
