"""The data sets that prepare_data knows, and how its options name a source of text."""

import errno
import hashlib
import http.client
import shutil
import urllib.request
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from gpt2.config import suggest
from gpt2.data.files import JSON_SUFFIXES, TEXT_SUFFIXES, find_files, opened
from gpt2.data.readers import HubRows, JsonRows, ParquetRows, TextFiles
from gpt2.data.sources import ByHash, Source, Tail, Whole
from gpt2.options import PrepareConfig

# Fewer text files than this are each cut, and the end is for validation; by hash, a split of so few
# documents would be empty or far from its fraction.
FEW_TEXTS = 100
VAL_FRACTION = 0.1  # of one's own data
WIKITEXT_ARTICLE = r" = [^=]"  # a first-level heading, as in " = Robert Boulter = "


@dataclass(frozen=True)
class Dataset:
    """A registered data set.

    kind: where source lies. "asset": a file of gpt2/assets; "url": an archive with one text file;
    "hub": a data set on the Hugging Face hub; "shards": token files on the hub, already prepared.
    splits: the hub's names of train and, where there is one, val. val: how val is made. "own": the
    source has it; "tail": the text from `fractions` on; "hash": documents by their text's hash;
    "first": the first shard.
    tokens: about how many come out, all splits together.
    """

    summary: str
    kind: str
    source: str
    licence: str
    tokens: int
    tokenizer: str = "gpt2"
    config: str = ""
    field: str = "text"
    splits: tuple[str, ...] = ("train",)
    val: str = "own"
    fractions: tuple[float, ...] = (0.9,)  # where the splits after the first begin; hash: 1 - val's
    revision: str | None = None
    starts: str | None = None  # of a row that starts a document; None: each row is one
    train_shards: int = 0  # kind "shards": how many there are, numbered from 1
    sha1: str = ""  # kind "url": of the text in the archive


def _shakespeare(tokenizer: str, tokens: int) -> Dataset:
    words = {"gpt2": "GPT-2 tokens", "char": "characters"}[tokenizer]
    return Dataset(
        f"tiny Shakespeare, {words}", "asset", "tiny_shakespeare.txt", "public domain", tokens,
        tokenizer, val="tail",
    )  # fmt: skip


def _wikitext(number: int, tokens: int) -> Dataset:
    return Dataset(
        f"WikiText-{number}, raw; an article is a document", "hub", "Salesforce/wikitext",
        "CC BY-SA 3.0", tokens, config=f"wikitext-{number}-raw-v1",
        splits=("train", "validation"), starts=WIKITEXT_ARTICLE,
    )  # fmt: skip


DATASETS = {
    "fineweb10B": Dataset(
        "FineWeb, sample of 10B tokens; the first shard is val", "hub", "HuggingFaceFW/fineweb",
        "ODC-By 1.0", 10_300_000_000, config="sample-10BT", val="first",
    ),
    "fineweb_edu10B": Dataset(
        "FineWeb-Edu, sample of 10B tokens; the first shard is val", "hub",
        "HuggingFaceFW/fineweb-edu", "ODC-By 1.0", 9_950_000_000, config="sample-10BT", val="first",
    ),
    "fineweb10B_tokens": Dataset(
        "FineWeb's 10B, already GPT-2 tokens in llm.c's shards", "shards", "kjj0/fineweb10B-gpt2",
        "ODC-By 1.0", 10_300_000_000, train_shards=103,
    ),
    "fineweb_edu10B_tokens": Dataset(
        "FineWeb-Edu's 10B, already GPT-2 tokens in llm.c's shards", "shards",
        "kjj0/finewebedu10B-gpt2", "ODC-By 1.0", 9_950_000_000, train_shards=99,
    ),
    "openwebtext": Dataset(
        "OpenWebText; 0.05% of the documents are val", "hub", "Skylion007/openwebtext", "CC0 1.0",
        9_040_000_000, val="hash", fractions=(0.9995,), revision="refs/convert/parquet",
    ),
    "tinystories": Dataset(
        "TinyStories", "hub", "roneneldan/TinyStories", "CDLA-Sharing 1.0", 480_000_000,
        splits=("train", "validation"),
    ),
    "wikitext103": _wikitext(103, 119_000_000),
    "wikitext2": _wikitext(2, 2_700_000),
    "shakespeare": _shakespeare("gpt2", 338_025),
    "shakespeare_char": _shakespeare("char", 1_115_394),
    "enwik8": Dataset(
        "100 MB of Wikipedia's XML as bytes; 90/5/5 train, val, test", "url",
        "http://mattmahoney.net/dc/enwik8.zip", "CC BY-SA 3.0", 100_000_000, "byte", val="tail",
        fractions=(0.9, 0.95), sha1="57b8363b814821dc9d47aa4d41f58733519076b2",
    ),
    "text8": Dataset(
        "100 MB of Wikipedia, a-z and space, as bytes; 90/5/5 train, val, test", "url",
        "http://mattmahoney.net/dc/text8.zip", "CC BY-SA 3.0", 100_000_000, "byte", val="tail",
        fractions=(0.9, 0.95), sha1="0dc3edebc970dcc96137e7deda4d9995af9d93de",
    ),
}  # fmt: skip


def listing() -> str:
    """The registered data sets as a table for people."""
    rows = [
        f"    {name:<23}{d.tokens:>14,} tokens  {d.licence:<18}{d.summary}"
        for name, d in DATASETS.items()
    ]
    return "\n".join(rows)


def find_dataset(name: str) -> Dataset:
    """Raises ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {suggest(name, DATASETS)}")
    return DATASETS[name]


@dataclass
class UrlText(TextFiles):
    """One archive of the web with one text file, read as bytes; fetch() comes first."""

    url: str = ""
    sha1: str = ""  # of the text; none: not checked

    def fingerprint(self) -> dict:
        return {"url": self.url}

    def fetch(self, folder: Path) -> None:
        """Brings the archive into the folder, unless it is there. Raises OSError, ValueError."""
        path = folder / "download"
        if not path.exists():
            partial = folder / "download.partial"
            try:
                with urllib.request.urlopen(self.url, timeout=60) as response:
                    with open(partial, "wb") as file:
                        shutil.copyfileobj(response, file, 1 << 20)
                    size = response.headers.get("Content-Length", partial.stat().st_size)
                if partial.stat().st_size != int(size):
                    raise OSError(f"{partial.stat().st_size} of {size} bytes came")
            except (OSError, http.client.HTTPException) as error:
                raise OSError(
                    f"{self.url} cannot be fetched ({error}); check the network, or fetch and "
                    "unpack it elsewhere and read it with --text"
                ) from error
            with opened(partial) as (stream, _):
                found = hashlib.file_digest(stream, "sha1").hexdigest()
            if self.sha1 and found != self.sha1:
                raise ValueError(
                    f"{self.url}: another file than it was: the text's SHA-1 is {found} and not "
                    f"{self.sha1}; to use it all the same, unpack it and read it with --text"
                )
            partial.replace(path)
        self.files = [path]


def make_source(config: PrepareConfig) -> Source:
    """The source that the options name; of text files, each is read once, for a Survey.

    Raises ValueError (unknown data set, files of another kind) and OSError (missing files).
    """
    if config.name:
        source = _registered(find_dataset(config.name))
    elif config.text:
        source = _texts(config)
    else:
        source = _rows(config)
    return replace(source, max_documents=config.max_documents, bad_rows=config.bad_rows)


def _registered(d: Dataset) -> Source:
    names = ("train", "val", "test")[: len(d.fractions) + 1]
    if d.kind == "asset":
        path = resources.files("gpt2") / "assets" / d.source
        return Source([(TextFiles([Path(str(path))]), Tail(d.fractions))], names, separate=False)
    if d.kind == "url":
        reader = UrlText([], "latin-1", url=d.source, sha1=d.sha1)
        return Source([(reader, Tail(d.fractions))], names, separate=False)
    readers = [
        HubRows(d.source, d.config, split, d.field, d.revision, d.starts) for split in d.splits
    ]
    if d.val == "hash":
        return Source([(readers[0], ByHash(round(1 - d.fractions[0], 9)))])
    if d.val == "first":
        return Source([(readers[0], Whole(0))], first_val=True)
    return Source([(reader, Whole(split)) for split, reader in enumerate(readers)])


def _texts(config: PrepareConfig) -> Source:
    files, val = _find(config, config.text, TEXT_SUFFIXES, "text")
    if val:
        parts = [(files, Whole(0)), (val, Whole(1))]
    elif len(files) >= FEW_TEXTS:
        parts = [(files, ByHash(_fraction(config)))]
    else:
        parts = [(files, Tail((1 - _fraction(config),)))]
    parts = [(TextFiles(f, separator=config.separator), rule) for f, rule in parts]
    marked = sum(max(0, r.survey().documents - len(r.files)) for r, _ in parts)
    if marked:
        print(
            f"{config.text}: {config.separator!r} is taken to stand between documents, of which "
            f"there are {marked:,} more than files; --separator '' reads it as text"
        )
    return Source(parts, separate=bool(marked) or len(files) > 1 or len(val) > 1)


def _rows(config: PrepareConfig) -> Source:
    rule = ByHash(_fraction(config))
    if config.hf:
        repo, _, name = config.hf.partition(":")
        train = HubRows(repo, name, config.split, config.field)
        if config.val:
            val = HubRows(repo, name, config.val, config.field)
            return Source([(train, Whole(0)), (val, Whole(1))])
        return Source([(train, rule)])
    path, kind, suffixes, what = (
        (config.jsonl, JsonRows, JSON_SUFFIXES, "JSON")
        if config.jsonl
        else (config.parquet, ParquetRows, (".parquet",), "parquet")
    )
    files, val = _find(config, path, suffixes, what)
    reader = kind(files, field=config.field)
    if val:
        return Source([(reader, Whole(0)), (kind(val, field=config.field), Whole(1))])
    return Source([(reader, rule)])


def _fraction(config: PrepareConfig) -> float:
    return VAL_FRACTION if config.val_fraction is None else config.val_fraction


def _find(
    config: PrepareConfig, path: str, suffixes: tuple[str, ...], what: str
) -> tuple[list[Path], list[Path]]:
    """The files that are not for validation, and those that are."""
    files = find_files(path, suffixes, what, say=print)
    val = find_files(config.val, suffixes, what, say=print) if config.val else []
    resolved = {v.resolve() for v in val}
    files = [f for f in files if f.resolve() not in resolved]
    if not files:
        raise OSError(errno.ENOENT, "no files besides those of --val here", path)
    return files, val
