import json
import os
import pickle
import shutil

import numpy as np
import pytest

from gpt2.data import find_shards, open_shards, read_manifest, write_shard
from gpt2.data.shards import HEADER_BYTES, MAGIC, folder_tokenizer, shard_header
from gpt2.tokenizer import from_dict


def test_native_format_is_llm_c(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2, 65535]))
    header = np.fromfile(path, dtype="<i4", count=256)
    assert list(header[:3]) == [MAGIC, 1, 3] and not header[3:].any()
    assert np.fromfile(path, dtype="<u2", offset=1024).tolist() == [1, 2, 65535]
    assert open_shards(path)[0].tokens().tolist() == [1, 2, 65535]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_nanogpt_and_build_nanogpt_formats(tmp_path):
    np.arange(5000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "edu_train_000001.npy", np.arange(70, dtype="<u2"))
    raw, npy = open_shards([tmp_path / "train.bin", tmp_path / "edu_train_000001.npy"])
    assert raw.n_tokens == 5000 and raw.tokens()[4999] == 4999
    assert npy.n_tokens == 70 and npy.tokens()[69] == 69


def test_find_shards_knows_the_fields_names(tmp_path):
    names = ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    for name in [*names, "notes.txt", "training.bin", "._fineweb_train_000001.bin"]:
        (tmp_path / name).write_bytes(b"\0\0")
    assert [p.name for p in find_shards(tmp_path, "train")] == sorted(names[:2])
    assert [p.name for p in find_shards(tmp_path, "val")] == [names[2]]


def test_more_than_two_to_the_31_tokens(tmp_path):
    path = tmp_path / "train_000000.bin"
    n_tokens = (1 << 31) + 5
    path.write_bytes(shard_header(n_tokens))
    os.truncate(path, HEADER_BYTES + 2 * n_tokens)
    assert open_shards(path)[0].n_tokens == n_tokens


@pytest.mark.parametrize(
    "tokens, message",
    [
        (np.array([70000]), "65535"),
        (np.array([-1]), "65535"),
        (np.array([]), "one dimension"),
        (np.array([[1, 2]]), "one dimension"),
        (np.array([1.5]), "one dimension of integers"),
    ],
)
def test_refuses_to_write_what_does_not_fit(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def word(data: bytes, number: int, value: int) -> bytes:
    """A file with another word in its header."""
    return data[: 4 * number] + value.to_bytes(4, "little") + data[4 * number + 4 :]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: word(data, 0, MAGIC ^ 1), "magic number is 20240521"),
        (lambda data: word(data, 1, 7), "version 7, .* another width"),
        (lambda data: word(word(data, 0, 20240801), 1, 7), "magic 20240801 .* another width"),
        (lambda data: word(data, 2, 3001), "cut short or damaged"),
        (lambda data: word(word(data, 2, 2**32 - 1), 3, 2**32 - 1), "cut short or damaged"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data + bytes(2), "promises 3000 tokens"),
        (lambda data: data[:500], "cut short"),
        (lambda data: b"", "0 bytes"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(3000) % 100)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        open_shards(path)
    assert str(path) in str(error.value)


def test_damaged_npy_and_raw(tmp_path):
    np.save(tmp_path / "floats.npy", np.ones(5))
    np.save(tmp_path / "wide.npy", np.arange(5, dtype="<u4"))
    np.save(tmp_path / "good.npy", np.arange(50, dtype="<u2"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-2])
    (tmp_path / "text.npy").write_text("hello, this is no array")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (np.arange(500, dtype="<u4") + 65400).tofile(tmp_path / "train.bin")  # as nanoGPT's, of uint32
    for name, message in [
        ("floats.npy", "float64"), ("wide.npy", "uint32, with tokens of another width"),
        ("train.bin", "every second number .* is 0 or 1: numbers of 32, with tokens of another"),
        ("cut.npy", "cut short"), ("text.npy", "not a .npy"), ("odd.bin", "3 bytes"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_shards(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(OSError, match="gpt2-triton prepare"):
        find_shards(tmp_path / "nowhere", "train")
    with pytest.raises(OSError, match="no val shards"):
        find_shards(tmp_path, "val")
    with pytest.raises(FileNotFoundError):
        open_shards(tmp_path / "train.bin")


def test_damaged_manifest(tmp_path):
    assert read_manifest(tmp_path) is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="prepare the data again"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change, name, message",
    [
        (lambda path: path.unlink(), "train_000001.bin", "missing, but the manifest lists it"),
        (lambda path: shutil.copy(path, path.with_stem("train_000001 (copy)")),
         "train_000001 (copy).bin", "not in the manifest, .* move it out of the folder"),
        (lambda path: path.with_name("train.npy").touch(), "train.npy", "not in the manifest"),
        (lambda path: write_shard(path, np.arange(99)), "train_000001.bin", "has 99 tokens, but"),
    ],
)  # fmt: skip
def test_the_manifest_is_the_truth_about_its_folder(counting, change, name, message):
    def record(path):
        data = path.read_bytes()
        tokens = (len(data) - HEADER_BYTES) // 2
        return {"file": path.name, "tokens": tokens, "bytes": len(data), "sha256": "0" * 64}

    splits = {s: {"shards": [*map(record, find_shards(counting, s))]} for s in ("train", "val")}
    manifest = {"tokenizer": {"name": "byte"}, "splits": splits}
    (counting / "manifest.json").write_text(json.dumps(manifest))
    assert len(find_shards(counting, "train")) == 2
    change(counting / "train_000001.bin")
    with pytest.raises(ValueError, match=message) as error:
        find_shards(counting, "train")
    assert str(counting / name) in str(error.value)
    assert len(find_shards(counting, "val")) == 1
    (counting / "manifest.json").unlink()
    find_shards(counting, "train")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_tokenizer_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_tokenizer(tmp_path) is None
    meta, chars = tmp_path / "meta.pkl", sorted(set("To be, or not\n"))  # as nanoGPT makes it
    content = {
        "vocab_size": len(chars), "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }  # fmt: skip
    meta.write_bytes(pickle.dumps(content))
    tokenizer = from_dict(folder_tokenizer(tmp_path))
    assert tokenizer.decode(tokenizer.encode("To be")) == "To be"
    assert tokenizer.encode("To be") == [content["stoi"][c] for c in "To be"]
    for damaged, message in [
        (pickle.dumps(Evil()), "it names posix.system"),
        (pickle.dumps(content)[:-20], "pickle|ran out"),
        (pickle.dumps({"itos": {0: "b", 1: "a"}}), "single ones in order"),
        (pickle.dumps({"itos": {1: "a"}}), "0"),
        (pickle.dumps([]), "not the vocabulary of nanoGPT"),
        (b"text", "prepare the text"),
    ]:
        meta.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            folder_tokenizer(tmp_path)
        assert str(meta) in str(error.value)
    assert not (tmp_path / "evil").exists()
    (tmp_path / "manifest.json").write_text('{"tokenizer": {"name": "byte"}}')
    assert folder_tokenizer(tmp_path) == {"name": "byte"}
