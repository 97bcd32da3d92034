"""Shards and manifests, broken at random: an error that names the file, or the right tokens.

A few hundred cases by default; `pytest -m slow tests/test_fuzz.py` tries 12,000 more. A case is a
function of its number, so `broken(number, ...)` shows it again.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.data import TokenLoader, find_shards, write_shard
from gpt2.data.integrity import BLOCK_BYTES, BLOCK_KEY
from gpt2.train.pretrain import find_tokenizer

BLOCK = 16
FORMATS = ("native", "raw", "npy")
HOSTILE = [0, 1, -1, 2, 255, 256, 1023, 1024, 2**15, 2**16, 2**31 - 1, -(2**31), 2**30 + 512]
VALUES = [
    None,
    True,
    0,
    -1,
    2**63,
    2**64,
    1e308,
    "",
    "x",
    "\u0000",
    [],
    {},
    [[]],
    "../../etc/passwd",
]


def write(folder: Path, kind: str, rng: random.Random) -> tuple[Path, np.ndarray]:
    tokens = np.random.default_rng(rng.getrandbits(32)).integers(0, 50257, rng.randint(200, 3000))
    tokens = tokens.astype("<u2")
    path = folder / {"native": "train_000000.bin", "raw": "train.bin", "npy": "train.npy"}[kind]
    if kind == "native":
        write_shard(path, tokens)
    elif kind == "raw":
        tokens.tofile(path)
    else:
        np.save(path, tokens)
    return path, tokens


def header_size(path: Path, tokens: np.ndarray) -> int:
    return path.stat().st_size - tokens.nbytes


def break_file(path: Path, header: int, rng: random.Random, payload: bool) -> str:
    """Damages a file; only its header and size, unless payload. Returns what it did."""
    before = path.read_bytes()
    data = bytearray(before)
    hows = ["cut", "cut far", "longer", "empty", "folder", "gone", "link", "noise", "private"]
    hows += ["header byte", "header words", "header bytes", "hostile word"] * 3 if header else []
    hows += ["bit", "bytes", "swap"] * 5 if payload else []
    how = rng.choice(hows)
    if how == "cut":
        del data[len(data) - rng.randint(1, 40) :]
    elif how == "cut far":
        del data[rng.randint(0, len(data) - 1) :]
    elif how == "longer":
        data += rng.randbytes(rng.randint(1, 5000))
    elif how == "empty":
        data.clear()
    elif how == "noise":
        data[:] = b"\xff" * rng.randint(1, 2000)
    elif how == "header byte":
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif how == "header bytes":
        for _ in range(rng.randint(2, 30)):
            data[rng.randrange(header)] = rng.randrange(256)
    elif how == "header words":
        word = 4 * rng.randrange(min(header // 4, 5))
        data[word : word + 4] = rng.randbytes(4)
    elif how == "hostile word":
        word = 4 * rng.randrange(min(header // 4, 5))
        data[word : word + 4] = rng.choice(HOSTILE).to_bytes(4, "little", signed=True)
    elif how == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "bytes":
        at = rng.randrange(len(data))
        data[at : at + 8] = rng.randbytes(len(data[at : at + 8]))
    elif how == "swap":
        middle = rng.randrange(1, len(data))
        data = data[middle:] + data[:middle]
    if how in ("folder", "gone", "link"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(path)
    else:
        path.write_bytes(data)
        if how == "private":
            path.chmod(0)
        elif data == before:
            return "nothing"
    return how


def manifest_of(path: Path, tokens: np.ndarray, rng: random.Random) -> dict:
    data = path.read_bytes()
    record = {
        "file": path.name, "tokens": len(tokens), "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    if rng.random() < 0.5:
        import xxhash

        blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
        record[BLOCK_KEY] = [xxhash.xxh3_64_hexdigest(block) for block in blocks]
    return {"tokenizer": {"name": "gpt2"}, "splits": {"train": {"shards": [record]}}}


def break_json(value, rng: random.Random):
    """The same JSON with one part replaced, left out or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    if rng.random() < 0.2:
        value.pop(key)
    else:
        value[key] = break_json(value[key], rng)
    return value


def right_or_refused(folder: Path, tokens: np.ndarray, verify: str, backend: str) -> bool:
    """Reads everything. Whether it was refused; fails on wrong tokens and on unnamed errors."""
    try:
        find_tokenizer(str(folder))
        paths = find_shards(folder, "train")
        data = TokenLoader(
            paths, BLOCK, shuffle=False, vocab_size=50257, verify=verify, backend=backend
        )
        x, y = data.batch(0, data.n_windows)
    except (ValueError, OSError) as error:
        named = f"{error} {getattr(error, 'filename', '')}"
        assert str(folder) in named, named
        return True
    # A file without header or manifest cannot say how long it was: a part of it is right as well.
    rows = min(len(x), len(tokens) // BLOCK)
    assert np.array_equal(x[:rows].flatten().numpy(), tokens[: rows * BLOCK])
    assert np.array_equal(y[:-1, -1].numpy(), x[1:, 0].numpy())
    return False


def broken(number: int, folder: Path) -> str:
    rng = random.Random(number)
    kind, backend = rng.choice(FORMATS), rng.choice(["cpp", "numpy"])
    path, tokens = write(folder, kind, rng)
    what = rng.choice(["file", "hashed file", "manifest json", "manifest bytes", "while mapped"])
    manifest = folder / "manifest.json"
    verify = "off"
    if what in ("hashed file", "manifest json", "manifest bytes"):
        manifest.write_text(json.dumps(manifest_of(path, tokens, rng)))
        verify = "open"
    how = ""
    if what.endswith("file"):
        how = break_file(path, header_size(path, tokens), rng, payload=verify == "open")
    elif what == "manifest json":
        manifest.write_text(json.dumps(break_json(json.loads(manifest.read_text()), rng)))
    elif what == "manifest bytes":
        how = break_file(manifest, 0, rng, payload=True)
    if what == "while mapped":
        data = TokenLoader(path, BLOCK, shuffle=False, backend=backend)
        how = break_file(path, 0, rng, payload=True)
        if path.exists() and path.is_file():
            os.utime(path, ns=(1, rng.getrandbits(50)))  # file systems keep coarse times
        try:
            x, _ = data.batch(0, data.n_windows)
        except OSError as error:
            assert error.filename == str(path)
        else:
            assert np.array_equal(x.flatten().numpy(), tokens[: x.numel()])
        return f"{what} {how}"
    refused = right_or_refused(folder, tokens, verify, backend)
    if what == "hashed file" and how not in ("private", "nothing"):
        assert refused, f"{how} of {kind} was not noticed"
    return f"{what} {how}" if refused else "harmless"


def try_cases(numbers, folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for number in numbers:
        case = folder / "case"
        case.mkdir()
        try:
            what = broken(number, case)
        except BaseException as error:
            error.add_note(f"case {number}")
            raise
        counts[what] = counts.get(what, 0) + 1
        shutil.rmtree(case)
    return counts


def test_broken_shards_and_manifests(tmp_path):
    counts = try_cases(range(400), tmp_path)
    assert sum(counts.values()) == 400
    assert sum(n for what, n in counts.items() if what != "harmless") > 250


@pytest.mark.slow
def test_many_broken_shards_and_manifests(tmp_path):
    counts = try_cases(range(1000, 13000), tmp_path)
    print(dict(sorted(counts.items())))
    assert sum(counts.values()) == 12000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(1000))
    path.chmod(0)
    with pytest.raises(PermissionError) as error:
        TokenLoader(path, BLOCK)
    assert error.value.filename == str(path)


@pytest.mark.slow
def test_the_cpp_loader_runs_clean_under_sanitizers():
    done = subprocess.run([sys.executable, Path(__file__).with_name("sanitize.py")])
    assert done.returncode == 0
