"""Text as it is generated, read and shown.

It comes as whole characters as soon as they are known, up to a stop string. gpt2.generate knows
only token ids. A token may hold part of a character, or part of a stop string and text before or
after it, so the text is kept as bytes and cut there. UTF-8 bytes of a stop string occur in a text
exactly where its characters do.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2.tokenizer import Tokenizer


class GrowingText:
    """The text of one row, token by token.

    text: all that is certain not to be part of a stop string.  stopped: a stop string came.
    Of several stop strings the one that ends first counts, however the tokens are cut.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self.text, self.stopped = "", False
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stop_strings]
        self._held = b""  # the longest end of the bytes that may become a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Appends a token; returns the text that has become certain, perhaps none."""
        if self.stopped:
            return ""
        data = self._held + self._tokenizer.decode_bytes([token])
        found = [(at + len(s), at) for s in self._stops if (at := data.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, b""
            return self._show(data[: min(found)[1]], final=True)
        kept = max((_overlap(data, stop) for stop in self._stops), default=0)
        self._held = data[len(data) - kept :]
        return self._show(data[: len(data) - kept])

    def finish(self) -> str:
        """No more tokens will come: returns the rest of the text; half a character is U+FFFD."""
        held, self._held = self._held, b""
        return self._show(held, final=True)

    def _show(self, data: bytes, final: bool = False) -> str:
        shown = self._decoder.decode(data, final)
        self.text += shown
        return shown


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest end of data with which stop begins, without being complete."""
    longest = min(len(stop) - 1, len(data))
    return next((n for n in range(longest, 0, -1) if data.endswith(stop[:n])), 0)


class RowTexts:
    """The texts of all rows; an instance is the `stop` of gpt2.generate, which ends a row at a stop
    string.

    show: called with (row, text) for every piece of text that has become certain.
    After generation call finish(), then texts(n_rows).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        show: Callable[[int, str], None] | None = None,
    ):
        self._new = lambda: GrowingText(tokenizer, stop_strings)
        self._new()  # refuses empty stop strings now
        self._rows: dict[int, GrowingText] = {}
        self._show = show

    def __call__(self, row: int, tokens: list[int]) -> bool:
        text = self._row(row)
        self._pass_on(row, text.push(tokens[-1]))
        return text.stopped

    def finish(self) -> None:
        """Passes on what was held back."""
        for row, text in sorted(self._rows.items()):
            self._pass_on(row, text.finish())

    def texts(self, n_rows: int) -> list[str]:
        return [self._row(row).text for row in range(n_rows)]

    def _row(self, row: int) -> GrowingText:
        if row not in self._rows:
            self._rows[row] = self._new()
        return self._rows[row]

    def _pass_on(self, row: int, text: str) -> None:
        if text and self._show is not None:
            self._show(row, text)


# Control characters but tab and newline, and what reverses the direction of a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """text for a terminal or a page: what would steer it stands there escaped, as in \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 text file: one a line; or, where a blank line stands between two
    texts, each block of lines between blank lines is one. Lines end at LF or CR LF only.

    Raises OSError (missing), ValueError (not UTF-8, or no prompt in it).
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text, byte {error.start} is {error.object[error.start]:#x}: save "
            "it as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n")
    blocks = [block for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]
    prompts = blocks if len(blocks) > 1 else [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt: write one a line, or blank lines between them")
    return [prompt.strip("\n") for prompt in prompts]
