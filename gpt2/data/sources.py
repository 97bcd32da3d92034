"""A source of text: readers, and the rules that give their text to splits.

Text comes item by item as pieces, each with its Position: reading goes on from where a preparation
stopped, and what was counted up to there is in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gpt2.data.files import BadRow, LeftOut
from gpt2.data.readers import HubRows, hub_commit


class Position(NamedTuple):
    """A place in a source: `chars` characters into item number `items` of its part `part`.

    documents: that started in this part, up to here. left_out: (kind, how many, the first) of what
    was read before and not used, in all parts.
    """

    part: int = 0
    items: int = 0
    chars: int = 0
    documents: int = 0
    left_out: tuple[tuple[str, int, str], ...] = ()


class Piece(NamedTuple):
    """Text from `at` on, of one split; starts: a document starts with it."""

    split: int
    starts: bool
    text: str
    at: Position


# Rules: cuts(item) are (end in characters, split) of an item's parts, in order.


@dataclass(frozen=True)
class Whole:
    """Everything goes to one split."""

    split: int

    def cuts(self, item) -> list[tuple[float, int]]:
        return [(math.inf, self.split)]


@dataclass(frozen=True)
class ByHash:
    """A document is for validation (split 1) if its text's hash falls into the fraction."""

    val_fraction: float

    def cuts(self, item) -> list[tuple[float, int]]:
        return [(math.inf, int(item.hash() < self.val_fraction * 2.0**64))]


@dataclass(frozen=True)
class Tail:
    """Each text is cut at these fractions of its characters, the first part is split 0."""

    at: tuple[float, ...]

    def cuts(self, item) -> list[tuple[float, int]]:
        length = item.length()
        return [(int(length * f), i) for i, f in enumerate((*self.at, 1))]


@dataclass
class Source:
    """parts: readers with their rules, in the order in which they are read.

    splits: names.  separate: whether end-of-text stands before each document.  first_val: there is
    one stream, and its first shard is val.  max_documents: of each part.  bad_rows: "error" ends at
    a row that cannot be used, "skip" counts it.  left_out: what was read and not used, so far.
    """

    parts: list[tuple]
    splits: tuple[str, ...] = ("train", "val")
    separate: bool = True
    first_val: bool = False
    max_documents: int | None = None
    bad_rows: Literal["error", "skip"] = "error"
    left_out: LeftOut = field(default_factory=LeftOut)

    def pieces(self, start: Position, bookmark: dict | None = None) -> Iterator[Piece]:
        """The text from a position on; bookmark: what bookmark() gave for that position.

        Raises ValueError for a row that cannot be used, as configured.
        """
        self.left_out = LeftOut({kind: (n, first) for kind, n, first in start.left_out})
        for part in range(start.part, len(self.parts)):
            if part > start.part:
                start, bookmark = Position(part), None
            for piece in self._part(start, bookmark):
                if self.max_documents is not None and piece.at.documents > self.max_documents:
                    break
                yield piece

    def _part(self, start: Position, bookmark: dict | None) -> Iterator[Piece]:
        reader, rule = self.parts[start.part]
        documents = start.documents
        for number, item in enumerate(reader.read(start.items, bookmark), start.items):
            if isinstance(item, BadRow) or item.length() == 0:
                self._leave_out(item)
                continue
            left_out = tuple((kind, n, first) for kind, (n, first) in self.left_out.items())
            at = Position(start.part, number, 0, documents, left_out)
            skip = start.chars if number == start.items else 0
            for piece in _item_pieces(item, rule.cuts(item), at, skip):
                documents = piece.at.documents
                yield piece

    def _leave_out(self, item) -> None:
        if not isinstance(item, BadRow):
            self.left_out.add("no text", f"{item.where}")
        elif self.bad_rows == "error":
            raise ValueError(
                f"{item}; --bad_rows skip leaves such rows out, and counts them"
            ) from item
        else:
            self.left_out.add(item.kind, str(item))

    def pin(self, known: dict[str, str]) -> dict[str, str]:
        """Makes readers of the hub read one commit, those known if any; returns all commits."""
        commits = dict(known)
        for reader, _ in self.parts:
            if isinstance(reader, HubRows):
                if reader.repo not in commits:
                    commits[reader.repo] = hub_commit(reader.repo, reader.revision)
                reader.commit = commits[reader.repo]
        return commits

    def bookmark(self, position: Position) -> dict | None:
        return self.parts[position.part][0].bookmark(position.items)

    def fraction_read(self) -> float | None:
        """How much was read, 0 to 1; None where that is not known."""
        done, total = map(sum, zip(*(r.bytes_done() for r, _ in self.parts), strict=True))
        return done / total if total else None

    def fingerprint(self) -> list:
        return [[r.fingerprint(), type(rule).__name__, vars(rule)] for r, rule in self.parts]

    def characters(self) -> str:
        """Every character that occurs; reads everything."""
        chars: set[str] = set()
        for piece in self.pieces(Position()):
            chars.update(piece.text)
        return "".join(sorted(chars))


def _item_pieces(item, cuts, at: Position, skip: int) -> Iterator[Piece]:
    """An item's text as pieces that end where its splits do, without its first skip characters."""
    cuts = iter(cuts)
    end, split = next(cuts)
    for offset, starts, text in item.parts():
        at = at._replace(documents=at.documents + (starts and offset >= skip))
        while text:
            while offset >= end:
                end, split = next(cuts, (math.inf, split))
                starts = True
            n = min(len(text), end - offset)
            done = min(n, max(0, skip - offset))  # before the position to start from
            if done < n:
                here = at._replace(chars=offset + done)
                yield Piece(split, starts and not done, text[done:n], here)
            offset, text, starts = offset + n, text[n:], False
