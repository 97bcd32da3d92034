"""Words that several options take, and words for error messages."""

import difflib
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "wsd"]
Switch = Literal["auto", "on", "off"]
Kernels = Literal["auto", "triton", "torch"]


def suggest(word: str, known) -> str:
    """'did you mean X?' if a known word is close, else the list of known words."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(sorted(known))


def nearest_multiples(value: int, of: int) -> str:
    """The multiples around value, as text for an error message."""
    below = value // of * of
    return f"{below} and {below + of}" if below else str(of)
