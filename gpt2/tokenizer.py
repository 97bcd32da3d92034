"""Text to token ids and back: GPT-2's BPE (through tiktoken), bytes, characters.

The GPT-2 vocabulary lies in gpt2/assets and is checked by hash, so nothing is ever downloaded. A
tokenizer is written into data manifests and checkpoints as a small dict (to_dict, from_dict), so
that a model is always sampled with the tokenizer that it was trained with.
"""

import functools
import re
from abc import ABC, abstractmethod
from importlib import resources

END_OF_TEXT = "<|endoftext|>"

# OpenAI's own files: https://github.com/openai/gpt-2, the hashes tiktoken expects.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# GPT-2's splitting of text into words, in the equivalent form that tiktoken runs fastest.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# The pattern's \s is Unicode's White_Space; Python's would hold \x1c to \x1f as well.
BLANK = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_BLANK = 1 << 19  # characters


def split_long_blanks(text: str, longest: int = LONG_BLANK) -> list[str]:
    r"""text in parts that GPT-2's encoding turns into the tokens of the whole, one after the other.

    For each character of a run of white space, `\s+(?!\S)` notes a place to go back to, and at a
    million of them tiktoken's regex engine panics, which no `except Exception` would catch. Of a
    run before other text that pattern takes all but the last character as one piece. Nothing before
    the run reaches into it, nothing after it looks back, and on its own such a piece is one as well
    (`\s++$`, which notes nothing). So runs of `longest` or more are parted there, without changing
    a token.
    """
    if len(text) <= longest:
        return [text]
    parts, at = [], 0
    for run in re.finditer(f"(?<!{BLANK}){BLANK}{{{longest},}}", text):
        if run.end() < len(text):
            parts += [text[at : run.start()], text[run.start() : run.end() - 1]]
            at = run.end() - 1
    return [*parts, text[at:]]


def well_formed(text: str) -> str:
    """text with lone surrogates (JSON can hold them, UTF-8 cannot) replaced by U+FFFD each."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer(ABC):
    """What every tokenizer offers.

    name: "gpt2", "byte" or "char".  vocab_size: ids lie in [0, vocab_size).
    eot: the id that separates documents, or None where there is none.
    """

    name: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of text. "<|endoftext|>" is eight or so ordinary tokens unless allow_special."""
        special = allow_special and self.eot is not None
        first, *others = text.split(END_OF_TEXT) if special else [text]
        ids = self._encode(first)
        for part in others:
            ids += [self.eot, *self._encode(part)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def decode_bytes(self, ids: list[int]) -> bytes:
        """UTF-8 bytes of ids; one id may hold only part of a character."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of text without special tokens."""

    def to_dict(self) -> dict:
        return {"name": self.name}

    def _check(self, ids: list[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"token id {i} lies outside the {self.name} vocabulary of {self.vocab_size}"
                )


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, 50,257 ids."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        self.encoding = _gpt2_encoding()

    def _encode(self, text: str) -> list[int]:
        parts = [self.encoding.encode_ordinary(part) for part in split_long_blanks(text)]
        return parts[0] if len(parts) == 1 else [token for part in parts for token in part]

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check(ids)
        return self.encoding.decode_bytes(ids)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for the end of text."""

    name, vocab_size, eot = "byte", 257, 256

    def _encode(self, text: str) -> list[int]:
        return list(well_formed(text).encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check(ids)
        return b"".join(END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in ids)


class CharTokenizer(Tokenizer):
    """The characters that occur in one text, in code point order; it has no end of text."""

    name, eot = "char", None

    def __init__(self, chars: str):
        self.chars = "".join(sorted(set(chars)))
        if not 1 <= len(self.chars) <= 1 << 16:
            found = len(self.chars)
            raise ValueError(f"a character tokenizer holds 1 to 65536 characters, got {found}")
        self.vocab_size = len(self.chars)
        self._ids = {c: i for i, c in enumerate(self.chars)}

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            char = error.args[0]
            raise ValueError(
                f"character {char!r} at position {text.index(char)} does not occur in the text "
                f"that this tokenizer was made from ({self.vocab_size} characters); "
                "leave it out, or train with the gpt2 or byte tokenizer"
            ) from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check(ids)
        return "".join(self.chars[i] for i in ids).encode("utf-8", errors="surrogatepass")

    def to_dict(self) -> dict:
        return {"name": self.name, "chars": self.chars}


def from_dict(description: dict) -> Tokenizer:
    """The tokenizer that to_dict described. Raises ValueError for one that is not known."""
    match description:
        case {"name": "gpt2"}:
            return GPT2Tokenizer()
        case {"name": "byte"}:
            return ByteTokenizer()
        case {"name": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
    raise ValueError(f"unknown tokenizer {str(description)[:80]}: expected gpt2, byte or char")


@functools.cache
def _gpt2_encoding():
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    assets = resources.files("gpt2") / "assets"
    vocab, ids = str(assets / "vocab.bpe"), str(assets / "encoder.json")
    ranks = data_gym_to_mergeable_bpe_ranks(vocab, ids, VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    return tiktoken.Encoding(
        "gpt2", explicit_n_vocab=50257, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )  # fmt: skip
