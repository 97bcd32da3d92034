"""Text as it is generated, read and shown.

It comes as whole characters as soon as they are known, up to a stop string. gpt2.generate knows
only token ids. A token may hold part of a character, or part of a stop string and text before or
after it, so the text is kept as bytes and cut there. UTF-8 bytes of a stop string occur in a text
exactly where its characters do.
"""

import codecs
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2.tokenizer import Tokenizer


class GrowingText:
    """The text of one row, token by token.

    text: all that is certain not to be part of a stop string.  stopped: a stop string came.
    Of several stop strings the one that ends first counts, however the tokens are cut.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
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
        lengths = (n for s in self._stops for n in range(1, len(s)) if data.endswith(s[:n]))
        certain = len(data) - max(lengths, default=0)
        self._held = data[certain:]
        return self._show(data[:certain])

    def finish(self) -> str:
        """After the last token: returns the rest of the text; half a character is U+FFFD."""
        held, self._held = self._held, b""
        return self._show(held, final=True)

    def _show(self, data: bytes, final: bool = False) -> str:
        shown = self._decoder.decode(data, final)
        self.text += shown
        return shown


class RowTexts:
    """The texts of all rows; an instance is the `stop` of gpt2.generate, which ends a row at a stop
    string. After generation call finish(), then texts(n_rows).

    show: called with (row, text) for every piece of text that has become certain.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (),
        show: Callable[[int, str], None] = lambda row, text: None,
    ):  # fmt: skip
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self._rows = defaultdict(lambda: GrowingText(tokenizer, stop_strings))
        self._show = show

    def __call__(self, row: int, tokens: list[int]) -> bool:
        self._pass_on(row, self._rows[row].push(tokens[-1]))
        return self._rows[row].stopped

    def finish(self) -> None:
        """Passes on what was held back."""
        for row, text in sorted(self._rows.items()):
            self._pass_on(row, text.finish())

    def texts(self, n_rows: int) -> list[str]:
        return [self._rows[row].text for row in range(n_rows)]

    def _pass_on(self, row: int, text: str) -> None:
        if text:
            self._show(row, text)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 text file: one a line; or, where a blank line stands between two
    texts, each block of lines between blank lines is one. Lines end at LF or CR LF only.

    Raises OSError (missing), ValueError (not UTF-8, or no prompt in it).
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at, byte = error.start, error.object[error.start]
        raise ValueError(f"{path}: not UTF-8 text, byte {at} is {byte:#x}: save it so") from None
    text = text.replace("\r\n", "\n")
    blocks = [block for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]
    prompts = blocks if len(blocks) > 1 else [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt: write one a line, or blank lines between them")
    return [prompt.strip("\n") for prompt in prompts]
