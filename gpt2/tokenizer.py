"""Text to token ids and back: GPT-2's BPE (through tiktoken), bytes, characters, and the BPE that a
Hugging Face folder has in its tokenizer.json.

The GPT-2 vocabulary lies in gpt2/assets and is checked by hash, so nothing is ever downloaded. A
tokenizer is written into data manifests and checkpoints as a small dict (to_dict, from_dict), so
that a model is always sampled with the tokenizer that it was trained with.
"""

import functools
import json
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


class JsonTokenizer(Tokenizer):
    """A BPE of bytes that is described by a tokenizer.json, by the tokenizers library.

    Special tokens are found in text only where allow_special turns <|endoftext|> into eot. Raises
    ValueError for another kind of tokenizer, ImportError without that library.
    """

    name = "json"

    def __init__(self, content: dict, eot: int | None):
        try:
            import tokenizers
        except ImportError as error:
            words = "a tokenizer.json of its own needs tokenizers: pip install tokenizers"
            raise ImportError(words) from error
        self.content = content
        symbols = {symbol: bytes([byte]) for byte, symbol in enumerate(byte_symbols())}
        try:
            added, vocab = content.get("added_tokens") or [], content["model"]["vocab"]
            ids = vocab | {token["content"]: token["id"] for token in added}
            pre = content["pre_tokenizer"]
            levels = [p for p in pre.get("pretokenizers", [pre]) if p["type"] == "ByteLevel"]
            after = (content.get("post_processor") or {}).get("type", "ByteLevel")
            right = content["model"]["type"] == "BPE" and not content["model"].get("dropout")
            right &= symbols.keys() <= vocab.keys() and after == "ByteLevel" and len(levels) == 1
            right &= not levels[0]["add_prefix_space"] and content["decoder"]["type"] == "ByteLevel"
            ordinary = [token for token in added if not token["special"]]
            plain = content | {"added_tokens": ordinary, "truncation": None, "padding": None}
            self._library = tokenizers.Tokenizer.from_str(json.dumps(plain))
            self.vocab_size = max(ids.values()) + 1
            right &= min(ids.values()) == 0 and self.vocab_size <= 2 * len(ids)
        except Exception as error:  # the library raises its errors as Exception
            raise ValueError(f"not a tokenizer that is understood ({error!r:.150})") from error
        if not right:
            raise ValueError(
                "a tokenizer of another kind than BPE of all 256 bytes with ids from 0 on, without "
                "dropout, a space before the text or tokens around it"
            )
        self._pieces = [b""] * self.vocab_size
        for token, i in ids.items():
            bytewise = token in vocab and symbols.keys() >= {*token}
            self._pieces[i] = b"".join(map(symbols.get, token)) if bytewise else token.encode()
        if eot is not None and not (type(eot) is int and 0 <= eot < self.vocab_size):
            raise ValueError(f"eos_token_id {eot!r:.40} of config.json is none of its tokens")
        self.eot = eot

    def _encode(self, text: str) -> list[int]:
        return self._library.encode(well_formed(text), add_special_tokens=False).ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        self._check(ids)
        return b"".join(self._pieces[i] for i in ids)

    def to_dict(self) -> dict:
        return {"name": self.name, "json": self.content, "eot": self.eot}


def byte_symbols() -> list[str]:
    """The character by which a vocabulary of bytes writes each of the 256; source: GPT-2's
    encoder.py, bytes_to_unicode."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in shown)
    symbols = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [symbols[b] for b in range(256)]


def from_dict(description: dict) -> Tokenizer:
    """The tokenizer that to_dict described. Raises ValueError for one that is not known."""
    match description:
        case {"name": "gpt2"}:
            return GPT2Tokenizer()
        case {"name": "byte"}:
            return ByteTokenizer()
        case {"name": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case {"name": "json", "json": dict(content), "eot": eot}:
            return JsonTokenizer(content, eot)
    words = "expected gpt2, byte, char or json"
    raise ValueError(f"unknown tokenizer {str(description)[:80]}: {words}")


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
