"""Shards and manifests, broken at random: an error that names the file, or the right tokens.

Some hundred cases by default; `pytest -m slow tests/test_fuzz.py` tries 12,000 more. A case is a
function of its number, so `broken(number, ...)` shows it again.
"""

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
from gpt2.train.pretrain import find_tokenizer

from .test_integrity import write_manifest

BLOCK = 16
FORMATS = {"train_000000.bin": write_shard, "train.bin": lambda path, tokens: tokens.tofile(path),
           "train.npy": np.save}  # fmt: skip
HOSTILE = [0, 1, -1, 2, 255, 256, 1023, 1024, 2**15, 2**16, 2**31 - 1, -(2**31), 2**30 + 512]
VALUES = [None, True, 0, -1, 2**63, 2**64, 1e308, "", "x", "\0", [], {}, [[]], "../../etc/passwd"]


def break_content(data: bytes, header: int, rng: random.Random, payload: bool) -> tuple[str, bytes]:
    """What was done to the bytes of a file, and what came of them: only its header and size, unless
    payload."""
    at = rng.randrange(len(data))
    word = 4 * rng.randrange(min(header // 4, 5)) if header else 0
    hostile = rng.choice(HOSTILE).to_bytes(4, "little", signed=True)

    def replaced(start: int, new: bytes) -> bytes:
        return data[:start] + new + data[start + len(new) :]

    hows, often = {
        "cut": data[: -rng.randint(1, 40)], "cut far": data[:at], "empty": b"",
        "longer": data + rng.randbytes(rng.randint(1, 5000)),
        "noise": b"\xff" * rng.randint(1, 2000),
    }, {}  # fmt: skip
    if header:
        often["header bytes"] = replaced(rng.randrange(header - 8), rng.randbytes(8))
        often["header word"] = replaced(word, rng.randbytes(4))
        often["hostile word"] = replaced(word, hostile)
    if payload:
        often["bit"] = replaced(at, bytes([data[at] ^ 1 << rng.randrange(8)]))
        often["bytes"] = replaced(at, rng.randbytes(min(8, len(data) - at)))
        often["swap"] = data[at:] + data[:at]
    how = rng.choice([*hows, *list(often) * 4])
    return how, (hows | often)[how]


def break_file(path: Path, header: int, rng: random.Random, payload: bool) -> str:
    """Damages or replaces a file. Returns what it did."""
    how = rng.choice(["content"] * 4 + ["folder", "gone", "link"])
    if how == "content":
        before = path.read_bytes()
        how, data = break_content(before, header, rng, payload)
        path.write_bytes(data)
        return "nothing" if data == before else how
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(path)
    return how


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


def right_or_refused(folder: Path, tokens: np.ndarray, verify, backend: str) -> bool:
    """Reads everything. Whether it was refused; fails on wrong tokens and on unnamed errors."""
    try:
        find_tokenizer(str(folder))
        paths = find_shards(folder, "train")
        data = TokenLoader(
            paths, BLOCK, shuffle=False, vocab_size=50257, verify=verify, backend=backend
        )
        data.verifier.finish()
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
    name, backend = rng.choice(list(FORMATS)), rng.choice(["cpp", "numpy"])
    path, manifest = folder / name, folder / "manifest.json"
    tokens = np.random.default_rng(number).integers(0, 50257, rng.randint(200, 3000)).astype("<u2")
    FORMATS[name](path, tokens)
    header = path.stat().st_size - tokens.nbytes
    what = rng.choice(["file", "hashed file", "manifest json", "manifest bytes", "while mapped"])
    how, verify = "", None
    if what in ("hashed file", "manifest json", "manifest bytes"):
        write_manifest(folder, rng.random() < 0.5)
        verify = (0, 1)
    if what == "manifest json":
        manifest.write_text(json.dumps(break_json(json.loads(manifest.read_text()), rng)))
    elif what == "manifest bytes":
        how = break_file(manifest, 0, rng, payload=True)
    elif what == "while mapped":
        data = TokenLoader(path, BLOCK, shuffle=False, backend=backend)
        how = break_file(path, 0, rng, payload=True)
        if path.is_file():
            os.utime(path, ns=(1, rng.getrandbits(50)))  # file systems keep coarse times
        try:
            x, _ = data.batch(0, data.n_windows)
        except OSError as error:
            assert error.filename == str(path)
        else:
            assert np.array_equal(x.flatten().numpy(), tokens[: x.numel()])
        return f"{what} {how}"
    else:
        how = break_file(path, header, rng, payload=verify is not None)
    refused = right_or_refused(folder, tokens, verify, backend)
    if what == "hashed file" and how != "nothing":
        assert refused, f"{how} of {name} was not noticed"
    return f"{what} {how}" if refused else "harmless"


@pytest.mark.parametrize(
    "numbers", [range(400), pytest.param(range(1000, 13000), marks=pytest.mark.slow)]
)
def test_broken_shards_and_manifests(tmp_path, numbers):
    refused = 0
    for number in numbers:
        case = tmp_path / "case"
        case.mkdir()
        try:
            refused += broken(number, case) != "harmless"
        except BaseException as error:
            error.add_note(f"case {number}")
            raise
        shutil.rmtree(case)
    assert refused > 0.6 * len(numbers)


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
