"""TokenLoader: batches as a pure function of (data, seed, step, rank, world size).

The C++ module does the work (csrc/token_loader.h describes the algorithm); NumpyBackend is its twin
for machines without a compiler, and the oracle of its tests. Both give identical batches.
"""

import resource
from pathlib import Path

import torch
from torch import Tensor

from gpt2.data.numpy_backend import NumpyBackend
from gpt2.data.shards import open_shards

SPARE_FILES = 256  # open files that are left to the rest of the process


class TokenLoader:
    """Windows of block_size tokens, each exactly once an epoch, in a new order each epoch.

    paths: shard files (gpt2.data.shards lists the formats); together they are one stream of tokens.
    shuffle: False reads the windows in order and without shifting them, for evaluation.
    vocab_size: a larger token is an error when it is read; None accepts any uint16.
    backend: "cpp", "numpy", or "auto": C++ where it was built.

    Attributes: n_tokens, n_windows (windows in an epoch), backend (the one in use).
    Raises ValueError (damaged shard, too few tokens, unknown backend), OSError, ImportError ("cpp"
    not built).
    """

    def __init__(
        self,
        paths: str | Path | list[str | Path],
        block_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        *,
        vocab_size: int | None = None,
        backend: str = "auto",
    ):
        self.shards = open_shards(paths)
        self.block_size = block_size
        make, self.backend = _select_backend(backend)
        _allow_open_files(len(self.shards))
        specs = [(s.path, s.offset, s.n_tokens) for s in self.shards]
        seed %= 1 << 64
        vocab_size = 1 << 16 if vocab_size is None else vocab_size
        self._backend = make(specs, block_size, seed, shuffle, vocab_size)
        self.n_tokens: int = self._backend.n_tokens
        self.n_windows: int = self._backend.n_windows

    def batch(
        self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The rows of a step's global batch that belong to a rank.

        Row i of the global batch is sample step * global_batch_size + i of the run, whatever the
        number of ranks; it belongs to rank i // (global_batch_size // world_size). Returns x, y
        (rows, block_size) int64, y = x shifted by one token. Raises ValueError for numbers out of
        range and for tokens beyond the vocabulary; OSError for a file that shrank.
        """
        if step < 0 or global_batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "needs step >= 0, global_batch_size >= 1 and 0 <= rank < world_size, "
                f"got {step}, {global_batch_size}, rank {rank} of {world_size}"
            )
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} does not divide among {world_size} ranks"
            )
        if step * global_batch_size >= 1 << 60:
            raise ValueError(f"step {step} x {global_batch_size} rows: beyond 2^60 samples")
        rows = global_batch_size // world_size
        first = step * global_batch_size + rank * rows
        x = torch.empty((rows, self.block_size), dtype=torch.int64)
        y = torch.empty_like(x)
        self._backend.fill(first, x.numpy(), y.numpy())
        self._backend.prefetch(first + global_batch_size, rows)
        return x, y


def _select_backend(name: str):
    if name == "numpy":
        return NumpyBackend, "numpy"
    if name not in ("auto", "cpp"):
        raise ValueError(f"unknown loader backend {name!r}: use auto, cpp or numpy")
    try:
        from gpt2 import _token_loader
    except ImportError as error:
        if name == "cpp":
            raise ImportError(
                "the C++ token loader was not built: install a C++17 compiler and run "
                "`pip install -e .` again, or use backend='numpy'"
            ) from error
        return NumpyBackend, "numpy"
    return _token_loader.TokenLoader, "cpp"


def _allow_open_files(n: int) -> None:
    """Raises this process's soft limit on open files, often 1024, where n shards need more.

    Each shard stays open, so that a change of its file is noticed. The hard limit holds as before.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
