"""Batches on the device, the next one on its way while this one is used.

On a GPU a thread makes a batch (the C++ loader needs no interpreter lock for it), copies it to
pinned memory and queues its copy to the device on a stream of its own, one batch ahead. The stream
that computes waits for an event after the copy, and the device memory is marked as used by it, so
that the allocator does not hand it out early. Pinned memory comes from torch's caching host
allocator, which gives a block out again only after the copies from it.

On a CPU the loader is called when the batch is asked for: it takes well below a thousandth of the
time of a step, so a thread could gain nothing.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gpt2.data.loader import Batch, BatchSource


class CudaCopies:
    """Copies to a GPU, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, parts: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Queues the copies; returns what they will fill, and an event that comes after them."""
        with torch.cuda.stream(self.stream):
            sent = tuple(part.pin_memory().to(self.device, non_blocking=True) for part in parts)
            return sent, self.stream.record_event()

    def receive(self, sent: Batch, done: torch.cuda.Event) -> Batch:
        """Makes the current stream wait for the copies, without the host waiting."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for part in sent:
            part.record_stream(current)
        return sent


class Feed:
    """A source of batches, as tensors on a device.

    copies: how they get there; None: they stay (CPU).
    Attribute waited_s: how long the host waited in batch(), seconds; the caller may reset it.
    """

    def __init__(self, source: BatchSource, device: torch.device, copies=None):
        self.copies = CudaCopies(device) if device.type == "cuda" else copies
        self.source, self.waited_s = source, 0.0
        self._ahead: tuple[tuple | None, Future | None] = None, None
        self._thread = ThreadPoolExecutor(1, "feed")  # starts with the first task

    def batch(
        self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1,
        *, offset: int = 0,
    ) -> Batch:  # fmt: skip
        """As source.batch, on the device; then starts on the next step's. Raises as source does."""
        start = time.perf_counter()
        key = (step, global_batch_size, rank, world_size, offset)
        if self.copies is None:
            parts = self._read(key)
        else:
            (ready, future), self._ahead = self._ahead, (None, None)
            if ready != key:  # one thread: what was started for another step ends before this one
                future = self._thread.submit(self._send, key)
            parts = self.copies.receive(*future.result())
            following = (step + 1, *key[1:])
            self._ahead = following, self._thread.submit(self._send, following)
        self.waited_s += time.perf_counter() - start
        return parts

    def close(self) -> None:
        """Ends the thread, after the batch it is at."""
        self._thread.shutdown()

    def _read(self, key: tuple) -> Batch:
        return self.source.batch(*key[:-1], offset=key[-1])

    def _send(self, key: tuple):
        return self.copies.send(self._read(key))
