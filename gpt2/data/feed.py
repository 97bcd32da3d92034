"""Batches on the device, the next one on its way while this one is used.

On a GPU a thread fills a pinned buffer (the C++ loader needs no interpreter lock for it) and queues
its copy on a stream of its own, one batch ahead. The buffers form a ring, each with an event that
its copy records: a buffer is filled again only after that event, since an earlier refill would
change a batch that is still being copied. The stream that computes waits for the event too, and the
device memory is marked as used by it, so that the allocator does not hand it out early.

On a CPU the loader is called when the batch is asked for: it takes well below a thousandth of the
time of a step, so a thread could gain nothing.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gpt2.data.loader import Batch, BatchSource, rank_rows

SLOTS = 2  # one batch being copied, one being filled


class CudaCopies:
    """Copies from pinned memory on a stream of their own."""

    pin_memory = True

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, parts: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Queues the copies; returns what they will fill, and an event that comes after them."""
        with torch.cuda.stream(self.stream):
            sent = tuple(part.to(self.device, non_blocking=True) for part in parts)
            done = torch.cuda.Event()
            done.record(self.stream)
        return sent, done

    def receive(self, sent: Batch, done: torch.cuda.Event) -> None:
        """Makes the current stream wait for the copies, without the host waiting."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for part in sent:
            part.record_stream(current)


class Feed:
    """A source of batches, as tensors on a device.

    copies: None copies nothing (CPU); default: CudaCopies where device is CUDA. A batch on a CPU is
    written over by the next but one.
    Attribute waited_s: how long the host waited in batch(), seconds; the caller may reset it.
    """

    def __init__(self, source: BatchSource, device: torch.device, copies="auto"):
        if copies == "auto":
            copies = CudaCopies(device) if device.type == "cuda" else None
        self.source, self.copies, self.waited_s = source, copies, 0.0
        self._buffers: list[Batch | None] = [None] * SLOTS
        self._sent: list = [None] * SLOTS  # each slot's last batch, alive until its copy is done
        self._slot = 0
        self._ahead: tuple[tuple | None, Future | None] = None, None
        self._thread = ThreadPoolExecutor(1, "feed") if copies is not None else None

    def batch(
        self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1,
        *, offset: int = 0,
    ) -> Batch:  # fmt: skip
        """As source.batch, on the device; then starts on the next step's. Raises as source does."""
        start = time.perf_counter()
        key = (step, global_batch_size, rank, world_size, offset)
        if self.copies is None:
            parts = self._fill(key)
        else:
            (ready, future), self._ahead = self._ahead, (None, None)
            if ready != key:  # one thread: what was started for another step ends before this one
                future = self._thread.submit(self._send, key)
            parts, done = future.result()
            self.copies.receive(parts, done)
            following = (step + 1, *key[1:])
            self._ahead = following, self._thread.submit(self._send, following)
        self.waited_s += time.perf_counter() - start
        return parts

    def close(self) -> None:
        """Ends the thread, after the batch it is at."""
        if self._thread is not None:
            self._thread.shutdown()

    def _send(self, key: tuple):
        following = (self._slot + 1) % SLOTS
        if self._sent[following] is not None:
            self._sent[following][1].synchronize()
        parts = self._fill(key)
        if self.copies.pin_memory and self._buffers[self._slot] is None:
            parts = tuple(part.pin_memory() for part in parts)
        sent, done = self.copies.send(parts)
        self._sent[self._slot] = parts, done
        return sent, done

    def _fill(self, key: tuple) -> Batch:
        """The batch in the next slot's buffers, which become the current one's."""
        self._slot = slot = (self._slot + 1) % SLOTS
        rows, out = rank_rows(*key)[1], self._buffers[slot]
        if out is None or len(out[0]) != rows:
            pin_memory = self.copies is not None and self.copies.pin_memory
            out = self._buffers[slot] = self.source.buffers(rows, pin_memory=pin_memory)
        return self.source.batch(*key[:-1], offset=key[-1], out=out)
