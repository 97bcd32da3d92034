"""prepare_data: every source, every way to stop it, every way to damage what it wrote."""

import bz2
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2.cli import run_script
from gpt2.data import datasets as registry
from gpt2.data import encode, find_shards, open_shards, read_manifest, write_shard
from gpt2.data import prepare as module
from gpt2.data.files import find_files
from gpt2.data.integrity import verify
from gpt2.data.prepare import Progress, prepare
from gpt2.data.readers import JsonRows, TextFile, TextFiles
from gpt2.options import PrepareConfig
from gpt2.tokenizer import from_dict

GPT2 = from_dict({"name": "gpt2"})
EOT = 50256


def make(tmp_path, folder="out", **options) -> Path:
    options = {"out": tmp_path / folder, "workers": 0} | options
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return prepare(PrepareConfig(**texts))


def rows_of(tmp_path, n: int) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", texts(n))


def stream(folder: Path, split: str) -> list[int]:
    shards = open_shards(find_shards(folder, split))
    return np.concatenate([s.tokens() for s in shards]).tolist()


def documents_of(tokens: list[int]) -> list[str]:
    """The texts between end-of-text tokens, which stand first."""
    first, *texts = GPT2.decode(tokens).split("<|endoftext|>")
    assert first == ""
    return texts


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.bin")}


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = "the cat sat on a mat; it's 42, isn't it?\n\nYes\n".split(" ")
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(n)]


def write_jsonl(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(rows)))
    return path


# Sources


def write_form(form: str, rows: list[str], folder: Path, monkeypatch) -> dict:
    """Puts the rows into the folder; returns the options that read them."""
    folder.mkdir()
    plain = write_jsonl(folder.parent / "plain", rows)
    lines = plain.read_bytes().splitlines(True)
    if form in ("hf", "first"):
        local_hub(monkeypatch, {"train": plain})
        first = {"name": "fineweb10B", "max_documents": 350}
        return first if form == "first" else {"hf": "someone/thing:config"}
    if form == "parquet":
        write_parquet(folder / "a.parquet", rows[:120])
        write_parquet(folder / "b.parquet", rows[120:])
        return {"parquet": folder}
    if form == "saved":
        save_to_disk(rows, folder / "mine")
        return {"hf": folder / "mine"}
    if form == "megatron":
        write_megatron([[*GPT2.encode(t), EOT] for t in rows], folder / "a")
        return {"megatron": folder / "a.idx"}
    if form in ("text", "marked", "texts"):
        n = 50 if form == "texts" else len(rows)
        between = "\n<|endoftext|>\n\n" if form == "marked" else "\n"
        for i in range(0, len(rows), n):
            (folder / f"{i:03}.txt").write_text(between.join(rows[i : i + n]))
        return {"text": folder}
    if form == "bad rows":
        lines[100:100] = [b'{"text": ""}\n', b'{"te\n']
        (folder / "a.jsonl").write_bytes(b"".join(lines))
        return {"jsonl": folder, "bad_rows": "skip"}
    if form == "jsonl":  # two files, read in the order of their names
        (folder / "b.jsonl").write_bytes(b"\n" + b"".join(lines[200:]))
        lines = lines[:200]
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd}.get(form.split(".")[-1], bytes)
    content = b"".join(lines)
    if form.startswith("json."):
        whole = [{"text": t, "n": [1, {"a": "]"}]} for t in rows]
        content = b"\xef\xbb\xbf " + json.dumps(whole, indent=1).encode()
    (folder / f"a.{form}").write_bytes(pack(content))
    return {"jsonl": folder}


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(content, "zstd", asbytes=True)


def save_to_disk(rows: list[str], folder: Path) -> None:
    hub = pytest.importorskip("datasets")
    hub.disable_progress_bars()
    columns = {"text": rows, "id": list(range(len(rows)))}
    hub.Dataset.from_dict(columns).save_to_disk(str(folder), num_shards=2)


def write_megatron(documents: list[list[int]], name: Path, dtype="<u2", code=8, version=1) -> None:
    """As its preprocess_data.py does; each document is two sequences, so that they are joined."""
    cuts = [len(d) // 2 for d in documents]
    halves = [h for d, c in zip(documents, cuts, strict=True) for h in (d[:c], d[c:])]
    lengths = np.array([len(h) for h in halves], "<i4")
    places = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    starts = np.arange(0, len(halves) + 1, 2).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, len(halves), len(starts))
    parts = head, lengths.tobytes(), places.tobytes(), starts.tobytes()
    name.with_suffix(".idx").write_bytes(b"".join(parts))
    tokens = np.array([t for h in halves for t in h], "<i8")
    name.with_suffix(".bin").write_bytes(tokens.astype(dtype).tobytes())


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "jsonl.zst", "json.json", "json.xz", "parquet", "saved", "hf"]
)
def test_rows_of_every_form_are_the_same_shards(tmp_path, monkeypatch, form):
    rows = [*texts(500), "", "\u4e2d\u6587 \U0001f600"]
    options = write_form(form, rows, tmp_path / "in", monkeypatch)
    out = make(tmp_path, **options, shard_tokens=2000, workers=2)
    train, val = (documents_of(stream(out, s)) for s in ("train", "val"))
    assert sorted(train + val) == sorted(t for t in rows if t)
    assert train == [t for t in rows if t in set(train)]  # in order
    assert 20 < len(val) < 90  # of 501, a tenth
    for split, documents in (("train", train), ("val", val)):
        record = read_manifest(out)["splits"][split]
        shards = record["shards"]
        for key in ("tokens", "documents"):
            assert record[key] == sum(s[key] for s in shards)
        assert record["documents"] == len(documents)
        for shard in shards:
            tokens = open_shards(out / shard["file"])[0].tokens()
            assert (shard["tokens"], shard["documents"]) == (len(tokens), (tokens == EOT).sum())
            assert shard["sha256"] == hashes(out)[shard["file"]]
        assert {s["tokens"] for s in shards[:-1]} <= {2000}
    reference = make(tmp_path, "reference", jsonl=tmp_path / "plain", shard_tokens=2000)
    assert hashes(out) == hashes(reference)


@pytest.mark.parametrize("dtype, code, name", [("<u2", 8, "a"), ("<i4", 4, "a.bin")])
def test_documents_of_megatron_keep_their_tokens(tmp_path, dtype, code, name):
    rows = [[*GPT2.encode(t), EOT] for t in texts(300)]
    rows[3:3] = [[], [EOT], [11, EOT, 12, 13]]  # empty ones are left out; not all end with EOT
    write_megatron(rows, tmp_path / "a", dtype, code)
    write_megatron([[1, 2, 3]], tmp_path / "b")
    out = make(tmp_path, megatron=tmp_path / name, val=tmp_path / "b", workers=2)
    rows = [row for row in rows if row not in ([], [EOT])]
    wanted = [[EOT, *(row[:-1] if row[-1] == EOT else row)] for row in rows]
    assert stream(out, "train") == [token for row in wanted for token in row]
    assert stream(out, "val") == [EOT, 1, 2, 3]
    manifest = read_manifest(out)
    assert manifest["tokenizer"] == {"name": "gpt2"} and manifest["left_out"]["no text"][0] == 2
    assert manifest["splits"]["train"]["documents"] == 301
    half = make(tmp_path, "half", megatron=tmp_path / name)
    assert 10 < read_manifest(half)["splits"]["val"]["documents"] < 60  # a tenth


def change_idx(at: int, value: bytes):
    def change(path: Path) -> None:
        content = bytearray((path / "a.idx").read_bytes())
        content[at : at + len(value)] = value
        (path / "a.idx").write_bytes(content)

    return change


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut("a.bin"), "a.idx: sequence 20 has .* tokens from byte .*, a.bin has .* cut short"),
        (cut("a.idx"), "need .* bytes, it has"),
        (lambda d: (d / "a.idx").write_bytes(b""), "not an index of Megatron"),
        (change_idx(0, b"TNTIDX"), "not an index of Megatron: it begins with b'TNTIDX"),
        (change_idx(9, b"\2"), "version 2, not"),
        (change_idx(17, b"\7"), "dtype code 7; those read are 4 .<i4., 8 .<u2."),
        (change_idx(18, b"\xff" * 8), "need .* bytes, it has"),
        (change_idx(18, bytes(8)), "0 sequences, 10 documents: too few"),
        (change_idx(34, b"\xff" * 4), "sequence 1 has -1 tokens"),
        (change_idx(34 + 80, b"\xff" * 7 + b"\x7f"), "sequence 1 has .* from byte 92233720"),
        (change_idx(34 + 240 + 8, b"\xff"), "its documents are not made of 20 sequences"),
        (lambda d: write_megatron([[7, 50257]], d / "a"), "document 1 holds the token 50257"),
        (lambda d: write_megatron([[-7, 5]], d / "a", "<i4", 4), "document 1 holds the token -7"),
        (lambda d: (d / "a.bin").unlink(), "NAME.idx and NAME.bin: .*a.bin"),
    ],
)  # fmt: skip
def test_damaged_data_of_megatron_are_refused_by_name(tmp_path, spoil, message):
    write_megatron([[1, 2, 3, EOT]] * 10, tmp_path / "a")
    spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=f"(?=.*{tmp_path}/a).*{message}"):
        make(tmp_path, megatron=tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (None, {"split": "test"}, "no split 'test'; it has train"),
        (None, {"field": "story"}, "no field 'story'; its fields are 'text', 'id'"),
        (None, {"field": "id"}, "field 'id' holds int, not text"),
        (lambda d: next(d.glob("*1-of*.arrow")).write_bytes(b"A"), {}, "not a folder of save_to"),
        (lambda d: (d / "state.json").write_text("{"), {}, "not a folder of save_to_disk"),
        (lambda d: [f.unlink() for f in d.glob("*.arrow")], {}, ".arrow files are missing"),
    ],
)  # fmt: skip
def test_damaged_folders_of_save_to_disk_are_refused_by_name(tmp_path, spoil, options, message):
    save_to_disk(texts(20), tmp_path / "in")
    if spoil:
        spoil(tmp_path / "in")
    with pytest.raises(ValueError, match=f"{tmp_path}/in.*{message}"):
        make(tmp_path, hf=tmp_path / "in", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_splits_of_save_to_disk_and_the_option_for_it(tmp_path, monkeypatch):
    hub = pytest.importorskip("datasets")
    parts = {n: hub.Dataset.from_dict({"text": texts(k)}) for n, k in (("a", 40), ("b", 5))}
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "in"))
    monkeypatch.chdir(tmp_path)
    out = prepare(PrepareConfig(hf="in", split="a", val="b"))
    assert out == Path("data/in") and read_manifest(out)["source"] == str(tmp_path / "in")
    assert documents_of(stream(out, "train")) == texts(40)
    assert documents_of(stream(out, "val")) == texts(5)
    with pytest.raises(ValueError, match="no split 'c'; it has a, b"):
        prepare(PrepareConfig(hf="in", split="c"))
    for kind in ("text", "jsonl", "parquet"):
        with pytest.raises(ValueError, match="in: a folder of datasets' save_to_disk: use --hf in"):
            prepare(PrepareConfig(**{kind: "in"}))


def write_parquet(path: Path, rows: list[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": rows, "id": list(range(len(rows)))})
    pq.write_table(table, path, row_group_size=50)


def local_hub(monkeypatch, files: dict[str, Path]):
    """datasets.load_dataset reads local JSON lines in place of the hub's data."""
    hub = pytest.importorskip("datasets")
    load = hub.load_dataset
    calls = []

    def load_local(repo, config, *, split, streaming, revision):
        calls.append((repo, config, split, revision))
        assert streaming
        return load("json", data_files=str(files[split]), split="train", streaming=True)

    monkeypatch.setattr(hub, "load_dataset", load_local)
    monkeypatch.setattr("gpt2.data.sources.hub_commit", lambda repo, revision: f"of {repo}")
    return calls


def test_split_by_hash_does_not_depend_on_order_or_neighbours(tmp_path):
    rows = texts(300)
    one = make(tmp_path, "one", jsonl=write_jsonl(tmp_path / "1.jsonl", rows))
    two = make(tmp_path, "two", jsonl=write_jsonl(tmp_path / "2.jsonl", rows[:200][::-1]))
    val = set(documents_of(stream(one, "val")))
    assert set(documents_of(stream(two, "val"))) == val & set(rows[:200])


def test_many_texts_are_split_by_hash_and_few_at_their_ends(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(texts(150)):
        (folder / f"{i:03}.txt").write_text(text)
    out = make(tmp_path, text=folder)
    found = documents_of(stream(out, "train")) + documents_of(stream(out, "val"))
    assert sorted(found) == sorted(texts(150)) and 3 < len(documents_of(stream(out, "val"))) < 40
    own = make(tmp_path, "own", text=folder, val=folder / "007.txt")
    assert documents_of(stream(own, "val")) == [texts(150)[7]]
    assert len(documents_of(stream(own, "train"))) == 149
    one = make(tmp_path, "one", text=folder / "007.txt", val_fraction=0.5)
    cut = len(texts(150)[7]) // 2  # no end-of-text in a single text
    assert stream(one, "train") == GPT2.encode(texts(150)[7][:cut])
    assert stream(one, "val") == GPT2.encode(texts(150)[7][cut:])


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress], ids=["plain", "xz", "gz"])
def test_a_long_text_in_many_shards_has_the_tokens_of_the_whole(tmp_path, monkeypatch, pack):
    """Read in blocks that split characters and line ends, cut into many chunks."""
    monkeypatch.setattr("gpt2.data.files.BLOCK_CHARS", 1001)
    monkeypatch.setattr(encode, "CHUNK_CHARS", 700)
    text = "\r\n".join([*texts(200), "\u4e2d\u6587\U0001f600" * 500, "x" * 3000])
    (tmp_path / "in").write_bytes(pack(text.encode()))
    out = make(tmp_path, text=tmp_path / "in", shard_tokens=1000, workers=2)
    text = text.replace("\r\n", "\n")
    cut = int(len(text) * 0.9)
    assert stream(out, "train") == GPT2.encode(text[:cut])
    assert stream(out, "val") == GPT2.encode(text[cut:])
    assert len(find_shards(out, "train")) > 5


def test_a_registered_hub_dataset_with_its_own_val_and_articles(tmp_path, monkeypatch):
    train = ["", " = Robert Boulter = \n", "", " Robert is an actor . \n", " = = Career = = \n",
             " He acts . \n", " = Next = \n", " Text . \n"]  # fmt: skip
    calls = local_hub(monkeypatch, {
        "train": write_jsonl(tmp_path / "t", train),
        "validation": write_jsonl(tmp_path / "v", train[6:]),
    })  # fmt: skip
    out = make(tmp_path, name="wikitext2")
    assert documents_of(stream(out, "train")) == ["".join(train[:6]), "".join(train[6:])]
    assert documents_of(stream(out, "val")) == ["".join(train[6:])]
    commit = "of Salesforce/wikitext"
    assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", commit)
    manifest = read_manifest(out)
    assert manifest["licence"] == "CC BY-SA 3.0"
    assert manifest["commits"] == {"Salesforce/wikitext": commit}


def test_first_shard_is_val(tmp_path, monkeypatch):
    rows = texts(300)
    local_hub(monkeypatch, {"train": write_jsonl(tmp_path / "t", rows)})
    out = make(tmp_path, name="fineweb_edu10B", shard_tokens=3000, max_documents=250)
    names = [f.name for f in find_shards(out, "val") + find_shards(out, "train")]
    assert names[:2] == ["val_000000.bin", "train_000001.bin"] and len(names) > 2
    assert documents_of(stream(out, "val") + stream(out, "train")) == rows[:250]
    assert len(stream(out, "val")) == 3000


def test_bytes_of_an_archive_on_the_web(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    archive = tmp_path / "enwik8.zip"
    archive.write_bytes(zipped(enwik8=data))
    good = replace(registry.DATASETS["enwik8"], tokens=1, sha1=hashlib.sha1(data).hexdigest(),
                   source=archive.as_uri())  # fmt: skip

    def fetch(folder, dataset=good):
        monkeypatch.setitem(registry.DATASETS, "enwik8", dataset)
        return make(tmp_path, folder, name="enwik8")

    out = fetch("e")
    assert stream(out, "train") == list(data[:9216]) and stream(out, "val") == list(data[9216:9728])
    assert stream(out, "test") == list(data[9728:])
    assert sorted(f.suffix for f in out.iterdir()) == [".bin", ".bin", ".bin", ".json"]
    with pytest.raises(ValueError, match="SHA-1 is .* and not 0000"):
        fetch("no", replace(good, sha1="0" * 40))
    archive.write_bytes(archive.read_bytes()[:-99])
    with pytest.raises(ValueError, match="damaged compressed file"):
        fetch("no")
    archive.unlink()
    with pytest.raises(OSError, match="cannot be fetched .*--text"):
        fetch("no")
    assert not list(tmp_path.glob("no*"))


def test_token_shards_of_the_hub(tmp_path, monkeypatch):
    """The line dies, a shard comes damaged, upstream changes: what is here stays, of one commit."""
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(repo, name, *, repo_type, local_dir, revision):
        calls.append((name, revision))
        if len(calls) == 3:
            raise RuntimeError("the line is dead")
        write_shard(Path(local_dir) / name, np.array([EOT, len(calls), 5, EOT, 6]))
        if len(calls) == 4:
            (Path(local_dir) / name).write_bytes(b"<html>no</html>")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    commits = iter(["first", "second"])
    monkeypatch.setattr(module, "hub_commit", lambda repo: next(commits))
    config = {"name": "fineweb10B_tokens", "max_shards": 3}
    with pytest.raises(OSError, match="train_000002.bin cannot be fetched .*dead.*goes on"):
        make(tmp_path, **config)
    with pytest.raises(OSError, match="max_shards is 3 there and 2 now"):
        make(tmp_path, **config | {"max_shards": 2})
    with pytest.raises(ValueError, match="train_000002.bin: .*it was removed, run the same"):
        make(tmp_path, **config)
    out = make(tmp_path, **config)
    names = ["val_000000", "train_000001", *["train_000002"] * 3, "train_000003"]
    assert calls == [(f"fineweb_{name}.bin", "first") for name in names]
    splits = read_manifest(out)["splits"]
    assert (splits["train"]["tokens"], splits["train"]["documents"]) == (15, 6)
    assert splits["val"]["tokens"] == 5 and verify(out) == []
    assert make(tmp_path, **config) == out and len(calls) == 6
    with pytest.raises(ValueError, match="tokenized already"):
        make(tmp_path, **config, tokenizer="char")


# The same again, interrupted, at once


def test_second_run_does_nothing_and_another_is_refused(tmp_path, capsys):
    path = rows_of(tmp_path, 100)
    out = make(tmp_path, jsonl=path)
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    make(tmp_path, jsonl=path)
    assert "is prepared already: " in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == before
    with pytest.raises(OSError, match="shard_tokens is 100000000 there and 5 now"):
        make(tmp_path, jsonl=path, shard_tokens=5)
    write_jsonl(path, texts(100, seed=1))
    with pytest.raises(OSError, match="its text, splits or fields are others"):
        make(tmp_path, jsonl=path)


class Stop(Exception):
    """What interrupts a preparation in these tests, as SIGKILL would: nothing is tidied up."""


@pytest.mark.parametrize(
    "form", ["bad rows", "text", "marked", "texts", "parquet", "saved", "megatron", "hf", "first"]
)  # fmt: skip
def test_interrupted_anywhere_it_ends_the_same(tmp_path, monkeypatch, form):
    options = write_form(form, texts(400), tmp_path / "in", monkeypatch) | {"shard_tokens": 1500}
    monkeypatch.setattr(encode, "CHUNK_CHARS", 400)
    monkeypatch.setattr("gpt2.data.files.BLOCK_CHARS", 300)
    monkeypatch.setattr("gpt2.data.readers.BOOKMARK_EVERY", 7)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    expected = hashes(make(tmp_path, "whole", **options))
    assert len(expected) > 5
    rng, runs = random.Random(form), 0
    write, dump = module.ShardWriter.append, module.write_json
    while not (tmp_path / "cut").exists():
        fuse = [rng.randint(1, 25)]

        def burn(then, fuse=fuse):
            def wrapped(*arguments):
                fuse[0] -= 1
                if fuse[0] == 0:
                    raise Stop
                result = then(*arguments)
                if fuse[0] == 1 and then is write and rng.random() < 0.5:
                    raise Stop  # after the write and before the journal
                return result

            return wrapped

        monkeypatch.setattr(module.ShardWriter, "append", burn(write))
        monkeypatch.setattr(module, "write_json", burn(dump))
        runs += 1
        with contextlib.suppress(Stop):
            make(tmp_path, "cut", **options)
    assert runs > 4
    assert hashes(tmp_path / "cut") == expected and verify(tmp_path / "cut") == []
    kept, whole = (read_manifest(tmp_path / n) for n in ("cut", "whole"))
    assert [kept[k] for k in ("splits", "left_out")] == [whole[k] for k in ("splits", "left_out")]
    assert not list(tmp_path.glob("*.partial"))


def prepare_alone(path: Path, out: Path, started) -> None:
    """In a process of its own; SIGINT comes while run_script can see it."""
    module.CHECKPOINT_S, encode.CHUNK_CHARS = 0.02, 20_000
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main():
        started.set()
        make(out.parent, out.name, jsonl=path, workers=2, shard_tokens=100_000)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    run_script(main)


@pytest.mark.parametrize("n_kills", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments_it_ends_the_same(tmp_path, how, n_kills):
    """Processes with threads, killed at moments that nothing chose."""
    path, context = rows_of(tmp_path, 20_000), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports take seconds

    def run(out: Path, wait: float | None) -> int:
        started = context.Event()
        process = context.Process(target=prepare_alone, args=(path, out, started))
        process.start()
        assert started.wait(60)
        if wait is not None:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, how)
        process.join()
        return process.exitcode

    start = time.monotonic()
    assert run(tmp_path / "whole", None) == 0
    longest, expected = time.monotonic() - start, hashes(tmp_path / "whole")
    assert len(expected) > 5
    rng, kills, n = random.Random(how), 0, 0
    for _ in range(n_kills + 20):
        out = tmp_path / f"cut{n}"
        status = run(out, longest * rng.random() if kills < n_kills else None)
        if status:
            kills += 1
            assert status == (-how if how == signal.SIGKILL else 130)
            assert not out.exists() or verify(out) == []
        else:
            assert hashes(out) == expected and verify(out) == []
            if kills == n_kills:
                break
            n, longest = n + 1, longest / 2  # it was too fast: sooner, next time
    assert kills == n_kills and not status


@pytest.mark.parametrize(
    "live, updates, shown",
    [
        (False, [(1.0, 0.5), (5.0, 0.55), (21.0, 0.6), (22.0, 0.61), (31.0, None)],
         "x: 1,000 documents, 2,000,000 tokens, 2/s, 60.0%, ETA 0:01:20\n"
         "x: 1,000 documents, 2,000,000 tokens, 1/s\n"),
        (True, [(0.1, 0.0), (21.0, 0.6)],
         "\rx: 1,000 documents, 2,000,000 tokens, 2/s, 60.0%, ETA 0:00:13\x1b[K\r\x1b[K"),
    ],
)  # fmt: skip
def test_progress_in_lines_and_in_a_terminal(capsys, monkeypatch, live, updates, shown):
    now = [0.0]
    monkeypatch.setattr("gpt2.data.prepare.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live)
    progress = Progress("x", 1_999_958)
    for now[0], fraction in updates:
        progress.update(1000, 2_000_000, fraction)
    progress.close()
    assert capsys.readouterr().err == shown


def test_two_processes_cannot_write_one_folder(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # which only a lock for one alone does not get past
        lock.write("process 123 on somewhere\n")
        lock.flush()
        path = rows_of(tmp_path, 100)
        with pytest.raises(OSError, match="process 123 on somewhere is preparing this folder"):
            make(tmp_path, jsonl=path)
    make(tmp_path, jsonl=path)  # the lock went with its process
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("precious")
    with pytest.raises(OSError, match="holds something else, and is where to work in"):
        make(tmp_path, "other", jsonl=path)


def test_other_arguments_or_a_damaged_journal_after_an_interruption(tmp_path, monkeypatch):
    path = rows_of(tmp_path, 100)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(encode, "CHUNK_CHARS", 400)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Progress, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make(tmp_path, jsonl=path, shard_tokens=100)
    with pytest.raises(OSError, match="interrupted .* other arguments .*shard_tokens is 100 there"):
        make(tmp_path, jsonl=path, shard_tokens=200)
    partial = tmp_path / "out.partial"
    good = (partial / "journal.json").read_text()
    shard = sorted(partial.glob("train*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="should have .* bytes and has"):
        make(tmp_path, jsonl=path, shard_tokens=100)
    for text in ("{", "[]", '{"made_from": 1}', "null", good.replace('"format": 2', '"format": 1')):
        (partial / "journal.json").write_text(text)
        with pytest.raises(ValueError, match="delete .*out.partial and start again"):
            make(tmp_path, jsonl=path, shard_tokens=100)
    assert partial.exists()


def test_no_room(tmp_path, monkeypatch):
    """A limit on the size of files stands for a full disk; then the run goes on."""
    path = rows_of(tmp_path, 3000)
    expected = hashes(make(tmp_path, "whole", jsonl=path, shard_tokens=10**6))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    monkeypatch.setattr(encode, "CHUNK_CHARS", 4000)
    try:
        with pytest.raises(OSError, match="after .* tokens. Make room, and the same command"):
            make(tmp_path, jsonl=path, shard_tokens=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "out.partial" / "journal.json").exists()
    assert hashes(make(tmp_path, jsonl=path, shard_tokens=10**6)) == expected


def test_room_is_checked_before_a_large_download(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(OSError, match="about 20.6 GB are needed here and 1.0 GB are free") as error:
        prepare(PrepareConfig(name="fineweb10B", out=str(tmp_path / "f")))
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.glob("f*"))


# What people bring, and what is wrong with it


def tar_gz() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def zipped(**members) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"a": 1, "b": 2}\n', "line 1: no field 'text'; its fields are 'a', 'b'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2: field 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3 is not UTF-8 JSON.*--bad_rows skip"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8 JSON"),
        ("a.jsonl", b'{"text": ' + DEEP + b"}", "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": "' + b"x" * 600_000, "line 1 has more than 524,288 bytes"),
        ("a.json", b'[{"text": "x"}, {"text"', "element 2 of the list"),
        ("a.json", b'[{"text": "x"}, {"x": 1}]', "element 2: no field 'text'; its fields are 'x'"),
        ("a.json", b'[{"text": "\xff"}]', "element 1 of the list: 'utf-8' codec can't decode"),
        ("a.json", b"[" + DEEP + b"]", "element 1 of the list is nested too deeply"),
        ("a.json", b'[{"text": "x"}] {"text"', "more stands after the list's end .after element 1"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', "line 1 is a list, not an object"),
        ("a.jsonl", b"[]", "too little text"),
        ("a.jsonl", b'{"text": ""}', "too little text.*left out 1: no text, first .*line 1"),
        ("a.jsonl", b'{"text": "x"}\n', "the val split would be empty"),
        ("a.jsonl", lzma.compress(b'{"text": "x"}\n' * 99)[:-20], "damaged compressed file"),
        ("a.jsonl", bz2.compress(b"1" * 99)[:8] + b"....", "damaged compressed file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "damaged compressed file"),
        ("a.jsonl", "\ufeff{}".encode("utf-16"), "UTF-16, not JSON: convert it first .iconv"),
        ("a.jsonl", b'{"text": "\0"}', "binary, not JSON: byte 10 is NUL"),
        ("a.jsonl", b"PAR1....", "a parquet file, not JSON: use --parquet"),
        ("a.txt", b"{\\rtf1 Hello}", "a document with a layout, not text: convert it first"),
        ("a.txt", b"text\n" * 99 + b"\0", "binary, not text: byte 495 is NUL"),
        ("a.txt", "\u00e9".encode() * 500 + b"\xe9", "not UTF-8 text, byte 1000 is 0xe9; convert"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', "JSON, not text: use --jsonl"),
        ("a.txt", b'[\n {"text": "x"}', "JSON, not text: use --jsonl"),
        ("a.json.gz", b"3", "JSON, not text: use --jsonl"),
        ("a.csv", b"id,text\n", "a table, not text: write its rows as JSON lines and use --jsonl"),
        ("a.txt.gz", tar_gz(), "a tar archive, not text: unpack it first"),
        ("a.zip", zipped(a="1", b="2"), "holds 2 files .a, b.: unpack it"),
        ("a.txt", b"", "too little text"),
        ("a.parquet", b"PAR1 and nothing more", "not a parquet file that is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr("gpt2.data.files.LONGEST", 1 << 19)
    monkeypatch.setattr("gpt2.data.files.BLOCK_CHARS", 512)
    path = tmp_path / name
    path.write_bytes(content)
    kind = {"a.jsonl": "jsonl", "a.json": "jsonl", "a.parquet": "parquet"}.get(name, "text")
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        make(tmp_path, **{kind: path})
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_a_folder_and_what_is_left_out(tmp_path):
    """Hidden ones, pipes and other kinds are named; links are followed, loops once."""
    folder, said = tmp_path / "in", []
    for name in (".ipynb_checkpoints/a.txt", "._a.txt", "b/a.txt", "a.txt", "a.txt.bak", "a.txt~"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "b/loop").symlink_to(folder)
    (folder / "nowhere.txt").symlink_to("nowhere.txt")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/z.md").write_text("z")
    (folder / "link").symlink_to(tmp_path / "far")
    os.mkfifo(folder / "pipe.txt")
    found = find_files(folder, (".txt", ".md"), "text", said.append)
    assert [str(f.relative_to(folder)) for f in found] == ["a.txt", "b/a.txt", "link/z.md"]
    assert sorted(said) == [
        f"{folder}: left out 2: hidden, first {folder}/._a.txt",
        f"{folder}: left out 2: not a regular file, first {folder}/nowhere.txt",
        f"{folder}: left out 2: of another kind, first {folder}/a.txt.bak",
    ]
    with pytest.raises(OSError, match="a pipe or device, not a file"):
        make(tmp_path, text=folder / "pipe.txt")


def test_byte_order_marks_and_archives_of_one_file(tmp_path):
    text = "\n".join(texts(50))
    (tmp_path / "plain.txt").write_text(text)
    expected = hashes(make(tmp_path, "plain", text=tmp_path / "plain.txt"))
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    members = {"__MACOSX/._a.txt": "Mac OS X", "corpus/": "", "corpus/a.txt": text}
    (tmp_path / "a.zip").write_bytes(zipped(**members))
    pzstd = b"\x50\x2a\x4d\x18\4\0\0\0size" + zstd(text.encode())
    (tmp_path / "a.txt.zst").write_bytes(pzstd)
    for name in ("bom.txt", "a.zip", "a.txt.zst"):
        assert hashes(make(tmp_path, f"out {name}", text=tmp_path / name)) == expected


def test_separators_written_out_in_a_text(tmp_path, capsys):
    """As TinyStories has them; documents are split and counted, and another mark can be named."""
    rows = [f"{t.strip()}\n" for t in texts(200)]
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(rows))
    out = make(tmp_path, text=path, val_fraction=0.5)
    assert "'<|endoftext|>' is taken to stand between documents, of which there are 199 more" in (
        capsys.readouterr().out
    )
    train, val = (documents_of(stream(out, split)) for split in ("train", "val"))
    assert [*train[:-1], train[-1] + val[0], *val[1:]] == rows  # the cut is within a document
    (tmp_path / "val.txt").write_text("val")
    few = make(tmp_path, "few", text=path, max_documents=7, val=tmp_path / "val.txt")
    assert documents_of(stream(few, "train")) == rows[:7]
    path.write_text("\n###\n".join(rows))
    other = make(tmp_path, "other", text=path, val_fraction=0.5, separator="###")
    assert [d.rstrip() for d in documents_of(stream(other, "train"))][:-1] == (
        [d.rstrip() for d in train[:-1]]
    )
    path.write_text("a <|endoftext|> b " * 20)
    plain = make(tmp_path, "none", text=path, separator="")
    tokens = stream(plain, "train") + stream(plain, "val")
    assert EOT not in tokens and GPT2.decode(tokens) == "a <|endoftext|> b " * 20


def test_bad_rows_are_skipped_and_counted_and_work_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, "CHUNK_CHARS", 400)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    rows = texts(200)
    lines = [json.dumps({"text": t}) for t in rows]
    clean = make(tmp_path, "clean", jsonl=write_jsonl(tmp_path / "clean.jsonl", rows))
    path = tmp_path / "a.jsonl"
    bad = ["{", '{"text": ""}', '{"text": null}', '{"a": 1}', "{", "[1]", '{"text": 5}']
    path.write_text("\n".join(lines[:150] + bad + lines[150:]))
    with pytest.raises(ValueError, match="line 151 is not UTF-8 JSON.*; --bad_rows skip leaves"):
        make(tmp_path, jsonl=path)
    assert "what is finished is kept" in capsys.readouterr().out
    out = make(tmp_path, jsonl=path, bad_rows="skip")
    assert hashes(out) == hashes(clean)
    assert {kind: n for kind, (n, _) in read_manifest(out)["left_out"].items()} == {
        "not JSON": 2, "no text": 2, "no field 'text'": 1, "not an object": 1,
        "field 'text' is not text": 1,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "going on after" in said
    assert f"left out 2: not JSON, first {path}: line 151 is not UTF-8 JSON" in said
    assert f"left out 2: no text, first {path}: line 152\n" in said
    few = make(tmp_path, "few", jsonl=path, bad_rows="skip", max_documents=170)
    assert sum(s["documents"] for s in read_manifest(few)["splits"].values()) == 170


def test_lines_that_are_lists(tmp_path):
    """Of messages, one conversation a line; bad lines are the caller's to count."""
    path, refused = tmp_path / "a.jsonl", []
    path.write_text('[{"role": "user"}, 1]\n[{"role": "user"}]\n{\n')
    rows = [row for _, row in JsonRows([path]).objects(refused.append)]
    assert rows == [[{"role": "user"}, 1], [{"role": "user"}]]
    assert [bad.kind for bad in refused] == ["not JSON"] and "line 3" in str(refused[0])


def test_a_text_that_changes_while_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    item = TextFile(tmp_path / "a.txt", TextFiles([tmp_path / "a.txt"]))
    assert item.length() == 6
    (tmp_path / "a.txt").write_text("after!")
    with pytest.raises(ValueError, match="a.txt: changed while it was read"):
        list(item.parts())


@pytest.mark.parametrize(
    "field, message",
    [("txt", "no field 'txt'; its fields are 'text', 'id'"), ("id", "row 1: field 'id' holds int")],
)
def test_a_column_of_parquet_that_is_not_text_is_refused(tmp_path, field, message):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match=message):
        make(tmp_path, parquet=tmp_path / "a.parquet", field=field)


def test_missing_files_and_bad_options(tmp_path):
    with pytest.raises(OSError, match="no such JSON file or folder"):
        make(tmp_path, jsonl=tmp_path / "no.jsonl")
    with pytest.raises(OSError, match=r"no parquet files \(.parquet"):
        make(tmp_path, parquet=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'fineweb10B'"):
        prepare(PrepareConfig(name="fineweb10b"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(OSError, match="no files besides those of --val"):
        make(tmp_path, text=tmp_path / "a.txt", val=tmp_path / "a.txt")
    for options, message in [
        (dict(name="a", text="b"), "give either the NAME"),
        (dict(name="a", val="b"), "a has its own"),
        (dict(text="a", val="b", val_fraction=0.1), "not both"),
        (dict(text="a", field="b"), "field goes with"),
        (dict(jsonl="a", split="b"), "split goes with hf"),
        (dict(megatron="a", tokenizer="byte"), "it holds GPT-2 tokens, not the byte tok"),
        (dict(jsonl="a", separator="b"), "separator goes with text"),
        (dict(jsonl="a", val_fraction=1.0), r"must lie in \(0, 1\)"),
        (dict(jsonl="a", workers=-1), "workers must not be negative, got -1"),
        (dict(jsonl="a", max_documents=0), "max_documents must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**options)


def test_network_that_fails_at_once_or_later(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set for all tests."""
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="Salesforce/wikitext: the hub cannot be reached .*--parquet"):
        make(tmp_path, name="wikitext2")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match="file: no data set of the hub .* name it with --text, --json"
    ):
        prepare(PrepareConfig(hf=str(tmp_path / "file"), out=str(tmp_path / "out")))
    path = write_jsonl(tmp_path / "t", texts(300))
    calls, commits = local_hub(monkeypatch, {"train": path}), iter("123")
    monkeypatch.setattr("gpt2.data.sources.hub_commit", lambda repo, revision: next(commits))
    monkeypatch.setattr(encode, "CHUNK_CHARS", 400)
    monkeypatch.setattr("gpt2.data.readers.BOOKMARK_EVERY", 50)
    expected = hashes(make(tmp_path, "whole", hf="a/b", shard_tokens=500))
    import datasets

    real, rows = datasets.IterableDataset.__iter__, [0]

    def failing(self):
        for row in real(self):
            rows[0] += 1
            if rows[0] == 200:
                raise RuntimeError("connection lost")
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", failing)
    with pytest.raises(OSError, match="failed at row 199: connection lost; the same command"):
        make(tmp_path, hf="a/b", shard_tokens=500)
    out = make(tmp_path, hf="a/b", shard_tokens=500)
    assert hashes(out) == expected
    assert rows[0] < 300 + 199 - 100  # it did not begin at the first row
    assert [call[-1] for call in calls] == ["1", "2", "2"]  # it went on with the same commit


# Verification


def test_verify_names_each_shard_that_is_not_as_prepared(tmp_path):
    """What it finds within a shard or a manifest: test_integrity.py, test_shards.py."""
    out = make(tmp_path, jsonl=rows_of(tmp_path, 200), shard_tokens=1000)
    shard, manifest = out / "train_000001.bin", out / "manifest.json"
    for content in (shard.read_bytes()[:-2], shard.read_bytes() + b"xx", b""):
        shard.write_bytes(content)
        (problem,) = verify(out)
        assert str(shard) in problem and f"{len(content)} bytes" in problem
    shard.unlink()
    shutil.copy(out / "train_000000.bin", out / "train_000099.bin")
    problems = verify(out)
    assert "missing" in problems[0] and "not in the manifest" in problems[1]
    manifest.write_text("{")
    for read in (lambda: verify(out), lambda: make(tmp_path, jsonl=tmp_path / "a.jsonl")):
        with pytest.raises(ValueError, match="manifest.json.* not valid JSON"):
            read()
    manifest.unlink()
    assert verify(out) == []
    with pytest.raises(OSError, match="no such data folder"):
        verify(tmp_path / "nowhere")


# The real files: counts that are known, the tokens of the whole


@pytest.mark.parametrize(
    "name, options, tokens, documents",
    [
        ("wikitext2", {}, [482_434, 53_679], None),
        ("wikipedia_core_2015/wiki_val.jsonl.xz", {}, 625_869, 200),
        ("sft/alpaca_data.json.xz", {"field": "output", "max_documents": 3000}, None, 3000),
    ],
)
def test_real_files(tmp_path, shared_data, name, options, tokens, documents):
    path = shared_data / name
    out = make(tmp_path, **{"jsonl" if ".json" in name else "text": path}, **options)
    splits = read_manifest(out)["splits"].values()
    found = [s["tokens"] for s in splits]
    assert tokens in (None, found, sum(found))
    assert documents in (None, sum(s["documents"] for s in splits))
