"""Batches on their way to a CUDA GPU, with copies that are held up behind other work."""

import numpy as np
import pytest
import torch

from gpt2.data import TokenLoader, write_shard
from gpt2.data.feed import Feed


@pytest.mark.parametrize("busy", ["compute", "copies", "nothing"])
def test_every_batch_arrives_whole(tmp_path, busy):
    write_shard(tmp_path / "train_000000.bin", np.random.default_rng(0).integers(0, 50257, 10**6))
    data = TokenLoader(tmp_path / "train_000000.bin", 1024, eot=50256, doc_mask=True)
    device = torch.device("cuda")
    feed = Feed(data, device)
    work = torch.randn(4096, 4096, device=device)
    sums = []
    for step in range(200):
        if busy == "copies":
            with torch.cuda.stream(feed.copies.stream):
                work @ work  # the copies queue up behind it
        parts = feed.batch(step, 32)
        if busy == "compute":
            work @ work
        # Read late, and after memory of earlier batches was given back.
        sums.append([part.long().mul(torch.arange(1024, device=device)).sum() for part in parts])
    feed.close()
    for step, got in enumerate(sums):
        expected = [p.long().mul(torch.arange(1024)).sum() for p in data.batch(step, 32)]
        assert [g.item() for g in got] == [e.item() for e in expected], step


def test_the_host_does_not_wait_for_data(tmp_path):
    write_shard(tmp_path / "train_000000.bin", np.arange(10**6) % 50257)
    feed = Feed(TokenLoader(tmp_path / "train_000000.bin", 1024), torch.device("cuda"))
    work = torch.randn(4096, 4096, device="cuda")
    for step in range(60):
        if step == 10:
            feed.waited_s = 0.0
        feed.batch(step, 64)
        for _ in range(10):
            work @ work
        torch.cuda.synchronize()
    feed.close()
    assert feed.waited_s / 50 < 1e-3
