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
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpt2.data import datasets as registry
from gpt2.data import find_shards, open_shards, read_manifest, write_shard
from gpt2.data import prepare as module
from gpt2.data import readers
from gpt2.data.prepare import prepare
from gpt2.data.progress import Progress
from gpt2.data.readers import JsonRows, TextFile, TextFiles, find_files
from gpt2.data.verify import verify
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

    def fetch(name, sha1=hashlib.sha1(data).hexdigest()):
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
        options |= {"text": files / "a.txt", "max_documents": 350}
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
    assert capsys.readouterr().err == "\rx: 1,000 documents, 2,000,000 tokens, 42,000,000,000/s, 50.0%\x1b[K\r\x1b[K"


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


# What is wrong with the input


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b'{"a": 1, "b": 2}\n', {}, "line 1: no field 'text'; its fields are 'a', 'b'"),
        (b'{"text": "x"}\n{"text": 3}\n', {}, "line 2: field 'text' holds int, not text"),
        (b'{"text": "x"}\n\n{"text": \n', {}, "line 3 is not UTF-8 JSON"),
        (b'{"text": "\xff"}\n', {}, "line 1 is not UTF-8 JSON"),
        (b"3\n", {}, "line 1 is a int, not an object"),
        (b'[{"text": "x"}, {"text"', {}, "element 2 of the list"),
        (b'[{"text": "x"}, {"x": 1}]', {}, "element 2: no field 'text'; its fields are 'x'"),
        (b'[{"text": "\xff"}]', {}, "element 1 is not UTF-8"),
        (b"", {}, "too little text"),
        (b"[]", {}, "too little text"),
        (b'{"text": "x"}\n', {}, "the val split would be empty"),
        (lzma.compress(b'{"text": "x"}\n' * 99)[:-20], {}, "damaged compressed file"),
        (gzip.compress(b'{"text": "x"}\n' * 99)[:-9], {}, "damaged compressed file"),
        (b"\x28\xb5\x2f\xfd....", {}, "zstd files are not read"),
        (b'{"text": "x"}', {"tokenizer": "char", "max_documents": 1}, "would be empty"),
        (b'{"text": ""}', {"tokenizer": "char"}, "there is not one character"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, content, options, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, jsonl=tmp_path / "a.jsonl", **options)
    assert [f.name for f in tmp_path.iterdir()] == ["a.jsonl"]


def test_text_that_is_not_utf8_far_inside(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.data.readers.BLOCK_BYTES", 64)
    text = ("\u00e9" * 500).encode()
    (tmp_path / "a.txt").write_bytes(text + b"\xe9")
    with pytest.raises(ValueError, match="not UTF-8 text, byte 1000 is 0xe9; convert it"):
        make(tmp_path, text=tmp_path / "a.txt")


def test_bad_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match="no field 'txt'; its fields are 'text', 'id'"):
        make(tmp_path, parquet=tmp_path / "a.parquet", field="txt")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="b.parquet: not a parquet file"):
        make(tmp_path, parquet=tmp_path / "b.parquet")


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
        (dict(jsonl="a", val_fraction=1.0), r"must lie in \(0, 1\)"),
        (dict(jsonl="a", workers=-1), "workers must not be negative"),
        (dict(jsonl="a", max_documents=0), "max_documents must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**options)


def test_no_network(tmp_path):
    """HF_HUB_OFFLINE is set for all tests."""
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match="wikitext-2-raw-v1: the hub cannot be reached .*--parquet"):
        prepare(PrepareConfig(name="wikitext2", out=str(tmp_path / "w")))
    assert not list(tmp_path.iterdir())


def test_network_that_fails_later_goes_on(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "t", texts(300))
    local_hub(monkeypatch, {"train": path})
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
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
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
        rows = [row["output"] for row in json.load(file)[:3000]]
    found = documents_of(stream(out, "train")) + documents_of(stream(out, "val"))
    assert sorted(found) == sorted(row for row in rows if row)


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
