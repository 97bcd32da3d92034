import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.cli import printable
from gpt2.text import GrowingText, RowTexts, read_prompts
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first, found by looking at every beginning."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@given(
    st.text("ab\n \N{SNOWMAN}\N{GRINNING FACE}é", max_size=30),
    st.lists(st.text("ab\n \N{SNOWMAN}é", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_text_ends_exactly_before_a_stop_string(text, stops, bytewise):
    tokenizer = ByteTokenizer() if bytewise else GPT2Tokenizer()
    growing, shown = GrowingText(tokenizer, stops), ""
    expected, stops_there = cut(text, stops)
    for token in tokenizer.encode(text):
        shown += growing.push(token)
        assert growing.text == shown and expected.startswith(shown)  # nothing is taken back
        if growing.stopped:
            break
    shown += growing.finish()
    assert (shown, growing.text, growing.stopped) == (expected, expected, stops_there)


def test_a_token_may_hold_part_of_a_stop_string_or_of_a_character():
    tokenizer = GPT2Tokenizer()
    tokens = tokenizer.encode(" something else")
    growing = GrowingText(tokenizer, ["thing el"])
    assert growing.push(tokens[0]) == " some"  # the rest may become the stop string
    assert growing.push(tokens[1]) == "" and growing.stopped and growing.finish() == ""
    assert growing.push(tokens[1]) == ""
    tokens = tokenizer.encode("\N{SNOWMAN}")
    growing = GrowingText(tokenizer)
    assert [growing.push(t) for t in tokens] == [""] * (len(tokens) - 1) + ["\N{SNOWMAN}"]
    growing.push(tokens[0])
    assert growing.finish() == "\N{REPLACEMENT CHARACTER}"


def test_rows_have_texts_of_their_own():
    tokenizer, shown = ByteTokenizer(), []
    rows = RowTexts(tokenizer, ["ab"], lambda row, text: shown.append((row, text)))
    assert not rows(0, [ord("a")]) and not rows(1, [ord("b")])
    assert rows(0, [ord("a"), ord("b")]) and not rows(1, [ord("b"), ord("a")])
    rows.finish()
    assert rows.texts(3) == ["", "ba", ""] and shown == [(1, "b"), (1, "a")]
    with pytest.raises(ValueError, match="must not be empty"):
        RowTexts(tokenizer, ["x", ""])


def test_what_would_steer_a_terminal_is_escaped():
    harmless = "a\tb\n\N{SNOWMAN} \N{COMBINING ACUTE ACCENT}"
    assert printable(harmless) == harmless
    assert printable("\x1b[31mred\r\x07\x9b2J") == r"\x1b[31mred\r\x07\x9b2J"
    assert printable("\u202egnp.exe\u2066") == r"\u202egnp.exe\u2066"


@pytest.mark.parametrize(
    "content, prompts",
    [
        ("one\ntwo\r\nthree", ["one", "two", "three"]),
        ("\n\none\n", ["one"]),
        ("a\nb\n\nc\n \t\n\nd\n", ["a\nb", "c", "d"]),
        ("one\ntwo\n\n", ["one", "two"]),
        ("\ufeff  indented\n", ["  indented"]),
        *[(f"a{c}b\nc\n", [f"a{c}b", "c"]) for c in "\u2028\u2029\x85\x0c\x0b\x1c\x1e"],
    ],
)
def test_prompts_of_a_file(tmp_path, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    assert read_prompts(path) == prompts


def test_prompts_files_that_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(OSError, match="No such file"):
        read_prompts(path)
    for content, message in ((b"na\xefve", "not UTF-8 .* byte 2 is 0xef"), (b" \n\n", "no prompt")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
