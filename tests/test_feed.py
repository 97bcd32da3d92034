"""The thread that is one batch ahead, on a CPU, with copies that only note who makes them."""

import threading

import numpy as np
import pytest
import torch

from gpt2.data import TokenLoader, find_shards, write_shard
from gpt2.data.feed import Feed

from .conftest import equal

CPU = torch.device("cpu")


class Copies:
    def __init__(self):
        self.senders = set()

    def send(self, parts):
        self.senders.add(threading.current_thread())
        return parts, "done"

    def receive(self, sent, done):
        assert done == "done"
        return sent


@pytest.fixture
def data(counting):
    return TokenLoader(find_shards(counting, "train"), 16)


@pytest.mark.parametrize("copies", [None, Copies()], ids=["cpu", "copied"])
def test_steps_out_of_order_other_shapes_and_offsets(data, copies):
    feed, threads = Feed(data, CPU, copies), threading.active_count()
    for step, rows, offset in [(0, 4, 0), (1, 4, 0), (7, 4, 0), (8, 4, -3), (8, 4, -3), (9, 4, -3),
                               (9, 2, 5), (10, 2, 5), (0, 4, 0)]:  # fmt: skip
        found = feed.batch(step, rows, 1, 2, offset=offset)
        assert equal(found, data.batch(step, rows, 1, 2, offset=offset))
    assert feed.waited_s > 0
    assert threading.active_count() == threads + (copies is not None)
    feed.close()
    if copies is not None:  # all by the one thread
        assert len(copies.senders) == 1 and threading.current_thread() not in copies.senders


def test_the_next_batch_is_begun_before_it_is_asked_for(data):
    asked = []

    class Source:
        def batch(self, *sizes, **options):
            asked.append((sizes, options))
            return data.batch(*sizes, **options)

    feed = Feed(Source(), CPU, Copies())
    feed.batch(5, 4, 1, 2, offset=1)
    feed.close()
    assert asked == [((5, 4, 1, 2), {"offset": 1}), ((6, 4, 1, 2), {"offset": 1})]


@pytest.mark.parametrize("copies", [None, Copies()], ids=["cpu", "copied"])
def test_errors_come_at_the_batch_that_has_them(tmp_path, copies):
    tokens = np.zeros(1000, dtype="<u2")
    tokens[500:] = 77
    write_shard(tmp_path / "train_000000.bin", tokens)
    data = TokenLoader(tmp_path / "train_000000.bin", 10, shuffle=False, vocab_size=50)
    feed = Feed(data, CPU, copies)
    for step in range(12):
        feed.batch(step, 4)
    with pytest.raises(ValueError, match="token 500 is 77"):
        feed.batch(12, 4)
    with pytest.raises(ValueError, match="does not divide"):
        feed.batch(0, 5, 0, 2)
    feed.close()
