import re
import sys
from importlib import resources

import pytest
import regex
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import tokenizer as tok

GPT2, BYTE = tok.GPT2Tokenizer(), tok.ByteTokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [GPT2, BYTE], ids=["gpt2", "byte"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_gpt2_equals_transformers():
    assets = resources.files("gpt2") / "assets"
    theirs = transformers.GPT2Tokenizer(str(assets / "encoder.json"), str(assets / "vocab.bpe"))
    text = (assets / "tiny_shakespeare.txt").read_text()[:20000] + "  naïve\n\n\t 猫 1234's 🤖"
    assert GPT2.encode(text) == theirs(text, verbose=False)["input_ids"]
    assert GPT2.encode("hello world") == [31373, 995]
    assert (GPT2.vocab_size, GPT2.eot) == (50257, 50256)


@BOTH
@given(text=TEXT)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


@given(text=TEXT)
def test_char_round_trip(text):
    chars = tok.CharTokenizer(text + "x")
    assert chars.decode(chars.encode(text)) == text
    again = tok.from_dict(chars.to_dict())
    assert again.encode(text) == chars.encode(text)


@BOTH
def test_special_tokens_only_where_asked_for(tokenizer):
    text = f"a{tok.END_OF_TEXT}b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert tokenizer.eot not in plain
    assert special == tokenizer.encode("a") + [tokenizer.eot] + tokenizer.encode("b")
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text


@given(st.text("a'1! \n\t\x0b\x1c\x85\xa0\u2028\u3000", max_size=40))
def test_parting_runs_of_white_space_changes_no_token(text):
    for longest in (1, 2, 5):
        parts = tok.split_long_blanks(text, longest)
        assert "".join(parts) == text
        assert [t for part in parts for t in GPT2.encode(part)] == GPT2.encode(text)


def test_white_space_is_what_the_pattern_takes_for_it():
    every = [chr(i) for i in range(sys.maxunicode + 1)]
    blanks = {c for c in every if regex.match(r"\p{White_Space}", c)}
    assert {c for c in every if re.match(tok.BLANK, c)} == blanks


def test_a_million_white_spaces_before_a_word():
    text = "x" + " " * 1_000_001 + "end\n"
    assert GPT2.encode(text) == [87, *[220] * 1_000_000, *GPT2.encode(" end\n")]


@BOTH
def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.encode("a\ud800b\ud83d\ude00") == tokenizer.encode("a\ufffdb\U0001f600")


def test_errors():
    chars = tok.CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"character 'z' at position 2 .*3 characters"):
        chars.encode("abz")
    for tokenizer in (GPT2, BYTE, chars):
        assert tok.from_dict(tokenizer.to_dict()).name == tokenizer.name
        with pytest.raises(ValueError, match="outside the"):
            tokenizer.decode([99999])
    with pytest.raises(ValueError, match="unknown tokenizer"):
        tok.from_dict({"name": "sentencepiece"})
    assert BYTE.decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"  # bytes that are no UTF-8
