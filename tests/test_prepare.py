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
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpt2.data import datasets as registry
from gpt2.data import find_shards, open_shards, read_manifest, readers, write_shard
from gpt2.data import prepare as module
from gpt2.data.integrity import verify
from gpt2.data.prepare import prepare
from gpt2.data.progress import Progress
from gpt2.data.readers import JsonRows, TextFile, TextFiles, find_files
from gpt2.options import PrepareConfig
from gpt2.tokenizer import from_dict

ROOT = Path(__file__).parent.parent
GPT2 = from_dict({"name": "gpt2"})
EOT = 50256


def shared(name: str) -> Path:
    """A real file beside the project; such tests are skipped where it is not."""
    for folder in ROOT.parents:
        path = folder / "shared" / "data" / name
        if path.exists():
            return path
    pytest.skip(f"needs ../shared/data/{name}")


def make(tmp_path, name="out", **options) -> Path:
    options = {"out": str(tmp_path / name), "workers": 0} | options
    return prepare(PrepareConfig(**{k: str(v) if isinstance(v, Path) else v
                                    for k, v in options.items()}))  # fmt: skip


def stream(folder: Path, split: str) -> list[int]:
    shards = open_shards(find_shards(folder, split))
    return np.concatenate([s.tokens() for s in shards]).tolist()


def documents_of(tokens: list[int]) -> list[str]:
    """The texts between end-of-text tokens, which stand first."""
    assert tokens[0] == EOT
    parts, part = [], []
    for token in [*tokens[1:], EOT]:
        if token == EOT:
            parts.append(GPT2.decode(part))
            part = []
        else:
            part.append(token)
    return parts


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


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "jsonl.zst", "json list", "json.xz list", "parquet", "hf"]
)
def test_rows_of_every_form_are_the_same_shards(tmp_path, monkeypatch, form):
    rows = [*texts(500), "", "\u4e2d\u6587 \U0001f600"]
    lines = write_jsonl(tmp_path / "plain", rows).read_bytes()
    whole = json.dumps([{"text": t, "n": [1, {"a": "]"}]} for t in rows], indent=1).encode()
    folder = tmp_path / "in"
    folder.mkdir()
    options = {form.split()[0].split(".")[0].replace("json", "jsonl")[:5]: folder}
    if form == "jsonl":
        # Two files, read in the order of their names.
        (folder / "a.jsonl").write_bytes(b"".join(lines.splitlines(True)[:200]))
        (folder / "b.jsonl").write_bytes(b"\n" + b"".join(lines.splitlines(True)[200:]))
    elif form == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif form == "jsonl.zst":
        pa = pytest.importorskip("pyarrow")
        with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
            file.write(lines)
    elif form == "json list":
        (folder / "a.json").write_bytes(whole)
    elif form == "json.xz list":
        (folder / "a.json.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf " + whole))
    elif form == "parquet":
        write_parquet(folder / "a.parquet", rows[:120])
        write_parquet(folder / "b.parquet", rows[120:])
        options = {"parquet": folder}
    else:
        local_hub(monkeypatch, {"train": tmp_path / "plain"})
        options = {"hf": "someone/thing:config"}
    out = make(tmp_path, **options, shard_tokens=2000, workers=2)
    train, val = (documents_of(stream(out, s)) for s in ("train", "val"))
    assert sorted(train + val) == sorted(t for t in rows if t)
    assert train == [t for t in rows if t in set(train)]  # in order
    assert 20 < len(val) < 90  # of 501, a tenth
    manifest = read_manifest(out)
    for split, documents in (("train", train), ("val", val)):
        record = manifest["splits"][split]
        assert record["documents"] == len(documents)
        assert record["tokens"] == sum(s["tokens"] for s in record["shards"])
        assert record["documents"] == sum(s["documents"] for s in record["shards"])
        for shard in record["shards"]:
            tokens = open_shards(out / shard["file"])[0].tokens()
            assert (shard["tokens"], shard["documents"]) == (len(tokens), (tokens == EOT).sum())
            assert shard["sha256"] == hashes(out)[shard["file"]]
        assert [s["tokens"] for s in record["shards"][:-1]] == [2000] * (len(record["shards"]) - 1)
    reference = make(tmp_path, "reference", jsonl=write_jsonl(tmp_path / "r.jsonl", rows),
                     shard_tokens=2000)  # fmt: skip
    assert hashes(out) == hashes(reference)


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
    monkeypatch.setattr("gpt2.data.readers.BLOCK_BYTES", 1001)
    monkeypatch.setattr(module, "CHUNK_CHARS", 700)
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
    out = prepare(PrepareConfig(name="wikitext2", out=str(tmp_path / "w"), workers=0))
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
    config = PrepareConfig(
        name="fineweb_edu10B", out=str(tmp_path / "f"), shard_tokens=3000, max_documents=250
    )
    out = prepare(config)
    names = [f.name for f in find_shards(out, "val") + find_shards(out, "train")]
    assert names[:2] == ["val_000000.bin", "train_000001.bin"] and len(names) > 2
    assert documents_of(stream(out, "val") + stream(out, "train")) == rows[:250]
    assert len(stream(out, "val")) == 3000


def test_bytes_of_an_archive_on_the_web(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", data)
    entry = vars(registry.DATASETS["enwik8"]) | {"tokens": 1}
    entry["source"] = (tmp_path / "enwik8.zip").as_uri()

    def fetch(name, sha1=""):
        sha1 = sha1 or hashlib.sha1(data).hexdigest()
        changed = registry.Dataset(**{**entry, "sha1": sha1})
        monkeypatch.setitem(registry.DATASETS, "enwik8", changed)
        return prepare(PrepareConfig(name="enwik8", out=str(tmp_path / name)))

    out = fetch("e")
    assert stream(out, "train") == list(data[:9216]) and stream(out, "val") == list(data[9216:9728])
    assert stream(out, "test") == list(data[9728:])
    assert sorted(f.suffix for f in out.iterdir()) == [".bin", ".bin", ".bin", ".json"]
    with pytest.raises(ValueError, match="SHA-1 is .* and not 0000"):
        fetch("no", "0" * 40)
    (tmp_path / "enwik8.zip").unlink()
    with pytest.raises(OSError, match="cannot be fetched .*--text"):
        fetch("no")
    response = io.BytesIO(b"cut short")
    response.headers = {"Content-Length": "36445475"}
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: response)
    with pytest.raises(OSError, match="cannot be fetched .9 of 36445475 bytes came"):
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
    config = PrepareConfig(name="fineweb10B_tokens", out=str(tmp_path / "f"), max_shards=3)
    with pytest.raises(OSError, match="train_000002.bin cannot be fetched .*dead.*goes on"):
        prepare(config)
    with pytest.raises(OSError, match="max_shards is 3 there and 2 now"):
        prepare(PrepareConfig(name="fineweb10B_tokens", out=str(tmp_path / "f"), max_shards=2))
    with pytest.raises(ValueError, match="train_000002.bin: .*it was removed, run the same"):
        prepare(config)
    out = prepare(config)
    names = ["val_000000", "train_000001", *["train_000002"] * 3, "train_000003"]
    assert calls == [(f"fineweb_{name}.bin", "first") for name in names]
    splits = read_manifest(out)["splits"]
    assert (splits["train"]["tokens"], splits["train"]["documents"]) == (15, 6)
    assert splits["val"]["tokens"] == 5 and verify(out) == []
    assert prepare(config) == out and len(calls) == 6
    with pytest.raises(ValueError, match="tokenized already"):
        prepare(PrepareConfig(name="fineweb10B_tokens", tokenizer="char"))


# The same again, interrupted, at once


def test_second_run_does_nothing_and_another_is_refused(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
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


@pytest.mark.parametrize("source", ["jsonl", "text", "marked", "texts", "parquet", "hub", "first"])
def test_interrupted_anywhere_it_ends_the_same(tmp_path, monkeypatch, source):
    rows = texts(400)
    files = tmp_path / "in"
    files.mkdir()
    options = {"shard_tokens": 1500}
    if source == "jsonl":
        options["jsonl"] = write_jsonl(files / "a.jsonl", rows)
    elif source in ("text", "marked"):
        between = "\n" if source == "text" else "\n<|endoftext|>\n\n"
        (files / "a.txt").write_text(between.join(rows))
        options["text"] = files / "a.txt"
    elif source == "texts":
        for i in range(8):
            (files / f"{i}.txt").write_text("\n".join(rows[50 * i :][:50]))
        options["text"] = files
    elif source == "parquet":
        write_parquet(files / "a.parquet", rows)
        options["parquet"] = files / "a.parquet"
    else:
        local_hub(monkeypatch, {"train": write_jsonl(files / "a.jsonl", rows)})
        options |= (
            {"hf": "a/b"} if source == "hub" else {"name": "fineweb10B", "max_documents": 350}
        )
    monkeypatch.setattr(module, "CHUNK_CHARS", 400)
    monkeypatch.setattr("gpt2.data.readers.BLOCK_BYTES", 300)
    monkeypatch.setattr("gpt2.data.readers.BOOKMARK_EVERY", 7)
    if source == "jsonl":  # what is left out is counted once, however often it is read
        with open(options["jsonl"], "a") as file:
            file.write('{"text": ""}\n{"te\n' + json.dumps({"text": rows[0]}) + "\n")
        options["bad_rows"] = "skip"
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    expected = hashes(run(tmp_path, "whole", options))
    assert len(expected) > 5
    rng, runs = random.Random(source), 0
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
        try:
            run(tmp_path, "cut", options)
        except Stop:
            pass
    assert runs > 4
    assert hashes(tmp_path / "cut") == expected
    assert verify(tmp_path / "cut") == []
    kept, whole = (read_manifest(tmp_path / n) for n in ("cut", "whole"))
    assert kept["splits"] == whole["splits"]
    assert kept["left_out"] == whole["left_out"]
    assert not list(tmp_path.glob("*.partial"))


def run(tmp_path, name, options) -> Path:
    if "name" in options:
        options = {"out": str(tmp_path / name), "workers": 0} | options
        return prepare(PrepareConfig(**options))
    return make(tmp_path, name, **options)


# Prepares into each folder that it reads, in a process of its own (a fork: imports take seconds).
# SIGINT is taken, also where the tests are started with it ignored (nohup), and waits until
# run_script can see it: before, and between its end and os._exit, it would only interrupt this.
FORKS = """
import os, signal, sys
import gpt2.data.prepare as m
from gpt2.cli import run_script
from gpt2.options import PrepareConfig
from gpt2.tokenizer import from_dict
from_dict({"name": "gpt2"})
m.CHECKPOINT_S = 0.02
m.CHUNK_CHARS = 20_000
MASK = signal.pthread_sigmask
MASK(signal.SIG_BLOCK, [signal.SIGINT])
signal.signal(signal.SIGINT, signal.default_int_handler)
def main(out):
    MASK(signal.SIG_UNBLOCK, [signal.SIGINT])
    m.prepare(PrepareConfig(
        jsonl=sys.argv[1], out=out.strip(), workers=2, shard_tokens=100_000))
    MASK(signal.SIG_BLOCK, [signal.SIGINT])
for out in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        os.dup2(2, 1)
        try:
            run_script(lambda: main(out))
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code)
"""


@pytest.mark.parametrize("n_kills", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments_it_ends_the_same(tmp_path, how, n_kills):
    """Processes with threads, killed at moments that nothing chose."""
    path = write_jsonl(tmp_path / "a.jsonl", texts(20_000))
    with open(tmp_path / "err", "w") as err, subprocess.Popen(
        [sys.executable, "-c", FORKS, str(path)], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
    ) as forks:  # fmt: skip
        forks.stdin.write(f"{tmp_path / 'whole'}\n")
        forks.stdout.readline()
        start = time.monotonic()
        assert forks.stdout.readline() == "0\n"
        longest = time.monotonic() - start
        expected = hashes(tmp_path / "whole")
        assert len(expected) > 5
        rng, kills, n = random.Random(how), 0, 0
        for _ in range(n_kills + 20):
            out = tmp_path / f"cut{n}"
            forks.stdin.write(f"{out}\n")
            pid = int(forks.stdout.readline())
            if kills < n_kills:
                time.sleep(longest * rng.random())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            status = int(forks.stdout.readline())
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


def test_progress_in_lines_and_in_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gpt2.data.progress.time.monotonic", lambda: now[0])
    progress = Progress("x")
    for now[0], fraction in ((1.0, 0.5), (5.0, 0.55), (21.0, 0.6), (22.0, 0.61), (31.0, None)):
        progress.update(1000, 2_000_000, 42, fraction)
    assert capsys.readouterr().err.splitlines() == [
        "x: 1,000 documents, 2,000,000 tokens, 2/s, 60.0%, ETA 0:01:20",
        "x: 1,000 documents, 2,000,000 tokens, 1/s",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("x")
    progress.update(1000, 2_000_000, 42, 0.5)
    progress.close()
    text = "x: 1,000 documents, 2,000,000 tokens, 42,000,000,000/s, 50.0%"
    assert capsys.readouterr().err == f"\r{text}\x1b[K\r\x1b[K"


def test_two_processes_cannot_write_one_folder(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 123 on somewhere\n")
        lock.flush()
        path = write_jsonl(tmp_path / "a.jsonl", texts(100))
        with pytest.raises(OSError, match="process 123 on somewhere is preparing this folder"):
            make(tmp_path, jsonl=path)
    make(tmp_path, jsonl=path)  # the lock went with its process


def test_other_arguments_or_a_damaged_journal_after_an_interruption(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(module, "CHUNK_CHARS", 400)
    real = module.Progress.update

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Progress, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, jsonl=path, shard_tokens=100)
    monkeypatch.setattr(module.Progress, "update", real)
    with pytest.raises(OSError, match="interrupted .* other arguments .*shard_tokens is 100 there"):
        make(tmp_path, jsonl=path, shard_tokens=200)
    partial = tmp_path / "out.partial"
    shard = sorted(partial.glob("train*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="should have .* bytes and has"):
        make(tmp_path, jsonl=path, shard_tokens=100)
    for text in ("{", "[]", '{"made_from": 1}', "null"):
        (partial / "journal.json").write_text(text)
        with pytest.raises(ValueError, match="delete .*out.partial and start again"):
            make(tmp_path, jsonl=path, shard_tokens=100)
    assert partial.exists()


def test_no_room(tmp_path, monkeypatch):
    """A limit on the size of files stands for a full disk; then the run goes on."""
    path = write_jsonl(tmp_path / "a.jsonl", texts(3000))
    expected = hashes(make(tmp_path, "whole", jsonl=path, shard_tokens=10**6))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    monkeypatch.setattr(module, "CHUNK_CHARS", 4000)
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
        ("a.jsonl", b"3\n", "line 1 is a int, not an object"),
        ("a.jsonl", b'{"text": ' + DEEP + b"}", "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": "' + b"x" * 600_000, "line 1 has more than 524,288 bytes"),
        ("a.json", b'[{"text": "x"}, {"text"', "element 2 of the list"),
        ("a.json", b'[{"text": "x"}, {"x": 1}]', "element 2: no field 'text'; its fields are 'x'"),
        ("a.json", b'[{"text": "\xff"}]', "element 1 of the list is not UTF-8"),
        ("a.json", b"[" + DEEP + b"]", "element 1 of the list is nested too deeply"),
        ("a.json", b'["' + b"x" * 2_000_000, "element 1 of the list: Unterminated string"),
        ("a.json", b'[{"text": "x"}] {"text"', "more stands after the list's end .after element 1"),
        ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', "line 1 is a list, not an object"),
        ("a.jsonl", b"", "too little text"),
        ("a.jsonl", b"[]", "too little text"),
        ("a.jsonl", b'{"text": ""}', "too little text.*left out 1: no text, first .*line 1"),
        ("a.jsonl", b'{"text": "x"}\n', "the val split would be empty"),
        ("a.jsonl", lzma.compress(b'{"text": "x"}\n' * 99)[:-20], "damaged compressed file"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "damaged compressed file"),
        ("a.jsonl", bz2.compress(b"1" * 99)[:8] + b"....", "damaged compressed file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "damaged compressed file"),
        ("a.jsonl", "\ufeff{}".encode("utf-16"), "UTF-16, not JSON: convert it first .iconv"),
        ("a.jsonl", b'{"text": "\0"}', "binary, not JSON: byte 10 is NUL"),
        ("a.jsonl", b"PAR1....", "a parquet file, not JSON: use --parquet"),
        ("a.txt", "x".encode("utf-16"), "UTF-16, not text: convert it first .iconv"),
        ("a.txt", b"text\n" * 99 + b"\0", "binary, not text: byte 495 is NUL"),
        ("a.txt", "\u00e9".encode() * 500 + b"\xe9", "not UTF-8 text, byte 1000 is 0xe9; convert"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', "JSON, not text: use --jsonl"),
        ("a.txt", b'[\n {"text": "x"}', "JSON, not text: use --jsonl"),
        ("a.json.gz", b"3", "JSON, not text: use --jsonl"),
        ("a.csv", b"id,text\n", "a table, not text: write its rows as JSON lines and use --jsonl"),
        ("a.txt", b"PAR1....", "a parquet file, not text: use --parquet"),
        ("a.txt.gz", tar_gz(), "a tar archive, not text: unpack it first"),
        ("a.zip", zipped(a="1", b="2"), "holds 2 files .a, b.: unpack it"),
        ("a.zip", zipped(**{"x/": ""}), "damaged|holds 0 files"),
        ("a.txt", b"", "too little text"),
        ("a.parquet", b"PAR1 and nothing more", "not a parquet file that is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(readers, "LONGEST", 1 << 19)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 512)
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
    for name in ("bom.txt", "a.zip"):
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
    monkeypatch.setattr(module, "CHUNK_CHARS", 400)
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
    assert [(bad.kind, str(bad)[: len(str(path)) + 8]) for bad in refused] == [
        ("not JSON", f"{path}: line 3")
    ]
    with pytest.raises(ValueError, match="line 3 is not UTF-8 JSON"):
        list(JsonRows([path]).objects())


def test_a_text_that_changes_while_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    item = TextFile(tmp_path / "a.txt", TextFiles([tmp_path / "a.txt"]))
    assert item.length() == 6
    (tmp_path / "a.txt").write_text("after!")
    with pytest.raises(ValueError, match="a.txt: changed while it was read"):
        list(item.parts())


def test_columns_of_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match="no field 'txt'; its fields are 'text', 'id'"):
        make(tmp_path, parquet=tmp_path / "a.parquet", field="txt")
    with pytest.raises(ValueError, match="row 1: field 'id' holds int, not text"):
        make(tmp_path, parquet=tmp_path / "a.parquet", field="id")


def test_a_folder_of_something_else_is_not_worked_in(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(OSError, match="holds something else, and would be the place to work in"):
        make(tmp_path, jsonl=write_jsonl(tmp_path / "a.jsonl", texts(9)))
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"


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
        (dict(jsonl="a", separator="b"), "separator goes with text"),
        (dict(jsonl="a", val_fraction=1.0), r"must lie in \(0, 1\)"),
        (dict(jsonl="a", workers=-1), "workers must not be negative"),
        (dict(jsonl="a", max_documents=0), "max_documents must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**options)


def test_no_network(tmp_path):
    """HF_HUB_OFFLINE is set for all tests."""
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="Salesforce/wikitext: the hub cannot be reached .*--parquet"):
        prepare(PrepareConfig(name="wikitext2", out=str(tmp_path / "w")))
    assert not list(tmp_path.iterdir())


def test_network_that_fails_later_goes_on(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "t", texts(300))
    calls, commits = local_hub(monkeypatch, {"train": path}), iter("123")
    monkeypatch.setattr("gpt2.data.sources.hub_commit", lambda repo, revision: next(commits))
    monkeypatch.setattr(module, "CHUNK_CHARS", 400)
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


def test_verify_names_file_and_offset(tmp_path):
    out = make(tmp_path, jsonl=write_jsonl(tmp_path / "a.jsonl", texts(200)), shard_tokens=1000)
    assert verify(out) == []
    shard = out / "train_000001.bin"
    good = shard.read_bytes()
    cases = [
        (good[:1500] + bytes([good[1500] ^ 1]) + good[1501:], "damaged between offsets 0 and 3024"),
        (good[:-2], "promises 1000 tokens .* file has 3022 bytes"),
        (good + b"xx", "file has 3026 bytes"),
        (b"", "train_000001.bin: 0 bytes cannot be"),
        (bytes(1024) + good[1024:], "train_000001.bin"),
        (good[:8] + (500).to_bytes(4, "little") + good[12:], "promises 500 tokens"),
    ]
    for content, message in cases:
        shard.write_bytes(content)
        (problem,) = verify(out)
        assert str(shard) in problem
        pytest.raises(ValueError, _fail, problem).match(message)
    shard.unlink()
    shutil.copy(out / "train_000000.bin", out / "train_000099.bin")
    assert [p.split(": ")[1].split(";")[0].split(",")[0] for p in verify(out)] == [
        "missing", "not in the manifest"
    ]  # fmt: skip


def _fail(text):
    raise ValueError(text)


def test_verify_damaged_manifest_and_no_manifest(tmp_path):
    out = make(tmp_path, jsonl=write_jsonl(tmp_path / "a.jsonl", texts(200)))
    manifest = json.loads((out / "manifest.json").read_text())
    record = manifest["splits"]["train"]["shards"][0]
    record["sha256"] = "0" * 64
    del record["xxh3_64_of_4MiB"]  # which are used where they are there
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "or its record is" in verify(out)[0]
    for change in ({"splits": 3}, {"splits": {"train": {"shards": [{"file": "../x"}]}}},
                   {"splits": {"train": {"shards": [{"file": "train_000000.bin"}]}}}):  # fmt: skip
        (out / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match="manifest.json: damaged"):
            verify(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        verify(out)
    with pytest.raises(ValueError, match="not valid JSON"):
        make(tmp_path, jsonl=tmp_path / "a.jsonl")
    (out / "manifest.json").unlink()
    assert verify(out) == []
    (out / "val_000000.bin").write_bytes(b"x")
    assert "1 bytes cannot be" in verify(out)[0]
    with pytest.raises(OSError, match="no such data folder"):
        verify(tmp_path / "nowhere")


# The real files


def test_wikitext(tmp_path):
    out = make(tmp_path, text=shared("wikitext2"))
    counts = {n: s["tokens"] for n, s in read_manifest(out)["splits"].items()}
    assert counts == {"train": 482_434, "val": 53_679}


def test_alpaca(tmp_path):
    path = shared("sft/alpaca_data.json.xz")
    out = make(tmp_path, jsonl=path, field="output", max_documents=3000)
    with lzma.open(path) as file:
        rows = [row["output"] for row in json.load(file) if row["output"]][:3000]
    found = documents_of(stream(out, "train")) + documents_of(stream(out, "val"))
    assert sorted(found) == sorted(rows)


def test_tinystories(tmp_path):
    path = shared("tinystories/tinystories_lowercase_4MB.txt.xz")
    out = make(tmp_path, text=path, workers=2)
    text = lzma.decompress(path.read_bytes()).decode()
    cut = int(len(text) * 0.9)
    assert stream(out, "train") == GPT2.encode(text[:cut])
    assert stream(out, "val") == GPT2.encode(text[cut:])


def test_wikipedia_val_is_as_known(tmp_path):
    path = shared("wikipedia_core_2015/wiki_val.jsonl.xz")
    out = make(tmp_path, jsonl=path)
    splits = read_manifest(out)["splits"]
    assert splits["train"]["tokens"] + splits["val"]["tokens"] == 625_869
    assert splits["train"]["documents"] + splits["val"]["documents"] == 200
