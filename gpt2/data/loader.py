"""TokenLoader: batches as a pure function of (data, seed, step, rank, world size).

The C++ module does the work (csrc/token_loader.h describes the algorithm); NumpyBackend is its twin
for machines without a compiler. Both give identical batches.
"""

import os
import resource
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2.data.integrity import Verifier, identity
from gpt2.data.numpy_backend import NumpyBackend
from gpt2.data.shards import open_shards
from gpt2.device import NOT_BUILT, check_built

FINISH_S = 10.0  # how long the end of a run waits for a check of its data
SPARE_FILES = 256  # open files that are left to the rest of the process
Batch = tuple[Tensor, ...]


class Provenance(NamedTuple):
    """Where a token that the model saw came from."""

    shard: str  # path
    offset: int  # index of the token in the shard
    document: int  # its number in the shard, from 1; 0 if it began in the shard before, or no eot


class BatchSource(ABC):
    """What a run takes its batches from. All methods are functions of their arguments alone.

    names: of the parts of a batch, in order.  block_size: positions of a row.  n_windows: rows in
    an epoch.  n_tokens: positions that an epoch is made from.  backend: what does the work, in
    words.  full_rows: every row has block_size positions; else a batch may be trimmed.
    chat_template: the name of the template that conversations are written in.
    """

    names: tuple[str, ...]
    block_size: int
    n_windows: int
    n_tokens: int
    backend: str
    full_rows: bool = True
    chat_template: str | None = None

    def batch(
        self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1,
        *, offset: int = 0,
    ) -> Batch:  # fmt: skip
        """The rows of a step's global batch that belong to a rank.

        Row i of the global batch is sample step * global_batch_size + offset + i of the run,
        whatever the number of ranks; it belongs to rank i // (global_batch_size // world_size).
        offset: samples that a rollback skipped, or that make up for another global_batch_size.
        Raises ValueError for numbers out of range.
        """
        first, rows = rank_rows(step, global_batch_size, rank, world_size, offset)
        return self.read(np.arange(first, first + rows), global_batch_size)

    def provenance(
        self, step: int, row: int, global_batch_size: int, token: int = 0, *, offset: int = 0
    ) -> Provenance:
        """Where token `token` of a row of the global batch came from. Raises as batch does."""
        first, rows = rank_rows(step, global_batch_size, offset=offset)
        if not 0 <= row < rows:
            raise ValueError(f"row {row} is not one of the {rows} rows of a step")
        if not 0 <= token <= self.block_size:
            raise ValueError(f"token {token} lies outside a row of {self.block_size} + 1 tokens")
        return self.place(first + row, global_batch_size, token)

    def finish(self) -> None:
        """Waits a while for a check of the data in the background; raises what it finds."""
        return None

    @abstractmethod
    def read(self, samples: np.ndarray, global_batch_size: int) -> Batch:
        """These samples of the run, (rows,) int64, as a batch; global_batch_size is the step's."""

    @abstractmethod
    def place(self, sample: int, global_batch_size: int, token: int) -> Provenance:
        """Where a token of a sample of the run came from."""

    @abstractmethod
    def identity(self) -> list[dict]:
        """What the data is, for each folder or file {"path", "tokens", "hash", ...}, fit for JSON.

        All but the path is equal where training reads the same tokens in the same order.
        """


class TokenLoader(BatchSource):
    """Windows of block_size tokens, each exactly once an epoch, in an order of its own each epoch.

    paths: shard files (gpt2.data.shards lists the formats); together they are one stream of tokens.
    shuffle: False reads the windows in order and without shifting them, for evaluation.
    vocab_size: a larger token is an error when it is read.
    eot: the token that begins a document, None where there is none.
    doc_mask: batches have a third part, doc_start, which keeps attention inside documents.
    verify: (i, n): from the first batch on, the content of every n-th shard from the i-th on is
    compared with the manifest beside it, in a thread; the next batch raises what it finds.
    backend: "cpp", "numpy", or "auto": C++ where it was built.

    A batch is idx, targets (rows, block_size) int64, targets = idx shifted by one token; and, with
    doc_mask, doc_start (rows, block_size) int32: the index in its row of the first token of the
    document that each of idx belongs to.
    Raises ValueError (damaged shard, too few tokens, unknown backend, doc_mask without eot),
    OSError, ImportError ("cpp" not built). batch raises ValueError for a token beyond the
    vocabulary, OSError for a file that was cut or written to.
    """

    def __init__(
        self, paths: str | Path | list[str | Path], block_size: int, seed: int = 1337,
        shuffle: bool = True, *, vocab_size: int = 1 << 16, eot: int | None = None,
        doc_mask: bool = False, verify: tuple[int, int] | None = None, backend: str = "auto",
    ):  # fmt: skip
        if doc_mask and eot is None:
            raise ValueError("doc_mask needs an end-of-text token, which this tokenizer has not")
        self.shards = open_shards(paths)
        self.verifier = Verifier(self.shards, verify)
        self.block_size, self.shuffle, self.eot = block_size, shuffle, eot
        self.names = ("idx", "targets", "doc_start") if doc_mask else ("idx", "targets")
        make, self.backend = _select_backend(backend)
        _allow_open_files(len(self.shards))
        shards = self.shards
        if self.backend == "cpp":  # names as bytes: they need not be UTF-8
            shards = [(os.fsencode(path), *rest) for path, *rest in shards]
        self._backend = make(shards, block_size, seed % (1 << 64), shuffle, vocab_size)
        self.n_tokens: int = self._backend.n_tokens
        self.n_windows: int = self._backend.n_windows

    def buffers(self, rows: int) -> Batch:
        """Tensors for a batch of so many rows, not initialised."""
        dtypes = (torch.int64, torch.int64, torch.int32)[: len(self.names)]
        return tuple(torch.empty(rows, self.block_size, dtype=dtype) for dtype in dtypes)

    def read(self, samples: np.ndarray, global_batch_size: int) -> Batch:
        out = self.buffers(len(samples))
        self.fill(samples, out)
        self.prefetch(samples + global_batch_size)
        return out

    def fill(self, samples: np.ndarray, out: Batch) -> None:
        """Writes sample samples[r] to row r of out; samples (rows,) int64, SKIP leaves a row.

        Raises ValueError where out has another number of rows, and as batch does.
        """
        self.verifier.check()
        parts = [part.numpy() for part in out]
        self._backend.fill(samples, *parts, *([self.eot] if len(parts) == 3 else []))

    def prefetch(self, samples: np.ndarray) -> None:
        """Starts reading samples from a cold disk, and returns at once."""
        self._backend.prefetch(samples)

    def place(self, sample: int, global_batch_size: int, token: int) -> Provenance:
        """Counts the document by reading the shard up to there."""
        at = self._backend.window_start(sample) + token
        for shard in self.shards:
            if at < shard.n_tokens:
                break
            at -= shard.n_tokens
        document, chunk = 0, 1 << 24
        for start in range(0, at + 1 if self.eot is not None else 0, chunk):
            n = min(chunk, at + 1 - start)
            part = np.fromfile(shard.path, "<u2", n, offset=shard.offset + 2 * start)
            document += int(np.count_nonzero(part == self.eot))
        return Provenance(shard.path, at, document)

    def finish(self) -> None:
        self.verifier.finish(FINISH_S)

    def identity(self) -> list[dict]:
        return identity(self.shards)


def rank_rows(
    step: int, global_batch_size: int, rank: int = 0, world_size: int = 1, offset: int = 0
) -> tuple[int, int]:
    """The first sample and the number of rows of a rank's part of a step. Raises ValueError."""
    if step < 0 or global_batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "needs step >= 0, global_batch_size >= 1 and 0 <= rank < world_size, "
            f"got {step}, {global_batch_size}, rank {rank} of {world_size}"
        )
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size {global_batch_size} does not divide among {world_size} ranks"
        )
    first, rows = step * global_batch_size + offset, global_batch_size // world_size
    if not 0 <= first < 1 << 60:
        raise ValueError(
            f"step {step} x {global_batch_size} rows + offset {offset}: "
            + ("before the first sample" if first < 0 else "beyond 2^60 samples")
        )
    return first + rank * rows, rows


def _select_backend(name: str):
    if name not in ("auto", "cpp", "numpy"):
        raise ValueError(f"unknown loader backend {name!r}: use auto, cpp or numpy")
    if name != "numpy":
        try:
            from gpt2 import _token_loader

            check_built(_token_loader)
            return _token_loader.TokenLoader, "cpp"
        except ImportError as error:
            if name == "cpp":
                raise ImportError(f"gpt2._token_loader {NOT_BUILT}, or use numpy") from error
    return NumpyBackend, "numpy"


def _allow_open_files(n: int) -> None:
    """Raises this process's soft limit on open files, often 1024, where n shards need more.

    Each shard stays open, so that a change of its file is noticed. The hard limit holds as before.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
