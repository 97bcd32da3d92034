"""A source of text: readers, and the rules that give their text to splits.

Text comes item by item as pieces; a Position says where a preparation stopped, and reading goes on
from there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2.data.encode import Piece, Position


@dataclass(frozen=True)
class Whole:
    """Rule: everything goes to one split."""

    split: int

    def cuts(self, item) -> list[tuple[float, int]]:
        """(end in characters, split) of the item's parts, in order."""
        return [(math.inf, self.split)]


@dataclass(frozen=True)
class ByHash:
    """Rule: a document is for validation (split 1) if its text's hash falls into the fraction."""

    val_fraction: float

    def cuts(self, item) -> list[tuple[float, int]]:
        return [(math.inf, int(item.hash() < self.val_fraction * 2.0**64))]


@dataclass(frozen=True)
class Tail:
    """Rule: each text is cut at these fractions of its characters, the first part is split 0."""

    at: tuple[float, ...]

    def cuts(self, item) -> list[tuple[float, int]]:
        length = item.length()
        return [(int(length * f), i) for i, f in enumerate(self.at)] + [(length, len(self.at))]


@dataclass
class Source:
    """parts: readers with their rules, in the order in which they are read.

    splits: names.  separate: whether end-of-text stands before each document.  first_val: there is
    one stream, and its first shard is val.  max_documents: of each part.
    """

    parts: list[tuple]
    splits: tuple[str, ...] = ("train", "val")
    separate: bool = True
    first_val: bool = False
    max_documents: int | None = None

    def pieces(self, start: Position, bookmark: dict | None = None) -> Iterator[Piece]:
        """The text from a position on; bookmark: what bookmark() gave for that position."""
        for part, (reader, rule) in enumerate(self.parts):
            if part < start.part:
                continue
            here = start if part == start.part else Position(part)
            items = reader.items(here.items, bookmark if part == start.part else None)
            for number, item in enumerate(items, here.items):
                if self.max_documents is not None and number >= self.max_documents:
                    break
                skip = here.chars if number == here.items else 0
                yield from _item_pieces(item, rule.cuts(item), Position(part, number), skip)

    def bookmark(self, position: Position) -> dict | None:
        return self.parts[position.part][0].bookmark(position.items)

    def fraction_read(self) -> float | None:
        """How much was read, 0 to 1; None where that is not known."""
        done, total = map(sum, zip(*(r.bytes_done() for r, _ in self.parts), strict=True))
        return done / total if total else None

    def fingerprint(self) -> list:
        return [[reader.fingerprint(), type(rule).__name__, vars(rule)]
                for reader, rule in self.parts]  # fmt: skip

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
    offset = begin = 0  # begin: where the part of this split began
    for block in item.blocks():
        while block:
            while offset >= end:
                begin = end
                end, split = next(cuts, (math.inf, split))
            text = block[: int(end - offset)] if end - offset < len(block) else block
            block = block[len(text) :]
            new = text[max(0, skip - offset) :]
            if new:
                place = offset + len(text) - len(new)
                starts = place == begin and (begin > 0 or item.starts)
                yield Piece(split, starts, new, at._replace(chars=place))
            offset += len(text)
