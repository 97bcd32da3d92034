"""TokenLoader: batches as a pure function of (data, seed, step, rank, world size).

The C++ module does the work (csrc/token_loader.h describes the algorithm); NumpyBackend is its twin
for machines without a compiler, and the oracle of its tests. Both give identical batches.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2.data.shards import Shard, open_shards

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
        rows = global_batch_size // world_size
        first = step * global_batch_size + rank * rows
        x = torch.empty((rows, self.block_size), dtype=torch.int64)
        y = torch.empty_like(x)
        self._backend.fill(first, x.numpy(), y.numpy())
        self._backend.prefetch(first + global_batch_size, rows)
        return x, y


class NumpyBackend:
    """The algorithm of csrc/token_loader.h in numpy; same arguments, same results, same errors."""

    def __init__(self, shards, block_size: int, seed: int, shuffle: bool, vocab_size: int):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if not shards:
            raise ValueError("no shards given")
        self.shards = [Shard(*shard) for shard in shards]
        self.maps = [shard.tokens() for shard in self.shards]
        self.starts = np.cumsum([0] + [shard.n_tokens for shard in self.shards])
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.vocab_size = vocab_size
        self.n_tokens = int(self.starts[-1])
        self.n_windows = (self.n_tokens - (block_size if shuffle else 1)) // block_size
        if self.n_windows < 1:
            raise ValueError(
                f"the shards hold {self.n_tokens} tokens, but block_size {block_size} needs at "
                f"least {2 * block_size if shuffle else block_size + 1}: "
                "use a smaller block_size or more text"
            )

    def window_start(self, sample: int) -> int:
        if sample < 0:
            raise ValueError(f"sample must not be negative, got {sample}")
        epoch, index = divmod(sample, self.n_windows)
        if not self.shuffle:
            return index * self.block_size
        key = _epoch_key(self.seed, epoch)
        shift = int(_mix(key)[0] % np.uint64(self.block_size))
        return _permute(index, self.n_windows, key) * self.block_size + shift

    def fill(self, first: int, x: np.ndarray, y: np.ndarray) -> None:
        for row in range(len(x)):
            start = self.window_start(first + row)
            tokens = self._read(start, self.block_size + 1)
            x[row], y[row] = tokens[:-1], tokens[1:]

    def prefetch(self, first: int, rows: int) -> None:
        """Nothing: the kernel's own read-ahead serves the memory maps."""

    def _read(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            s = int(np.searchsorted(self.starts, start, side="right")) - 1
            shard, offset = self.shards[s], start - int(self.starts[s])
            size, needed = Path(shard.path).stat().st_size, shard.offset + 2 * shard.n_tokens
            if size < needed:
                raise OSError(
                    5,
                    f"the file has {size} bytes but its tokens need {needed}; it was cut short "
                    "or is being rewritten. Prepare the data again",
                    shard.path,
                )
            part = np.asarray(self.maps[s][offset : offset + count])
            if part.max() >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                raise ValueError(
                    f"shard {shard.path}: token {offset + at} is {part[at]}, but the vocabulary "
                    f"has {self.vocab_size} entries: the file is damaged or was made with "
                    "another tokenizer"
                )
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)


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


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _epoch_key(seed: int, epoch: int) -> np.ndarray:
    # Arrays of one element: numpy's scalars warn when uint64 arithmetic wraps around, arrays do
    # not.
    seeded = _mix(np.array([seed], dtype=np.uint64) + GOLDEN)
    return _mix(seeded + GOLDEN * np.array([epoch + 1], dtype=np.uint64))


def _permute(index: int, n: int, key: np.ndarray) -> int:
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    while True:
        value = np.array([index], dtype=np.uint64)
        low, high = value & low_mask, value >> np.uint64(low_bits)
        for r in range(0, ROUNDS, 2):
            low ^= _mix(high + key + GOLDEN * np.array([r + 1], dtype=np.uint64)) & low_mask
            high ^= _mix(low + key + GOLDEN * np.array([r + 2], dtype=np.uint64)) & high_mask
        index = int(((high << np.uint64(low_bits)) | low)[0])
        if index < n:
            return index
