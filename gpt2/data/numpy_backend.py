"""The algorithm of csrc/token_loader.h in numpy, for machines without a compiler; the oracle of its
tests. It takes several times as long.

The order of an epoch is a keyed permutation of [0, n), computed and not stored: in Python's
integers, cut to 64 bits by hand, since numpy's take ten times as long for a single value.
"""

import errno
import os

import numpy as np

from gpt2.data.shards import Shard

MAX_BLOCK = 1 << 30
SKIP = -1  # the sample of a row that fill leaves as it is
ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def epoch_key(seed: int, epoch: int) -> int:
    """The key of an epoch's permutation."""
    return mix(mix(seed + GOLDEN & MASK) + GOLDEN * (epoch + 1) & MASK)


def permute(index: int, n: int, key: int) -> int:
    """Where a keyed permutation of [0, n) takes index: a Feistel network with cycle walking."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = index & low_mask, index >> low_bits
        for r in range(0, ROUNDS, 2):
            low ^= mix(high + key + GOLDEN * (r + 1) & MASK) & low_mask
            high ^= mix(low + key + GOLDEN * (r + 2) & MASK) & high_mask
        index = high << low_bits | low
        if index < n:
            return index


class NumpyBackend:
    """Same arguments, same results, same errors as the C++ TokenLoader."""

    def __init__(
        self, shards: list[Shard], block_size: int, seed: int, shuffle: bool, vocab_size: int
    ):
        if not 1 <= block_size <= MAX_BLOCK:
            raise ValueError(
                f"block_size must be at least 1 and at most {MAX_BLOCK}, got {block_size}"
            )
        if not shards:
            raise ValueError("no shards given")
        self.shards = shards
        # Open for as long as the loader lives: a file that is deleted meanwhile stays readable.
        self.files = [open(shard.path, "rb", buffering=0) for shard in shards]
        self.modified = [os.fstat(file.fileno()).st_mtime_ns for file in self.files]
        for s in range(len(shards)):
            self._check_unchanged(s)
        self.starts = np.cumsum([0] + [shard.n_tokens for shard in shards])
        self.block_size, self.seed = block_size, seed
        self.shuffle, self.vocab_size = shuffle, vocab_size
        self.n_tokens = int(self.starts[-1])
        self.n_windows = (self.n_tokens - (block_size if shuffle else 1)) // block_size
        if self.n_windows < 1:
            hold = " and the other shards hold" if len(shards) > 1 else ": holds"
            raise ValueError(
                f"{shards[0].path}{hold} {self.n_tokens} tokens, but block_size {block_size} "
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
            for at in np.flatnonzero(part >= self.vocab_size)[:1]:
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
        if info.st_size >= needed and info.st_mtime_ns == self.modified[s]:
            return
        what = (
            "the file was written to while it is in use, so its tokens may not be those of this "
            "run any more; start again from the last checkpoint"
        )
        if info.st_size < needed:
            what = (
                f"the file has {info.st_size} bytes but its tokens need {needed}; it was cut short "
                "or is being rewritten. Prepare the data again"
            )
        raise OSError(errno.EIO, what, shard.path)
