"""Where the evaluations' data lie, and how they get there.

A file is looked for in the data folder and in the task's folder inside it, also with .xz, .gz or
.bz2 at its end; one that is nowhere is downloaded there, once.
"""

import errno
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2.data.readers import COMPRESSED, HubRows, TextFiles, opened


@dataclass(frozen=True)
class DataFile:
    """A task's file: where it lies (folders, in this order), its names, and what to download.

    Exactly one of url and hub (repository, configuration, split; rows are lines) is given.
    """

    folders: tuple[str, ...]
    names: tuple[str, ...]
    licence: str
    url: str = ""
    hub: tuple[str, str, str] = ("", "", "")


FILES = {
    "hellaswag": DataFile(
        ("hellaswag",), ("hellaswag_val.jsonl",), "MIT",
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    ),
    "lambada": DataFile(
        ("lambada",), ("lambada_test.jsonl", "lambada_openai.jsonl"), "public, see its authors",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    ),
    "wikitext2": DataFile(
        ("wikitext2", "wikitext-2-raw"), ("wiki.test.raw",), "CC BY-SA 3.0",
        hub=("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ),
    # The raw test texts of WikiText-2 and -103 are the same articles, so either's file will do.
    "wikitext103": DataFile(
        ("wikitext103", "wikitext-103-raw", "wikitext2", "wikitext-2-raw"), ("wiki.test.raw",),
        "CC BY-SA 3.0", hub=("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
    ),
}  # fmt: skip


def find_file(task: str, data_dir: str | Path) -> Path:
    """The task's file in data_dir, downloaded if need be.

    Raises OSError, with the place where the file is expected, where it cannot be had.
    """
    file = FILES[task]
    for folder in (*file.folders, "."):
        for name in file.names:
            for ending in COMPRESSED:
                path = Path(data_dir) / folder / f"{name}{ending}"
                if path.is_file():
                    return path
    path = Path(data_dir) / file.folders[0] / file.names[0]
    partial = path.with_name(f"{path.name}.partial")
    print(f"fetching {path} ({file.licence})", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.url:
            _fetch_url(file.url, partial)
        else:
            _fetch_lines(file.hub, partial)
    except (OSError, ValueError, ImportError) as error:
        # ValueError: what the hub's client says without a network.
        reason = str(error).split("\n")[0]
        raise OSError(
            errno.ENOENT,
            f"{task} needs this file (or with .xz, .gz, .bz2), and {file.url or file.hub[0]} "
            f"cannot be fetched ({reason}): put it there, or name its folder with --data_dir",
            str(path),
        ) from error
    os.replace(partial, path)
    return path


def read_text(path: str | Path) -> str:
    """A whole text file, compressed or not. Raises OSError, ValueError (not UTF-8, empty)."""
    text = "".join("".join(item.blocks()) for item in TextFiles([Path(path)]).items())
    if not text.strip():
        raise ValueError(f"{path}: empty, there is nothing to evaluate")
    return text


def json_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, object) for each line of a .jsonl file. Raises OSError, ValueError."""
    path, found = Path(path), False
    with opened(path) as (stream, _):
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            found, where = True, f"{path}: line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not UTF-8 JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a {type(row).__name__}, not an object with fields")
            yield where, row
    if not found:
        raise ValueError(f"{path}: empty, there is nothing to evaluate")


def _fetch_url(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        shutil.copyfileobj(response, file, 1 << 20)


def _fetch_lines(hub: tuple[str, str, str], path: Path) -> None:
    repo, config, split = hub
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in HubRows(repo, config, split).items():
            file.write(row.text)
