"""The tokens that a run names as one loader: a data folder, or several in exact proportions.

Which source the i-th sample of a mixture comes from, and how many came from that source before it,
are computed from i alone, so batches stay a pure function of (data, seed, step) and any step is
reached at once. Let w be the integer weights, W their sum. Among the first i samples, source 0 has

    c0(i) = floor((i w0 + W/2) / W),     i w0 / W rounded,

the remaining i - c0(i) samples are shared by the other sources in the same way, and so on. Each
further sample raises exactly one of these counts: that source is its own. So the counts are exact
at every multiple of W, and never more than about a sample off in between.

Weights may change from a step on (from_step): a phase begins with the first sample of that step,
and a source goes on where it was. Each source counts its own epochs.

Loaders that do not shuffle are for validation. Their mixture has every window of every source
exactly once, so that its mean loss is that of all their tokens: n_windows of each take the place of
the weights, and sources alternate, so that the first windows alone stand for all sources too.
"""

from bisect import bisect
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path

import numpy as np

from gpt2 import tokenizer
from gpt2.config import DataSource, data_sources
from gpt2.data.loader import Batch, BatchSource, Provenance, TokenLoader
from gpt2.data.numpy_backend import SKIP
from gpt2.data.shards import find_shards, folder_tokenizer

# Products of a weight and a count below the sum of weights stay within int64.
MAX_WEIGHTS = 1 << 31
END = 1 << 62  # samples


def lowest_terms(weights: list[Fraction]) -> list[int]:
    """The same weights as integers. Raises ValueError where no exact schedule fits."""
    unit = lcm(*(w.denominator for w in weights))
    whole = [int(w * unit) for w in weights]
    common = gcd(*whole)
    whole = [w // common for w in whole]
    if sum(whole) > MAX_WEIGHTS:
        raise ValueError(
            f"weights {', '.join(map(str, weights))} need a schedule of {sum(whole)} samples, at "
            f"most {MAX_WEIGHTS} fit: round them to a few decimals"
        )
    return whole


def shares(weights: list[int], i: np.ndarray) -> np.ndarray:
    """How many of the first i samples each source has: i (n,) int64 -> (sources, n) int64."""
    rest = sum(weights)
    periods, left = np.divmod(i, rest)
    counts = []
    for weight in weights:
        count = (left * weight + rest // 2) // rest if rest else 0 * left
        counts.append(periods * weight + count)
        left, rest = left - count, rest - weight
    return np.stack(counts)


class Mixture(BatchSource):
    """Several TokenLoaders as one.

    sources: what to mix, as the config lists it.
    loaders: one for each path of sources; their block_size, eot, doc_mask and shuffle are alike.
    n_windows: samples until the first source would begin its second epoch, at the first weights;
    without shuffling all windows of all sources.
    phases: how many sets of weights follow each other. With more than one, the samples of a run
    depend on global_batch_size, so that it must not change from one step to the next.
    Raises ValueError for weights that lowest_terms refuses.
    """

    def __init__(self, sources: tuple[DataSource, ...], loaders: dict[str, TokenLoader]):
        self.paths, self.loaders = list(loaders), list(loaders.values())
        one = self.loaders[0]
        self.names, self.block_size, self.backend = one.names, one.block_size, one.backend
        self.windows = [loader.n_windows for loader in self.loaders]
        if one.shuffle:
            self.from_steps = sorted({s.from_step for s in sources})
            found = {(s.path, s.from_step): s.weight for s in sources}
            weights = [[found.get((path, step), Fraction(0)) for path in self.paths]
                       for step in self.from_steps]  # fmt: skip
        else:
            self.from_steps, weights = [0], [list(map(Fraction, self.windows))]
        self.weights = list(map(lowest_terms, weights))  # of each phase
        self.phases = len(self.weights)
        self.n_tokens = sum(loader.n_tokens for loader in self.loaders)

        def repeats(i: int) -> bool:
            return bool((shares(self.weights[0], np.array([i]))[:, 0] > self.windows).any())

        self.n_windows = bisect(range(sum(self.windows) + 1), False, key=repeats) - 1

    def read(self, i: np.ndarray, global_batch_size: int) -> Batch:
        out, samples = self.loaders[0].buffers(len(i)), self._samples(i, global_batch_size)
        ahead = self._samples(i + global_batch_size, global_batch_size)
        for loader, mine, next_step in zip(self.loaders, samples, ahead, strict=True):
            loader.fill(mine, out)
            loader.prefetch(next_step)
        return out

    def epochs(self, step: int, global_batch_size: int) -> dict[str, float]:
        """How often each source has been gone through before a step, by path."""
        samples = np.array([step * global_batch_size])
        counts = self._counts(samples, global_batch_size)[:, 0].tolist()
        return {p: c / n for p, c, n in zip(self.paths, counts, self.windows, strict=True)}

    def place(self, i: int, global_batch_size: int, token: int) -> Provenance:
        samples = self._samples(np.array([i]), global_batch_size)[:, 0]
        source = int(np.argmax(samples != SKIP))
        return self.loaders[source].place(int(samples[source]), global_batch_size, token)

    def finish(self) -> None:
        for loader in self.loaders:
            loader.finish()

    def identity(self) -> list[dict]:
        """As TokenLoader.identity, each with "weights": [[from_step, its part of the samples]]."""
        found = []
        for s, loader in enumerate(self.loaders):
            parts = [str(Fraction(weights[s], sum(weights))) for weights in self.weights]
            weights = [list(pair) for pair in zip(self.from_steps, parts, strict=True)]
            found += [entry | {"weights": weights} for entry in loader.identity()]
        return found

    def _samples(self, i: np.ndarray, global_batch_size: int) -> np.ndarray:
        """Each source's own sample for samples i (n,), SKIP where it has none: (sources, n)."""
        before, after = (self._counts(at, global_batch_size) for at in (i, i + 1))
        return np.where(after > before, before, SKIP)

    def _counts(self, i: np.ndarray, global_batch_size: int) -> np.ndarray:
        """How many of the first i (n,) samples of a run each source has: (sources, n) int64."""
        # Phases that begin beyond all samples of a run are alike.
        starts = [min(step * global_batch_size, END) for step in self.from_steps]
        phases = zip(self.weights, starts, [*starts[1:], END], strict=True)
        return sum(shares(weights, i.clip(start, end) - start) for weights, start, end in phases)


def find_tokenizer(data: str) -> tokenizer.Tokenizer:
    """The tokenizer of the data that a config names; GPT-2's where nothing there says.

    Raises ValueError where the folders of a mixture differ in it, and for a damaged manifest.
    """
    found = {s.path: folder_tokenizer(s.path) or {"name": "gpt2"} for s in data_sources(data)}
    first, description = next(iter(found.items()))
    for path, other in found.items():
        if other != description:
            raise ValueError(
                f"{first} and {path} were made with different tokenizers ({description!r:.60} and "
                f"{other!r:.60}): a mixture needs the same; prepare one of them again"
            )
    try:
        return tokenizer.from_dict(description)
    except ValueError as error:
        raise ValueError(f"{Path(first) / 'manifest.json'}: {error}") from error


def open_split(
    data: str, split: str, block_size: int, *, seed: int = 1337, doc_mask: bool = False,
    share: tuple[int, int] = (0, 1),
) -> TokenLoader | Mixture:  # fmt: skip
    """The loader of a split ("train" or "val"): shuffled for training, in order for validation.

    Of a mixture validation reads every window of every source once, whatever the weights.
    share: (rank, world size), by which the checking of hashes is divided.
    Raises as TokenLoader does.
    """
    sources = data_sources(data)
    data_tokenizer = find_tokenizer(data)
    loaders = {
        path: TokenLoader(
            find_shards(path, split), block_size, seed, split == "train", eot=data_tokenizer.eot,
            vocab_size=data_tokenizer.vocab_size, doc_mask=doc_mask, verify=share,
        )
        for path in dict.fromkeys(s.path for s in sources)
    }  # fmt: skip
    return Mixture(sources, loaders) if len(sources) > 1 else next(iter(loaders.values()))
