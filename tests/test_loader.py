"""Shards of consecutive integers: a window's tokens say where they came from."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data import TokenLoader, find_shards, write_shard
from gpt2.data.shards import HEADER_BYTES, shard_header

from .conftest import equal

BACKENDS = ["cpp", "numpy"]
EOT = 7


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def shards(folder, *sizes):
    paths, start = [], 0
    for i, size in enumerate(sizes):
        paths.append(folder / f"train_{i:06}.bin")
        write_shard(paths[-1], np.arange(start, start + size))
        start += size
    return paths


def test_an_epoch_shows_every_window_once_and_the_next_another_order(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)
    assert (data.n_tokens, data.n_windows, data.backend) == (1000, 61, backend)
    x, y = data.batch(0, 3 * 61)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(16))
    epochs = x[:, 0].view(3, 61).tolist()
    shifts = [min(epoch) for epoch in epochs]
    for epoch, shift in zip(epochs, shifts, strict=True):
        assert 0 <= shift < 16 and max(epoch) + 16 < 1000 and epoch != sorted(epoch)
        assert sorted(epoch) == list(range(shift, shift + 16 * 61, 16))
    orders = [[(s - min(e)) // 16 for s in e] for e in epochs]
    assert orders[0] != orders[1] != orders[2] and len(set(shifts)) > 1
    with pytest.raises(ValueError, match=r"must have the shape \(4, 16\)"):
        data.fill(np.arange(4), (x, y))


def test_seeds_give_unrelated_orders(counting):
    loaders = [TokenLoader(find_shards(counting, "train"), 4, seed=seed) for seed in range(20)]
    orders = np.array([d.batch(0, d.n_windows)[0][:, 0].numpy() // 4 for d in loaders])
    assert abs(np.corrcoef(orders) - np.eye(20)).max() < 0.3
    # Neighbours in an order are no nearer to each other than chance (a third of the range).
    assert 0.28 < np.abs(np.diff(orders)).mean() / orders.max() < 0.39


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    block_size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    rows=st.integers(1, 5),
    step=st.one_of(st.integers(0, 50), st.integers(0, 10**9)),
    offset=st.integers(-100, 100),
)
def test_ranks_share_one_global_batch_and_backends_agree(
    tmp_path_factory, sizes, block_size, seed, shuffle, rows, step, offset
):
    paths, n = shards(tmp_path_factory.mktemp("s"), *sizes), 8 * rows
    if sum(sizes) < (2 * block_size if shuffle else block_size + 1):
        for backend in BACKENDS:
            with pytest.raises(ValueError, match="smaller block_size or more text"):
                TokenLoader(paths, block_size, seed, shuffle, backend=backend)
        return
    loaders = [TokenLoader(paths, block_size, seed, shuffle, backend=b) for b in BACKENDS]
    whole = loaders[0].batch(step, n)
    assert torch.equal(whole[1], whole[0] + 1)
    for data in loaders:
        for world_size in (1, 2, 4, 8):
            parts = [data.batch(step, n, rank, world_size) for rank in range(world_size)]
            for i in (0, 1):
                assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
        # The samples of a step are the same however they are counted.
        first = max(step * n + offset, 0)
        one_by_one = [data.batch(first + i, 1)[0] for i in range(n)]
        shifted = data.batch(step, n, offset=first - step * n)[0]
        assert torch.equal(torch.cat(one_by_one), shifted)


def test_all_three_formats_and_shard_borders(tmp_path, backend):
    write_shard(tmp_path / "a.bin", np.arange(0, 50))
    np.arange(50, 1100, dtype="<u2").tofile(tmp_path / "b.bin")
    np.save(tmp_path / "c.npy", np.arange(1100, 1200, dtype="<u2"))
    paths = [tmp_path / n for n in ("a.bin", "b.bin", "c.npy")]
    data = TokenLoader(paths, 7, shuffle=False, backend=backend)
    x, y = data.batch(0, data.n_windows)
    assert x.flatten().tolist() == list(range(data.n_windows * 7)) and torch.equal(y, x + 1)


def test_a_folder_whose_name_is_not_utf_8(tmp_path, backend):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_shard(folder / "a.bin", np.arange(50))
    data = TokenLoader([folder / "a.bin"], 7, shuffle=False, backend=backend)
    assert data.batch(0, 1)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_sparse_shard_of_5_gib(tmp_path, backend):
    path, n_tokens = tmp_path / "train.bin", 5 * (1 << 30) // 2
    with open(path, "wb") as file:
        file.truncate(2 * n_tokens)
        file.seek(-16, os.SEEK_END)
        file.write(np.arange(100, 108, dtype="<u2").tobytes())
    data = TokenLoader(path, 1023, shuffle=False, eot=0, backend=backend)
    assert data.n_tokens == n_tokens
    assert data.provenance(20_000, 0, 1).document == 20_000 * 1023 + 1  # counted in pieces
    (x, _), end = data.batch(data.n_windows - 1, 1), data.n_windows * 1023
    assert x[0, -1] == max(0, 100 + end - 1 - (n_tokens - 8))
    far = TokenLoader(path, 1024, backend=backend).batch(10**9, 4)[0]
    assert ((far == 0) | (far >= 100) & (far < 108)).all()


def test_token_beyond_the_vocabulary(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, vocab_size=700, backend=backend)
    with pytest.raises(ValueError, match=r"train_000001.bin: token (\d+) is ([789]\d\d), .* 700"):
        data.batch(0, 61)
    with pytest.raises(ValueError, match=r"000001.bin: token 399 is 999, but"):  # a target only
        TokenLoader(counting / "train_000001.bin", 399, shuffle=False, vocab_size=999,
                    backend=backend).batch(0, 1)  # fmt: skip


def cut(path):
    os.truncate(path, 5000)


def cut_little(path):
    os.truncate(path, path.stat().st_size - 2)  # within the last page, which can still be read


def write_to(path):
    later = path.stat().st_mtime_ns + 10**9
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(later, later))  # file systems keep coarse times


@pytest.mark.parametrize(
    "change, message", [(cut, "cut short"), (cut_little, "cut short"), (write_to, "written to")]
)
def test_file_that_is_changed_while_it_is_read(tmp_path, backend, change, message):
    [path] = shards(tmp_path, 60000)
    data = TokenLoader(path, 16, backend=backend)
    data.batch(0, 4)
    change(path)
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(data.batch, step, 400) for step in range(8)]:
            with pytest.raises(OSError, match=message) as error:
                future.result()
            assert error.value.filename == str(path)


def test_file_that_is_removed_or_replaced_while_it_is_read(tmp_path, backend):
    [path] = shards(tmp_path, 60000)
    data = TokenLoader(path, 16, backend=backend)
    expected = data.batch(0, 400)[0]
    write_shard(path, np.zeros(60000, dtype="<u2"))  # a new file under the old name
    path.unlink()
    assert torch.equal(data.batch(0, 400)[0], expected)


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    """code in a process of its own, so that its memory, limits and signals are the loader's."""
    command = [sys.executable, "-c", "from gpt2.data import *\n" + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_bus_errors_of_others_still_end_the_process(counting):
    code = """
import os, signal, sys
TokenLoader(sys.argv[1], 16, backend="cpp").batch(0, 1)
os.kill(os.getpid(), signal.SIGBUS)"""
    assert run(code, counting / "train_000000.bin").returncode == -signal.SIGBUS


def test_bad_arguments(counting, backend):
    paths = find_shards(counting, "train")
    for arguments, options, message in [
        ((paths, 16), {"backend": "rust"}, "unknown loader backend"),
        ((paths, 0), {}, "block_size must be at least 1"),
        ((paths, 1 << 31), {}, "at most 1073741824"),
        (([], 16), {}, "no shards"),
        ((paths, 16), {"doc_mask": True}, "doc_mask needs an end-of-text token"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenLoader(*arguments, **({"backend": backend} | options))
    data = TokenLoader(paths, 16, eot=EOT, backend=backend)
    for arguments, offset, message in [
        ((-1, 4, 0, 1), 0, "step >= 0"), ((1 << 60, 4, 0, 1), 0, "beyond 2.60 samples"),
        ((0, 0, 0, 1), 0, "global_batch_size >= 1"), ((0, 4, 2, 2), 0, "rank < world_size"),
        ((0, 5, 0, 2), 0, "does not divide among 2 ranks"),
        ((2, 4, 0, 1), -9, "offset -9: before the first sample"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            data.batch(*arguments, offset=offset)
    for row, token, message in [(8, 0, "row 8 is not one of the 8"), (0, 18, "outside a row")]:
        with pytest.raises(ValueError, match=message):
            data.provenance(0, row, 8, token)


@pytest.fixture
def documents(tmp_path):
    """Shards of random tokens up to EOT; returns paths and tokens."""
    rng, found = np.random.default_rng(0), {}
    for i in range(2):
        tokens = rng.integers(0, EOT, 700)
        tokens[rng.integers(0, 700, 58)] = EOT
        path = tmp_path / f"train_{i:06}.bin"
        write_shard(path, tokens)
        found[str(path)] = tokens
    return found


def test_doc_start_is_where_the_document_of_a_token_begins(documents, backend):
    """End-of-text belongs to the document that it begins."""
    data = TokenLoader(list(documents), 33, eot=EOT, doc_mask=True, backend=backend)
    plain = TokenLoader(list(documents), 33, backend=backend)
    n_documents = 0
    for step in range(10):
        *parts, doc_start = data.batch(step, 8, 1, 2)
        assert equal(parts, plain.batch(step, 8, 1, 2))
        assert doc_start.dtype == torch.int32 and doc_start.shape == (4, 33)
        for tokens, found in zip(parts[0], doc_start, strict=True):
            starts = [0, *(tokens == EOT).nonzero().flatten().tolist(), 33]
            for start, end in pairwise(starts):
                assert (found[start:end] == start).all()
            n_documents += len(starts) - 2
    assert n_documents > 80


def test_provenance_leads_back_to_the_token(documents, backend):
    data = TokenLoader(list(documents), 33, eot=EOT, backend=backend)
    seen = set()
    for step in (0, 3, 10**6):
        x, y = data.batch(step, 8)
        for row in range(8):
            for t in (0, 5, 32, 33):
                shard, at, document = data.provenance(step, row, 8, t)
                assert documents[shard][at] == (x[row, t] if t < 33 else y[row, 32])
                assert document == (documents[shard][: at + 1] == EOT).sum()
                seen.add(shard)
    assert len(seen) == 2
    assert data.provenance(5, 3, 8, offset=-2) == data.provenance(5, 1, 8)
    assert TokenLoader(list(documents), 33, backend=backend).provenance(5, 5, 8).document == 0


def test_threads_and_forked_processes_may_share_a_loader(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)

    def read(_=None):  # numpy rather than tensors: torch would share memory through files
        return np.concatenate([data.batch(step, 8)[0].numpy() for step in range(40)])

    expected = read()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(4)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=lambda: queue.put(read())) for _ in range(3)]
    for child in children:
        child.start()
    found += [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len(found) == 7 and all(np.array_equal(part, expected) for part in found)


def test_cpp_asked_for_and_not_built(counting):
    code = """
import sys
sys.modules["gpt2._token_loader"] = None
assert TokenLoader(sys.argv[1], 16).backend == "numpy"
TokenLoader(sys.argv[1], 16, backend="cpp")"""
    done = run(code, counting / "train_000000.bin")
    assert "ImportError: gpt2._token_loader is not built, or" in done.stderr


def test_ten_billion_tokens_in_100_shards_take_no_memory(tmp_path, backend):
    for i in range(100):
        with open(tmp_path / f"fineweb_train_{i:06}.bin", "wb") as file:
            file.write(shard_header(10**8))
            file.truncate(HEADER_BYTES + 2 * 10**8)  # sparse
    code = """
import sys
def memory(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024
before = memory("VmRSS")
data = TokenLoader(find_shards(sys.argv[1], "train"), 1024, backend=sys.argv[2])
opened = memory("VmRSS") - before
data.batch(10**9, 16)
before = memory("RssAnon")
for step in range(500):
    data.batch(step * 7919, 16)
print(data.n_tokens, opened, memory("RssAnon") - before)"""
    n_tokens, opened, read = map(int, run(code, tmp_path, backend).stdout.split())
    assert n_tokens == 10_000_000_000 and opened < 200e6 and read < 4e6


def test_more_shards_than_files_may_be_open(tmp_path):
    for i in range(300):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"train_{i}.bin")
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[2])))
print(TokenLoader(find_shards(sys.argv[1], "train"), 8).n_tokens)"""
    assert run(code, tmp_path, 1000).stdout == "30000\n"
    refused = run(code, tmp_path, 200).stderr
    assert all(text in refused for text in ("Too many open files", "train_2", "ulimit -n"))
