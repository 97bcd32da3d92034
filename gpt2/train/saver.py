"""Checkpoints written while training goes on.

Training stands still only while weights and moments, 12 bytes a parameter, are copied to host
memory; a thread writes the one copy. A second checkpoint waits until the first is written.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.model import GPT
from gpt2.state import Tensors, snapshot


class Saver:
    """Writes checkpoints of a run in the background; only the main process has one.

    on_saved(step, path, times) is called by save or wait for each one that was written; times:
    "checkpoint/held_ms" (of training) and "checkpoint/write_ms". An OSError of writing is told to
    on_failed(step, error) where keep_going, and raised otherwise.
    """

    def __init__(
        self, run: Path, *, keep_last: int, keep_going: bool,
        on_saved: Callable[[int, Path, dict], None], on_failed: Callable[[int, OSError], None],
    ):  # fmt: skip
        self.run, self.keep_last, self.keep_going = run, keep_last, keep_going
        self.on_saved, self.on_failed = on_saved, on_failed
        self._thread = ThreadPoolExecutor(1, "saver")
        self._pending: tuple[int, float, Future] | None = None
        self._tensors: Tensors | None = None

    def save(self, step: int, model: GPT, optimizer: torch.optim.Optimizer, meta: dict) -> None:
        """Copies the state, starts writing it and returns. Raises what wait raises."""
        started = time.perf_counter()
        self.wait()  # for the one before: its copy is written over
        self._tensors = snapshot(model, optimizer, self._tensors)
        held_ms = (time.perf_counter() - started) * 1e3
        self._pending = step, held_ms, self._thread.submit(self._write, step, meta)

    def poll(self) -> None:
        """Tells of a checkpoint that has been written meanwhile; waits for nothing."""
        if self._pending is not None and self._pending[2].done():
            self.wait()

    def wait(self) -> None:
        """Until what was started is written and told of. Raises ValueError where the state is not
        finite, OSError (unless keep_going) where it cannot be written."""
        if self._pending is None:
            return
        (step, held_ms, future), self._pending = self._pending, None
        try:
            path, write_ms = future.result()
        except OSError as error:
            if not self.keep_going:
                raise
            self.on_failed(step, error)
        else:
            times = {"checkpoint/held_ms": held_ms, "checkpoint/write_ms": write_ms}
            self.on_saved(step, path, times)

    def close(self) -> None:
        """Waits for what was started; ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, meta: dict) -> tuple[Path, float]:
        started = time.perf_counter()
        what = (self.run, step, self._tensors, meta)
        path = checkpoint.write_checkpoint(*what, keep_last=self.keep_last)
        return path, (time.perf_counter() - started) * 1e3
