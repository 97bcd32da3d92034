import numpy as np
import pytest

from gpt2.data import find_shards, open_shards, write_shard
from gpt2.data.shards import HEADER_BYTES, MAGIC, read_manifest


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
    for name in [*names, "notes.txt", "training.bin"]:
        (tmp_path / name).write_bytes(b"\0\0")
    assert [p.name for p in find_shards(tmp_path, "train")] == sorted(names[:2])
    assert [p.name for p in find_shards(tmp_path, "val")] == [names[2]]


def test_more_than_two_to_the_31_tokens(tmp_path):
    path = tmp_path / "train_000000.bin"
    write_shard(path, np.arange(4))
    n_tokens = (1 << 31) + 5
    header = np.fromfile(path, dtype="<i4", count=256)
    header[2:4] = np.array([n_tokens], dtype="<i8").view("<i4")
    with open(path, "r+b") as file:
        file.write(header.tobytes())
        file.truncate(HEADER_BYTES + 2 * n_tokens)
    assert open_shards(path)[0].n_tokens == n_tokens


@pytest.mark.parametrize(
    "tokens, message",
    [
        (np.array([70000]), "65535"),
        (np.array([-1]), "65535"),
        (np.array([]), "at least one"),
        (np.array([[1, 2]]), "one dimension"),
        (np.array([1.5]), "integer"),
    ],
)
def test_refuses_to_write_what_does_not_fit(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def damage(path, how):
    write_shard(path, np.arange(3000) % 100)
    data = bytearray(path.read_bytes())
    if how == "magic":
        data[0] ^= 1
    elif how == "version":
        data[4] = 7
    elif how == "count":
        data[8] ^= 1
    elif how == "negative":
        data[8:16] = b"\xff" * 8
    elif how == "cut":
        del data[-100:]
    elif how == "odd":
        del data[-1:]
    elif how == "longer":
        data += b"\0\0"
    elif how == "header only":
        del data[500:]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how, message",
    [
        ("magic", "magic number is 20240521"),
        ("version", "version 7"),
        ("count", "cut short or damaged"),
        ("negative", "cut short or damaged"),
        ("cut", "cut short"),
        ("odd", "cut short"),
        ("longer", "promises 3000 tokens"),
        ("header only", "cut short"),
    ],
)
def test_damaged_shards_are_named(tmp_path, how, message):
    path = tmp_path / "train_000000.bin"
    damage(path, how)
    with pytest.raises(ValueError, match=message) as error:
        open_shards(path)
    assert str(path) in str(error.value)


def test_damaged_npy_and_raw(tmp_path):
    np.save(tmp_path / "floats.npy", np.ones(5))
    np.save(tmp_path / "good.npy", np.arange(50, dtype="<u2"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-2])
    (tmp_path / "text.npy").write_text("hello, this is no array")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for name, message in [
        ("floats.npy", "float64"), ("cut.npy", "cut short"), ("text.npy", "not a .npy"),
        ("empty.bin", "0 bytes"), ("odd.bin", "3 bytes"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_shards(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(OSError, match="prepare_data"):
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
