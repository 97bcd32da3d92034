"""The data sets that prepare_data knows, and how its options name a source of text."""

import errno
import hashlib
import http.client
import re
import shutil
import urllib.request
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from gpt2.config import suggest
from gpt2.data.files import JSON_SUFFIXES, TEXT_SUFFIXES, find_files, opened, train_extra
from gpt2.data.foreign import EOT, MegatronDocuments, is_saved, megatron_files, saved_rows
from gpt2.data.readers import HubRows, JsonRows, ParquetRows, TextFiles
from gpt2.data.shard_writer import as_splits, file_hashes
from gpt2.data.shards import open_shards
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
    "first": the first shard. tokens: about how many come out, all splits together.
    """

    summary: str
    kind: str
    source: str
    licence: str
    tokens: int
    tokenizer: str = "gpt2"
    config: str = ""
    splits: tuple[str, ...] = ("train",)
    val: str = "own"
    fractions: tuple[float, ...] = (0.9,)  # where the splits after the first begin; hash: 1 - val's
    revision: str | None = None
    starts: str | None = None  # of a row that starts a document; None: each row is one
    train_shards: int = 0  # kind "shards": how many there are, numbered from 1
    sha1: str = ""  # kind "url": of the text in the archive


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
    "shakespeare": Dataset(
        "tiny Shakespeare, GPT-2 tokens", "asset", "tiny_shakespeare.txt", "public domain",
        338_025, val="tail",
    ),
    "shakespeare_char": Dataset(
        "tiny Shakespeare, characters", "asset", "tiny_shakespeare.txt", "public domain",
        1_115_394, "char", val="tail",
    ),
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
    return "\n".join(
        f"    {name:<23}{d.tokens:>14,} tokens  {d.licence:<18}{d.summary}"
        for name, d in DATASETS.items()
    )


def find_dataset(name: str) -> Dataset:
    """Raises ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: {suggest(name, DATASETS)}")
    return DATASETS[name]


@dataclass
class UrlText(TextFiles):
    """One archive of the web with one text file, read as bytes; fetch() comes first."""

    url: str = ""
    sha1: str = ""  # of the text

    def fingerprint(self) -> dict:
        return {"url": self.url}

    def fetch(self, folder: Path) -> None:
        """Brings the archive into the folder, unless it is there. Raises OSError, ValueError."""
        path = folder / "download"
        if not path.exists():
            partial = folder / "download.partial"
            try:
                web = urllib.request.urlopen(self.url, timeout=60)
                with web, open(partial, "wb") as file:
                    shutil.copyfileobj(web, file, 1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise OSError(
                    f"{self.url} cannot be fetched ({error}); check the network, or fetch and "
                    "unpack it elsewhere and read it with --text"
                ) from error
            with opened(partial) as (stream, _):  # what was cut short is damaged
                found = hashlib.file_digest(stream, "sha1").hexdigest()
            if found != self.sha1:
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
    fraction = VAL_FRACTION if config.val_fraction is None else config.val_fraction
    if config.name:
        source = _registered(find_dataset(config.name))
    elif is_saved(config.hf):
        splits = [split for split in (config.split, config.val) if split]
        readers = [saved_rows(config.hf, split, config.field) for split in splits]
        source = Source(_with_rules(readers, ByHash(fraction)))
    elif config.megatron:
        names = [name for name in (config.megatron, config.val) if name]
        readers = [MegatronDocuments(megatron_files(name)) for name in names]
        source = Source(_with_rules(readers, ByHash(fraction)))
    elif config.hf:
        repo, _, name = config.hf.partition(":")
        splits = [split for split in (config.split, config.val) if split]
        readers = [HubRows(repo, name, split, config.field) for split in splits]
        source = Source(_with_rules(readers, ByHash(fraction)))
    else:
        source = _local(config, fraction)
    return replace(source, max_documents=config.max_documents, bad_rows=config.bad_rows)


def _with_rules(readers: list, rule) -> list[tuple]:
    """Of several readers each is a split; the rule splits a single one."""
    if len(readers) == 1:
        return [(readers[0], rule)]
    return [(reader, Whole(split)) for split, reader in enumerate(readers)]


def _registered(d: Dataset) -> Source:
    if d.kind in ("asset", "url"):
        path = Path(str(resources.files("gpt2") / "assets" / d.source))
        reader = TextFiles([path]) if d.kind == "asset" else (
            UrlText([], as_bytes=True, url=d.source, sha1=d.sha1)
        )  # fmt: skip
        names = ("train", "val", "test")[: len(d.fractions) + 1]
        return Source([(reader, Tail(d.fractions))], names, separate=False)
    readers = [HubRows(d.source, d.config, s, "text", d.revision, d.starts) for s in d.splits]
    rule = Whole(0) if d.val == "first" else ByHash(round(1 - d.fractions[0], 9))
    return Source(_with_rules(readers, rule), first_val=d.val == "first")


def _local(config: PrepareConfig, fraction: float) -> Source:
    path, kind, suffixes, what = (
        (config.text, TextFiles, TEXT_SUFFIXES, "text") if config.text
        else (config.jsonl, JsonRows, JSON_SUFFIXES, "JSON") if config.jsonl
        else (config.parquet, ParquetRows, (".parquet",), "parquet")
    )  # fmt: skip
    if is_saved(path):
        raise ValueError(f"{path}: a folder of datasets' save_to_disk: use --hf {path}")
    files = find_files(path, suffixes, what, say=print)
    val = find_files(config.val, suffixes, what, say=print) if config.val else []
    resolved = {v.resolve() for v in val}
    files = [f for f in files if f.resolve() not in resolved]
    if not files:
        raise OSError(errno.ENOENT, "no files besides those of --val here", path)
    readers = [kind(f, config.field) for f in (files, val) if f]
    if not config.text:
        return Source(_with_rules(readers, ByHash(fraction)))
    for reader in readers:
        reader.separator = config.separator
    marked = sum(max(0, s.documents - 1) for reader in readers for s in reader.survey())
    if marked:
        print(
            f"{path}: {config.separator!r} is taken to stand between documents, of which there are "
            f"{marked:,} more than files; --separator '' reads it as text"
        )
    few = len(files) < FEW_TEXTS
    parts = _with_rules(readers, Tail((1 - fraction,)) if few else ByHash(fraction))
    return Source(parts, separate=bool(marked) or len(files) > 1 or len(val) > 1)


def fetch_shards(dataset: Dataset, commit: str, folder: Path, n_train: int) -> dict:
    """Downloads the hub's val and n_train token shards, unless here; the manifest's splits.

    A file in the folder is complete: a download ends with its renaming. Raises ImportError, OSError
    (no network, no room) and ValueError (not a shard; it alone is removed).
    """
    hub = train_extra("huggingface_hub", "the hub's files")
    prefix = re.match(r".*/(\w+?)10B", dataset.source).group(1)
    names = [("val", 0)] + [("train", i) for i in range(1, n_train + 1)]
    shards = []
    for done, (split, number) in enumerate(names):
        path = folder / f"{prefix}_{split}_{number:06}.bin"
        if not path.exists():
            print(f"fetching {path.name}, {done} of {len(names)} are here", flush=True)
            try:
                hub.hf_hub_download(
                    dataset.source, path.name, repo_type="dataset", local_dir=folder,
                    revision=commit,
                )  # fmt: skip
            except Exception as error:  # whatever the network libraries of the hub raise
                raise OSError(
                    f"{dataset.source}: {path.name} cannot be fetched ({error}); check the network "
                    "(and HF_HUB_OFFLINE); the same command goes on from there"
                ) from error
        try:
            (shard,) = open_shards(path)
        except ValueError as error:
            path.unlink()
            raise ValueError(f"{error}; it was removed, run the same command again") from error
        documents = int((shard.tokens() == EOT).sum())
        record = {"file": path.name, "tokens": shard.n_tokens, "documents": documents}
        shards.append((split, record | file_hashes(path)))
    return as_splits(("train", "val"), shards)
