import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from gpt2.data import Mixture, TokenLoader, find_shards, write_shard
from gpt2.data.integrity import BLOCK_BYTES, BLOCK_KEY, manifest_records
from gpt2.train.pretrain import pretrain


def write_manifest(folder, *, blocks=True) -> None:
    """The part of prepare_data's manifest that integrity is about."""
    records = []
    for path in sorted(folder.glob("train_*.bin")):
        data = path.read_bytes()
        records.append(
            {
                "file": path.name, "tokens": (len(data) - 1024) // 2, "documents": 1,
                "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
            }
        )  # fmt: skip
        if blocks:
            parts = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
            records[-1][BLOCK_KEY] = [xxhash.xxh3_64_hexdigest(p) for p in parts]
    manifest = {"tokenizer": {"name": "gpt2"}, "splits": {"train": {"shards": records}}}
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
    for i in range(3):
        write_shard(tmp_path / f"train_{i:06}.bin", np.arange(2_500_000) % 50000)
    return tmp_path


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("verify", ["open", "background"])
def test_a_flipped_bit_is_named(folder, verify, blocks):
    write_manifest(folder, blocks=blocks)
    paths = find_shards(folder, "train")
    expected = TokenLoader(paths, 64).batch(0, 4)[0]
    for mode in ("off", "background", "open"):
        data = TokenLoader(paths, 64, verify=mode)
        assert data.verifier.n_known == (0 if mode == "off" else 3)
        assert torch.equal(data.batch(0, 4)[0], expected)
        data.verifier.join()
        data.batch(1, 4)
    flip(paths[1], BLOCK_BYTES + 500)
    where = f"between bytes {BLOCK_BYTES} and 5001024" if blocks else "somewhere"
    with pytest.raises(ValueError, match=f"train_000001.bin.* {where}") as error:
        data = TokenLoader(paths, 64, verify=verify)
        data.batch(0, 4)
        data.verifier.join()
        data.batch(1, 4)
    assert str(paths[1]) in str(error.value)
    if verify == "background":
        with pytest.raises(ValueError, match="train_000001"):
            data.batch(2, 4)
    TokenLoader(paths, 64).batch(0, 4)


def test_ranks_share_the_checking(folder):
    write_manifest(folder)
    paths = find_shards(folder, "train")
    flip(paths[1], 10_000)
    for rank in range(2):
        data = TokenLoader(paths, 64, verify="background", verify_share=(rank, 2))
        data.batch(0, 4, rank, 2)
        data.verifier.join()
        if rank == 1:
            with pytest.raises(ValueError, match="train_000001"):
                data.batch(1, 4, rank, 2)
        else:
            data.batch(1, 4, rank, 2)


def test_a_mixture_raises_what_a_source_finds(folder):
    from gpt2.config import data_sources

    write_manifest(folder)
    paths = find_shards(folder, "train")
    flip(paths[2], 10_000)
    loaders = {"a": TokenLoader(paths, 64, verify="background")}
    data = Mixture(data_sources("a:1,a:2@5"), loaders)
    data.batch(0, 4)
    loaders["a"].verifier.join()
    with pytest.raises(ValueError, match="train_000002"):
        data.batch(1, 4)


def test_another_file_under_the_name(folder):
    write_manifest(folder)
    write_shard(folder / "train_000001.bin", np.arange(1000))
    paths = find_shards(folder, "train")
    for verify in ("open", "background"):
        with pytest.raises(ValueError, match="has 1000 tokens, but manifest.json says 2500000"):
            TokenLoader(paths, 64, verify=verify)
    TokenLoader(paths, 64)


def test_open_wants_hashes_and_background_does_without(folder):
    paths = find_shards(folder, "train")
    data = TokenLoader(paths, 64, verify="background")
    assert data.verifier.n_known == 0 and data.batch(0, 4)[0].shape == (4, 64)
    with pytest.raises(ValueError, match="no hash of it"):
        TokenLoader(paths, 64, verify="open")
    with pytest.raises(ValueError, match="unknown verify 'on'"):
        TokenLoader(paths, 64, verify="on")


@pytest.mark.parametrize(
    "splits",
    [
        [], 3, {"train": 3}, {"train": {}}, {"train": {"shards": 3}}, {"train": {"shards": [3]}},
        {"train": {"shards": [{}]}},
        {"train": {"shards": [{"file": "a", "tokens": "3", "bytes": 1, "sha256": "0" * 64}]}},
        {"train": {"shards": [{"file": "a", "tokens": 3, "bytes": 1, "sha256": "?"}]}},
        {"train": {"shards": [{"file": "a", "tokens": 3, "bytes": 1, "sha256": "0" * 64,
                               BLOCK_KEY: ["0" * 16] * 2}]}},
        {"train": {"shards": [{"file": "a", "tokens": 3, "bytes": 1, "sha256": "0" * 64,
                               BLOCK_KEY: [3]}]}},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(tmp_path, splits):
    manifest = {"tokenizer": {"name": "gpt2"}, "splits": splits}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json: damaged .* prepare the data again"):
        manifest_records(tmp_path)


def test_a_run_stops_at_damaged_data(train_config, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"{split}_000000.bin", np.arange(5000) % 65)
    write_manifest(folder)
    config = replace(train_config, data=str(folder), verify="open", eval_every=0)
    pretrain(config)
    assert "open, hashes are known of 1 of 1 shards" in capsys.readouterr().out
    flip(folder / "train_000000.bin", 5000)
    with pytest.raises(ValueError, match="train_000000.bin: its content changed"):
        pretrain(replace(config, run_name="second"))
