"""The data sets that prepare_data knows, and how text becomes shards and a manifest.

A prepared folder holds train_000000.bin, val_000000.bin, ... and manifest.json, which says how it
was made and holds the tokenizer that training and sampling then use.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

import gpt2.tokenizer as tok
from gpt2.config import PrepareConfig, suggest
from gpt2.data.shards import read_manifest, write_shard


@dataclass(frozen=True)
class Dataset:
    """A registered data set: what it is, and its tokenizer ("gpt2", "byte" or "char")."""

    summary: str
    licence: str
    tokenizer: str
    asset: str  # the file in gpt2/assets that holds its text


DATASETS = {
    "shakespeare": Dataset(
        "tiny Shakespeare, 1.1 MB, GPT-2 tokens", "public domain", "gpt2", "tiny_shakespeare.txt"
    ),
    "shakespeare_char": Dataset(
        "tiny Shakespeare, 1.1 MB, characters", "public domain", "char", "tiny_shakespeare.txt"
    ),
}


def prepare(config: PrepareConfig) -> Path:
    """Tokenises what config names into its folder, unless it is there; returns the folder.

    Raises ValueError (unknown data set, text that is not UTF-8, too little text) and OSError
    (missing file, a folder that
    holds something else, no room).
    """
    if config.name and config.name not in DATASETS:
        raise ValueError(f"unknown data set {config.name!r}: {suggest(config.name, DATASETS)}")
    source = config.name or str(Path(config.text).resolve())
    out = Path(config.out or Path("data") / (config.name or Path(config.text).stem))
    kind = config.tokenizer or (DATASETS[config.name].tokenizer if config.name else "gpt2")
    made_from = {"source": source, "tokenizer": kind, "val_fraction": config.val_fraction,
                 "shard_tokens": config.shard_tokens}  # fmt: skip
    if out.exists():
        manifest = read_manifest(out) if out.is_dir() else None
        if manifest is not None and manifest.get("made_from") == made_from:
            print(f"{out} is prepared already: {manifest['tokens']}")
            return out
        raise OSError(
            errno.EEXIST, "exists and holds something else: choose another --out", str(out)
        )
    documents = list(_documents(config))
    tokenizer = _make_tokenizer(kind, documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        tokens = {}
        for split, texts in _split(documents, config.val_fraction).items():
            tokens[split] = _write_split(temporary, split, texts, tokenizer, config.shard_tokens)
            if not tokens[split]:
                raise ValueError(f"{source}: too little text, the {split} split would be empty")
        manifest = {"made_from": made_from, "tokenizer": tokenizer.to_dict(), "tokens": tokens}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = ", ".join(f"{n:,} {split} tokens" for split, n in tokens.items())
    print(f"{out}: {counts}, {tokenizer.name} tokenizer with {tokenizer.vocab_size:,} entries")
    return out


def _documents(config: PrepareConfig) -> Iterator[str]:
    if config.name:
        asset = DATASETS[config.name].asset
        yield (resources.files("gpt2") / "assets" / asset).read_text(encoding="utf-8")
        return
    path = Path(config.text)
    if not path.exists():
        raise OSError(errno.ENOENT, "no such text file or folder", str(path))
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise OSError(errno.ENOENT, "no .txt files in this folder", str(path))
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: not UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}; "
                "convert it first, for instance with iconv"
            ) from error


def _make_tokenizer(kind: str, documents: list[str]) -> tok.Tokenizer:
    if kind == "char":
        return tok.CharTokenizer("".join(sorted(set().union(*documents))))
    return tok.from_dict({"name": kind})


def _split(documents: list[str], val_fraction: float) -> dict[str, list[str]]:
    """The last part of each document is for validation, so that any text gives both splits."""
    cuts = [int(len(d) * (1 - val_fraction)) for d in documents]
    return {
        "train": [d[:cut] for d, cut in zip(documents, cuts, strict=True)],
        "val": [d[cut:] for d, cut in zip(documents, cuts, strict=True)],
    }


def _write_split(
    folder: Path, split: str, texts: Iterable[str], tokenizer: tok.Tokenizer, shard_tokens: int
) -> int:
    """Writes shards of shard_tokens tokens; if there are several texts, each ends with eot."""
    texts = list(texts)
    parts = []
    for text in texts:
        end = [tokenizer.eot] if len(texts) > 1 and tokenizer.eot is not None else []
        parts.append(np.array(tokenizer.encode(text) + end, dtype=np.uint16))
    tokens = np.concatenate(parts)
    for i, start in enumerate(range(0, len(tokens), shard_tokens)):
        write_shard(folder / f"{split}_{i:06}.bin", tokens[start : start + shard_tokens])
    return len(tokens)
