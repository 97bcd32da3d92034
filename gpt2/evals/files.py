"""Where the evaluations' data lie, and how they get there.

A file is looked for in the data folder and in the task's folder inside it, also compressed; one
that is nowhere is downloaded there, once.
"""

import errno
import os
import shutil
import urllib.request
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from string import ascii_letters, digits
from typing import TypeVar

from gpt2.data.files import COMPRESSED, json_lines, opened, text_blocks, train_extra
from gpt2.tokenizer import Tokenizer

Item = TypeVar("Item")
# Of each task: the folders of its file, in this order, its names, its licence, and what to
# download: an address, or (repository, configuration, split) on the hub, whose rows are lines.
FILES = {
    "hellaswag": (
        ("hellaswag",), ("hellaswag_val.jsonl",), "MIT",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    ),
    "lambada": (
        ("lambada",), ("lambada_test.jsonl", "lambada_openai.jsonl"), "public, see its authors",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    ),
    "wikitext2": (
        ("wikitext2", "wikitext-2-raw"), ("wiki.test.raw",), "CC BY-SA 3.0",
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ),
    # The raw test texts of WikiText-2 and -103 are the same articles, so either's file will do.
    "wikitext103": (
        ("wikitext103", "wikitext-103-raw", "wikitext2", "wikitext-2-raw"), ("wiki.test.raw",),
        "CC BY-SA 3.0", ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
    ),
}  # fmt: skip


def find_file(task: str, data_dir: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """The task's file in data_dir, downloaded if need be.

    Raises OSError, with the place where the file is expected, where it cannot be had; ValueError
    for a tokenizer that lacks plain letters: no reason to download anything.
    """
    folders, names, licence, source = FILES[task]
    for folder, name, ending in product((*folders, "."), names, COMPRESSED):
        if (path := Path(data_dir) / folder / f"{name}{ending}").is_file():
            return path
    try:
        _ = tokenizer and tokenizer.encode(f" {ascii_letters}{digits}.,")
    except ValueError as error:
        raise ValueError(f"{task} is English, which the model cannot read: {error}") from error
    path = Path(data_dir) / folders[0] / names[0]
    partial = Path(f"{path}.partial")
    print(f"fetching {path} ({licence})", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            with urllib.request.urlopen(source, timeout=60) as response, open(partial, "wb") as out:
                shutil.copyfileobj(response, out, 1 << 20)
        else:
            repo, name, split = source
            hub = train_extra("datasets", "data sets of the hub")
            rows = hub.load_dataset(repo, name, split=split, streaming=True)
            with open(partial, "w", encoding="utf-8", newline="\n") as out:
                out.writelines(row["text"] for row in rows)
    except Exception as error:  # whatever the network libraries of the hub raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            errno.ENOENT,
            f"{task} needs this file (or with .xz, .gz, .bz2, .zst), and {source} cannot be "
            f"fetched ({reason}): put it there, or name its folder with --data_dir",
            str(path),
        ) from error
    os.replace(partial, path)
    return path


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most limit of the items, evenly spaced: files are often sorted by kind."""
    n = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def read_examples(
    path: str | Path, encode: Callable[[dict, int], Item], limit: int | None = None
) -> list[Item]:
    """encode(object, its number from 0 on) for the lines of a .jsonl file, or evenly spaced ones
    where limit is less.

    Raises OSError, and encode's ValueError with the line.
    """
    with opened(Path(path)) as (stream, _):
        rows, found = list(json_lines(Path(path), stream)), []
    for number, (where, row) in evenly([*enumerate(rows)], limit):
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}, not an object with fields")
        try:
            found.append(encode(row, number))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not found:
        raise ValueError(f"{path}: empty, there is nothing to evaluate")
    return found


def read_text(path: str | Path) -> str:
    """A whole text file, compressed or not. Raises OSError, ValueError (not UTF-8, empty)."""
    text = "".join(block for block, _ in text_blocks(Path(path)))
    if not text.strip():
        raise ValueError(f"{path}: empty, there is nothing to evaluate")
    return text
