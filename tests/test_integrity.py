"""Content against the manifest's hashes, and what names the data of a run."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from gpt2.config import data_sources
from gpt2.data import Mixture, TokenLoader, find_shards, open_shards, write_shard
from gpt2.data.integrity import verify
from gpt2.data.shard_writer import file_hashes
from gpt2.data.shards import BLOCK_BYTES, BLOCK_KEY, manifest_records


def write_manifest(folder, blocks=True, tokenizer=None) -> None:
    """prepare_data's manifest, as far as it is about the shards that lie in the folder."""
    splits = {"train": {"shards": []}, "val": {"shards": []}}
    for path in [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.npy"))]:
        hashes = file_hashes(path)
        del hashes["sha256" if blocks else BLOCK_KEY]
        record = {"file": path.name, "tokens": open_shards(path)[0].n_tokens} | hashes
        splits[path.name.split("_")[0].split(".")[0]]["shards"].append(record)
    manifest = {"tokenizer": tokenizer or {"name": "gpt2"}, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path, at: int) -> None:
    """Flips a bit in place; the times of the file stay, as they do when a disk fails."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        write_shard(folder / f"train_{i:06}.bin", np.arange(2_500_000) % 50000)
    return folder


@pytest.mark.parametrize("blocks", [True, False])
def test_a_flipped_bit_is_named(folder, blocks):
    write_manifest(folder, blocks)
    paths = find_shards(folder, "train")
    data = TokenLoader(paths, 64, verify=(0, 1))
    assert torch.equal(data.batch(0, 4)[0], TokenLoader(paths, 64).batch(0, 4)[0])
    data.verifier.finish()
    assert verify(folder) == []
    flip(paths[1], BLOCK_BYTES + 500)
    where = f"between offsets {BLOCK_BYTES} and 5001024" if blocks else "5001024 bytes"
    (problem,) = verify(folder)
    assert f"{paths[1]}: damaged" in problem and where in problem
    data = TokenLoader(paths, 64, verify=(0, 1))
    for read in (data.verifier.finish, lambda: data.batch(2, 4)):
        with pytest.raises(ValueError, match=f"{paths[1]}: damaged.* {where}"):
            read()
    TokenLoader(paths, 64).batch(0, 4)


def test_ranks_share_the_checking_and_a_mixture_raises_what_a_source_finds(folder):
    paths = find_shards(folder, "train")
    TokenLoader(paths, 64, verify=(0, 1)).verifier.finish()  # no manifest: nothing to compare
    write_manifest(folder)
    flip(paths[1], 10_000)
    first, second = (TokenLoader(paths, 64, verify=(rank, 2)) for rank in range(2))
    first.verifier.finish()
    first.batch(1, 4, 0, 2)
    data = Mixture(data_sources("a:1,b:2"), {"a": first, "b": second})
    for read in (second.verifier.finish, lambda: data.batch(1, 4), lambda: second.batch(1, 4)):
        with pytest.raises(ValueError, match="train_000001"):
            read()


RECORD = {"file": "a", "tokens": 3, "bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "splits",
    [[], 3, {"train": 3}, {"train": {}}, {"train": {"shards": 3}}]
    + [
        {"train": {"shards": [record]}}
        for record in (
            3, {}, RECORD | {"tokens": "3"}, RECORD | {"sha256": "?"}, RECORD | {"file": "../a"},
            RECORD | {BLOCK_KEY: ["0" * 16] * 2}, RECORD | {BLOCK_KEY: [3]},
        )
    ],
)  # fmt: skip
def test_damaged_records_are_refused(tmp_path, splits):
    manifest = {"tokenizer": {"name": "gpt2"}, "splits": splits}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json: damaged .* prepare the data again"):
        manifest_records(tmp_path)


def identity(folder, **options):
    return TokenLoader(find_shards(folder, "train"), 64, **options).identity()


@pytest.mark.parametrize("manifest", [True, False])
def test_identity_is_that_of_the_tokens(folder, manifest, monkeypatch):
    if manifest:
        write_manifest(folder)
    (found,) = identity(folder)
    assert found["path"] == str(folder) and found["tokens"] == 7_500_000
    assert json.loads(json.dumps(found)) == found
    assert (found["tokenizer"] or "none").split()[0] == ("gpt2" if manifest else "none")
    # Another spelling, and a copy elsewhere.
    monkeypatch.chdir(folder.parent)
    shutil.copytree("data", "copy")
    for other in ("data", "data/../copy"):
        assert identity(other) == [found | {"path": other}]
    # Other order, other tokens, a shard less.
    paths = find_shards(folder, "train")
    flip(paths[2], 5_000_000)
    if manifest:
        write_manifest(folder)
    hashes = {found["hash"]}
    for some in (paths, paths[::-1], paths[:2]):
        (entry,) = TokenLoader(some, 64).identity()
        hashes.add(entry["hash"])
    assert len(hashes) == 4


def test_identity_names_the_tokenizer(folder):
    names = set()
    for tokenizer in ({"name": "byte"}, *({"name": "char", "chars": c} for c in ("ab", "ac"))):
        write_manifest(folder, tokenizer=tokenizer)
        (entry,) = identity(folder)
        names.add(entry["tokenizer"])
    assert len(names) == 3
