"""Shards of consecutive integers: a window's tokens say where they came from."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data import TokenLoader, find_shards, write_shard

BACKENDS = ["cpp", "numpy"]


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


def test_windows_are_whole_and_targets_shifted(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)
    assert (data.n_tokens, data.n_windows, data.backend) == (1000, 61, backend)
    x, y = data.batch(3, 8)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, 16)
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))


def test_an_epoch_shows_every_window_once_and_the_next_another_order(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)
    starts = [int(data.batch(i, 1)[0][0, 0]) for i in range(3 * data.n_windows)]
    epochs = [starts[i : i + data.n_windows] for i in range(0, len(starts), data.n_windows)]
    shifts = []
    for epoch in epochs:
        shift = min(epoch)
        assert 0 <= shift < 16 and max(epoch) + 16 < 1000
        assert sorted(epoch) == list(range(shift, shift + 16 * data.n_windows, 16))
        assert epoch != sorted(epoch)
        shifts.append(shift)
    ranks = [[(s - min(e)) // 16 for s in e] for e in epochs]
    assert ranks[0] != ranks[1] and ranks[1] != ranks[2] and len(set(shifts)) > 1


def test_seeds_give_unrelated_orders(counting):
    paths = find_shards(counting, "train")
    orders = []
    for seed in range(20):
        data = TokenLoader(paths, 4, seed=seed)
        orders.append([int(data.batch(i, 1)[0][0, 0]) // 4 for i in range(data.n_windows)])
    orders = np.array(orders)
    assert abs(np.corrcoef(orders) - np.eye(20)).max() < 0.3
    # Neighbours in an order are no nearer to each other than chance (a third of the range).
    assert 0.28 < np.abs(np.diff(orders)).mean() / orders.max() < 0.39


def test_without_shuffle_windows_come_in_order(counting, backend):
    data = TokenLoader(find_shards(counting, "val"), 16, shuffle=False, backend=backend)
    assert data.n_windows == 12
    x, _ = data.batch(0, 12)
    assert x.flatten().tolist() == list(range(1000, 1192))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    block_size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    rows=st.integers(1, 5),
    step=st.one_of(st.integers(0, 50), st.integers(0, 10**9)),
)
def test_ranks_share_one_global_batch_and_backends_agree(
    tmp_path_factory, sizes, block_size, seed, shuffle, rows, step
):
    paths = shards(tmp_path_factory.mktemp("s"), *sizes)
    if sum(sizes) < (2 * block_size if shuffle else block_size + 1):
        for backend in BACKENDS:
            with pytest.raises(ValueError, match="smaller block_size or more text"):
                TokenLoader(paths, block_size, seed, shuffle, backend=backend)
        return
    loaders = [TokenLoader(paths, block_size, seed, shuffle, backend=b) for b in BACKENDS]
    whole = loaders[0].batch(step, 8 * rows)
    assert torch.equal(whole[1], whole[0] + 1)
    for data in loaders:
        for world_size in (1, 2, 4, 8):
            parts = [data.batch(step, 8 * rows, rank, world_size) for rank in range(world_size)]
            for i in (0, 1):
                assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])


def test_all_three_formats_and_shard_borders(tmp_path, backend):
    write_shard(tmp_path / "a.bin", np.arange(0, 50))
    np.arange(50, 1100, dtype="<u2").tofile(tmp_path / "b.bin")
    np.save(tmp_path / "c.npy", np.arange(1100, 1200, dtype="<u2"))
    paths = [tmp_path / n for n in ("a.bin", "b.bin", "c.npy")]
    data = TokenLoader(paths, 7, shuffle=False, backend=backend)
    x, y = data.batch(0, data.n_windows)
    assert x.flatten().tolist() == list(range(data.n_windows * 7))
    assert torch.equal(y, x + 1)


def test_a_sparse_shard_of_5_gib(tmp_path, backend):
    path = tmp_path / "train.bin"
    n_tokens = 5 * (1 << 30) // 2
    with open(path, "wb") as file:
        file.write(np.arange(8, dtype="<u2").tobytes())
        file.truncate(2 * n_tokens)
        file.seek(-16, os.SEEK_END)
        file.write(np.arange(100, 108, dtype="<u2").tobytes())
    data = TokenLoader(path, 1023, shuffle=False, backend=backend)
    assert data.n_tokens == n_tokens
    x, y = data.batch(data.n_windows - 1, 1)
    start = (data.n_windows - 1) * 1023
    assert x[0, -1] == max(0, 100 + start + 1022 - (n_tokens - 8))
    far = TokenLoader(path, 1024, backend=backend).batch(10**9, 4)
    assert far[0].shape == (4, 1024)


def test_token_beyond_the_vocabulary(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, vocab_size=700, backend=backend)
    with pytest.raises(ValueError, match=r"train_000001.bin: token \d+ is [789]\d\d, but .* 700"):
        for step in range(61):
            data.batch(step, 1)


def test_file_that_shrinks_while_mapped(tmp_path, backend):
    [path] = shards(tmp_path, 60000)
    data = TokenLoader(path, 16, backend=backend)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match="cut short") as error:
        for step in range(100):
            data.batch(step, 4)
    assert error.value.filename == str(path)


def test_file_that_is_written_to_while_mapped(tmp_path, backend):
    [path] = shards(tmp_path, 60000)
    data = TokenLoader(path, 16, backend=backend)
    expected = data.batch(0, 4)[0]
    later = path.stat().st_mtime_ns + 10**9
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"?")
    os.utime(path, ns=(later, later))  # file systems keep coarse times
    with pytest.raises(OSError, match="written to while it is in use") as error:
        data.batch(0, 4)
    assert error.value.filename == str(path) and expected.shape == (4, 16)


def test_file_that_is_removed_or_replaced_while_mapped(tmp_path, backend):
    [path] = shards(tmp_path, 60000)
    data = TokenLoader(path, 16, backend=backend)
    expected = [data.batch(step, 4)[0] for step in range(50)]
    write_shard(path, np.zeros(60000, dtype="<u2"))  # a new file under the old name
    path.unlink()
    for step in range(50):
        assert torch.equal(data.batch(step, 4)[0], expected[step])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 4, 0, 1), "step >= 0"),
        ((1 << 60, 4, 0, 1), "beyond 2.60 samples"),
        ((0, 0, 0, 1), "global_batch_size >= 1"),
        ((0, 4, 2, 2), "rank < world_size"),
        ((0, 5, 0, 2), "does not divide among 2 ranks"),
    ],
)
def test_bad_batch_arguments(counting, arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLoader(find_shards(counting, "train"), 16).batch(*arguments)


def test_bad_loader_arguments(counting, backend):
    paths = find_shards(counting, "train")
    with pytest.raises(ValueError, match="unknown loader backend"):
        TokenLoader(paths, 16, backend="rust")
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        TokenLoader(paths, 0, backend=backend)
    with pytest.raises(ValueError, match="at most 1073741824"):
        TokenLoader(paths, 1 << 31, backend=backend)
    with pytest.raises(ValueError, match="no shards"):
        TokenLoader([], 16, backend=backend)


EOT = 7


def with_documents(folder, n_shards=2, size=700):
    """Shards of random tokens below EOT, with EOT here and there; returns paths and the stream."""
    rng, paths, parts = np.random.default_rng(0), [], []
    for i in range(n_shards):
        tokens = rng.integers(0, EOT, size)
        tokens[rng.integers(0, size, size // 12)] = EOT
        paths.append(folder / f"train_{i:06}.bin")
        write_shard(paths[-1], tokens)
        parts.append(tokens)
    return paths, parts


def test_doc_start_is_the_first_token_of_each_document(tmp_path, backend):
    paths, _ = with_documents(tmp_path)
    data = TokenLoader(paths, 33, eot=EOT, doc_mask=True, backend=backend)
    plain = TokenLoader(paths, 33, backend=backend)
    documents = 0
    for step in range(30):
        x, y, doc_start = data.batch(step, 8, 1, 2)
        assert doc_start.dtype == torch.int32 and doc_start.shape == x.shape == (4, 33)
        expected = plain.batch(step, 8, 1, 2)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
        for row, starts in zip(x.tolist(), doc_start.tolist(), strict=True):
            start = 0
            for t, token in enumerate(row):
                assert starts[t] == start
                if token == EOT:
                    start, documents = t + 1, documents + 1
    assert documents > 200


def test_doc_mask_needs_an_end_of_text(tmp_path):
    paths, _ = with_documents(tmp_path)
    with pytest.raises(ValueError, match="doc_mask needs an end-of-text token"):
        TokenLoader(paths, 33, doc_mask=True)


def test_provenance_leads_back_to_the_token(tmp_path, backend):
    paths, parts = with_documents(tmp_path)
    data = TokenLoader(paths, 33, eot=EOT, backend=backend)
    by_path = dict(zip(map(str, paths), parts, strict=True))
    shards_seen = set()
    for step in (0, 3, 10**6):
        x, y = data.batch(step, 8)
        for row in range(8):
            for t in (0, 5, 32):
                shard, offset, document = data.provenance(step, row, 8, t)
                assert by_path[shard][offset] == x[row, t]
                assert document == (by_path[shard][:offset] == EOT).sum()
                shards_seen.add(shard)
            target = data.provenance(step, row, 8, 33)
            assert by_path[target.shard][target.offset] == y[row, 32]
    assert len(shards_seen) == 2
    with pytest.raises(ValueError, match="row 8 is not one of the 8"):
        data.provenance(0, 8, 8)
    with pytest.raises(ValueError, match="outside a window"):
        data.provenance(0, 0, 8, 34)
    assert TokenLoader(paths, 33, backend=backend).provenance(5, 5, 8).document == 0


def test_batches_into_given_buffers(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)
    out = data.buffers(4)
    x, y = data.batch(3, 8, 1, 2, out=out)
    assert x is out[0] and y is out[1]
    assert torch.equal(x, data.batch(3, 8, 1, 2)[0]) and torch.equal(y, x + 1)
    with pytest.raises(ValueError):
        data.batch(3, 8, out=out)


def test_threads_may_share_a_loader(counting):
    data = TokenLoader(find_shards(counting, "train"), 16, backend="cpp")
    expected = [data.batch(step, 8)[0] for step in range(50)]
    wrong = []

    def read():
        for step in range(50):
            if not torch.equal(data.batch(step, 8)[0], expected[step]):
                wrong.append(step)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def read_some(data, steps):
    return [data.batch(step, 8)[0] for step in steps]


def test_forked_workers_read_the_same(counting, backend):
    data = TokenLoader(find_shards(counting, "train"), 16, backend=backend)
    expected = read_some(data, range(40))
    parent, children = multiprocessing.get_context("fork"), []
    results = [parent.Queue() for _ in range(3)]
    for queue in results:
        # numpy rather than tensors: torch would share memory through file descriptors
        children.append(
            parent.Process(
                target=lambda q=queue: q.put([x.numpy() for x in read_some(data, range(40))])
            )
        )
        children[-1].start()
    for queue, child in zip(results, children, strict=True):
        for got, x in zip(queue.get(timeout=60), expected, strict=True):
            assert np.array_equal(got, x.numpy())
        child.join()
        assert child.exitcode == 0
    assert all(torch.equal(a, b) for a, b in zip(read_some(data, range(40)), expected, strict=True))


def test_cpp_asked_for_and_not_built(counting):
    code = (
        "import sys; sys.modules['gpt2._token_loader'] = None\n"
        "from gpt2.data import TokenLoader\n"
        f"path = {str(counting / 'train_000000.bin')!r}\n"
        "assert TokenLoader(path, 16).backend == 'numpy'\n"
        "try: TokenLoader(path, 16, backend='cpp')\n"
        "except ImportError as e: print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install a C++17 compiler" in out.stdout
