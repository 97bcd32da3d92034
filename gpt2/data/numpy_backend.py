"""The algorithm of csrc/token_loader.h in numpy, for machines without a compiler; the oracle of its
tests. It takes several times as long.
"""

import errno
import os

import numpy as np

from gpt2.data.order import epoch_key, mix, permute
from gpt2.data.shards import Shard

MAX_BLOCK = 1 << 30
SKIP = -1  # the sample of a row that fill leaves as it is


class NumpyBackend:
    """Same arguments, same results, same errors as the C++ TokenLoader."""

    def __init__(self, shards, block_size: int, seed: int, shuffle: bool, vocab_size: int):
        if not 1 <= block_size <= MAX_BLOCK:
            raise ValueError(
                f"block_size must be at least 1 and at most {MAX_BLOCK}, got {block_size}"
            )
        if not shards:
            raise ValueError("no shards given")
        self.shards = [Shard(*shard) for shard in shards]
        # Open for as long as the loader lives: a file that is deleted meanwhile stays readable.
        self.files = [open(shard.path, "rb", buffering=0) for shard in self.shards]
        self.modified = [os.fstat(file.fileno()).st_mtime_ns for file in self.files]
        for s in range(len(self.shards)):
            self._check_unchanged(s)
        self.starts = np.cumsum([0] + [shard.n_tokens for shard in self.shards])
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.vocab_size = vocab_size
        self.n_tokens = int(self.starts[-1])
        self.n_windows = (self.n_tokens - (block_size if shuffle else 1)) // block_size
        if self.n_windows < 1:
            hold = " and the other shards hold" if len(self.shards) > 1 else ": holds"
            raise ValueError(
                f"{self.shards[0].path}{hold} {self.n_tokens} tokens, but block_size {block_size} "
                f"needs at least {2 * block_size if shuffle else block_size + 1}: "
                "use a smaller block_size or more text"
            )

    def __del__(self):
        for file in getattr(self, "files", ()):
            file.close()

    def window_start(self, sample: int) -> int:
        if sample < 0:
            raise ValueError(f"sample must not be negative, got {sample}")
        epoch, index = divmod(sample, self.n_windows)
        if not self.shuffle:
            return index * self.block_size
        key = epoch_key(self.seed, epoch)
        shift = mix(key) % self.block_size
        return permute(index, self.n_windows, key) * self.block_size + shift

    def fill(self, samples: np.ndarray, x, y, doc_start=None, eot: int = -1) -> None:
        if any(part.shape != (len(samples), self.block_size) for part in (x, y)):
            raise ValueError(f"x and y must have the shape ({len(samples)}, {self.block_size})")
        for row, sample in enumerate(samples.tolist()):
            if sample == SKIP:
                continue
            tokens = self._read(self.window_start(sample), self.block_size + 1)
            x[row], y[row] = tokens[:-1], tokens[1:]
            if doc_start is not None:
                begins = np.where(x[row] == eot, np.arange(self.block_size), 0)
                doc_start[row] = np.maximum.accumulate(begins)

    def prefetch(self, samples: np.ndarray) -> None:
        """Nothing: reading ahead is left to the C++ backend."""

    def _read(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            s = int(np.searchsorted(self.starts, start, side="right")) - 1
            shard, offset = self.shards[s], start - int(self.starts[s])
            n = min(count, shard.n_tokens - offset)
            # Not a memory map: reading one past the end of a file that was cut kills the process.
            data = os.pread(self.files[s].fileno(), 2 * n, shard.offset + 2 * offset)
            self._check_unchanged(s)
            part = np.frombuffer(data, "<u2", n)
            if part.max() >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                raise ValueError(
                    f"shard {shard.path}: token {offset + at} is {part[at]}, but the vocabulary "
                    f"has {self.vocab_size} entries: the file is damaged or was made with "
                    "another tokenizer"
                )
            parts.append(part)
            start, count = start + n, count - n
        return np.concatenate(parts)

    def _check_unchanged(self, s: int) -> None:
        shard, info = self.shards[s], os.fstat(self.files[s].fileno())
        needed = shard.offset + 2 * shard.n_tokens
        if info.st_size < needed:
            raise OSError(
                errno.EIO,
                f"the file has {info.st_size} bytes but its tokens need {needed}; it was cut short "
                "or is being rewritten. Prepare the data again",
                shard.path,
            )
        if info.st_mtime_ns != self.modified[s]:
            raise OSError(
                errno.EIO,
                "the file was written to while it is in use, so its tokens may not be those of "
                "this run any more; start again from the last checkpoint",
                shard.path,
            )
