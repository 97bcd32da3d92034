"""The ring of buffers, on a CPU: copies that run as late as a GPU's may."""

import threading

import numpy as np
import pytest
import torch

from gpt2.data import TokenLoader, find_shards, write_shard
from gpt2.data.feed import SLOTS, Feed


class LateCopies:
    """Copies only when somebody waits for them: a buffer that is refilled too early shows."""

    pin_memory = False

    def __init__(self):
        self.lock, self.threads = threading.Lock(), set()

    def send(self, parts):
        sent = tuple(torch.full_like(part, -1) for part in parts)
        self.threads.add(threading.current_thread())
        return sent, Late(self.lock, sent, parts)

    def receive(self, sent, done):
        done.waited.append(threading.current_thread())


class Late:
    def __init__(self, lock, sent, parts):
        self.lock, self.sent, self.parts, self.waited = lock, sent, parts, []

    def synchronize(self):
        with self.lock:
            for to, part in zip(self.sent, self.parts or (), strict=False):
                to.copy_(part)
            self.parts = None


@pytest.fixture
def data(counting):
    return TokenLoader(find_shards(counting, "train"), 16)


def test_no_buffer_is_refilled_before_its_copy_is_done(data):
    copies = LateCopies()
    feed = Feed(data, torch.device("cpu"), copies)
    batches = [feed.batch(step, 8, 1, 2) for step in range(30)]
    feed.close()
    # All but the last copies were waited for, by the thread that fills.
    for step, (x, y) in enumerate(batches[: 30 - SLOTS]):
        assert torch.equal(x, data.batch(step, 8, 1, 2)[0]) and torch.equal(y, x + 1)
    assert len(copies.threads) == 1 and threading.current_thread() not in copies.threads


class PromptCopies(LateCopies):
    def receive(self, sent, done):
        done.synchronize()


@pytest.mark.parametrize("copies", [None, PromptCopies()])
def test_steps_out_of_order_other_shapes_and_offsets(data, copies):
    feed = Feed(data, torch.device("cpu"), copies)
    for step, rows, offset in [(0, 4, 0), (1, 4, 0), (7, 4, 0), (8, 4, -3), (8, 4, -3), (9, 4, -3),
                               (9, 2, 5), (10, 2, 5), (0, 4, 0)]:  # fmt: skip
        x, y = feed.batch(step, rows, offset=offset)
        assert torch.equal(x, data.batch(step, rows, offset=offset)[0]) and torch.equal(y, x + 1)
    feed.close()


@pytest.mark.parametrize("buffers", [True, False])
def test_the_next_batch_is_begun_before_it_is_asked_for(data, buffers):
    asked = []

    class Source:
        def batch(self, step, *sizes, **options):
            asked.append((step, options.pop("out") is not None, options))
            return data.batch(step, *sizes, **options)

        def buffers(self, rows, **options):
            return data.buffers(rows, **options) if buffers else None

    feed = Feed(Source(), torch.device("cpu"), LateCopies())
    feed.batch(5, 4, offset=1)
    feed.close()
    assert asked == [(5, buffers, {"offset": 1}), (6, buffers, {"offset": 1})]


@pytest.mark.parametrize("copies", [None, LateCopies()])
def test_errors_come_at_the_batch_that_has_them(tmp_path, copies):
    tokens = np.zeros(1000, dtype="<u2")
    tokens[500:] = 77
    write_shard(tmp_path / "train_000000.bin", tokens)
    data = TokenLoader(tmp_path / "train_000000.bin", 10, shuffle=False, vocab_size=50)
    feed = Feed(data, torch.device("cpu"), copies)
    for step in range(12):
        feed.batch(step, 4)
    with pytest.raises(ValueError, match="token 500 is 77"):
        feed.batch(12, 4)
    with pytest.raises(ValueError, match="does not divide"):
        feed.batch(0, 5, 0, 2)
    feed.close()


def test_on_a_cpu_two_buffers_take_turns_without_a_thread(data):
    threads = threading.active_count()
    feed = Feed(data, torch.device("cpu"))
    x, again = feed.batch(3, 8)[0], feed.batch(4, 8)[0]
    assert torch.equal(x, data.batch(3, 8)[0]) and torch.equal(again, data.batch(4, 8)[0])
    assert feed.batch(5, 8)[0] is x and torch.equal(x, data.batch(5, 8)[0])
    assert feed.waited_s > 0 and threading.active_count() == threads
