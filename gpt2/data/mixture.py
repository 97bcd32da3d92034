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
from math import lcm
from pathlib import Path

import numpy as np

from gpt2 import tokenizer
from gpt2.config import DataSource, data_sources
from gpt2.data.loader import Batch, BatchSource, Provenance, TokenLoader
from gpt2.data.numpy_backend import SKIP
from gpt2.data.shards import find_shards, folder_tokenizer

# Products of a weight and a count below the sum of weights stay within int64.
MAX_WEIGHTS = 1 << 31


class Ratio:
    """How samples are shared out by fixed weights; integers in lowest terms are in .weights.

    weights: one a source, 0 where it takes no part. Raises ValueError for weights so long that no
    exact schedule fits.
    """

    def __init__(self, weights: list[Fraction]):
        unit = lcm(*(w.denominator for w in weights))
        whole = np.array([int(w * unit) for w in weights], dtype=object)
        whole //= np.gcd.reduce(whole)
        if whole.sum() > MAX_WEIGHTS:
            raise ValueError(
                f"weights {', '.join(map(str, weights))} need a schedule of {whole.sum()} samples, "
                f"at most {MAX_WEIGHTS} fit: round them to a few decimals"
            )
        self.weights: list[int] = [int(w) for w in whole]

    def counts(self, i: np.ndarray) -> np.ndarray:
        """How many of the first i samples each source has: i (n,) int64 -> (sources, n) int64."""
        total = sum(self.weights)
        periods, left = np.divmod(np.asarray(i, dtype=np.int64), total)
        rest, counts = total, []
        for weight in self.weights:
            counts.append((left * weight + rest // 2) // rest if rest else 0 * left)
            left, rest = left - counts[-1], rest - weight
        return np.stack([c + periods * w for c, w in zip(counts, self.weights, strict=True)])


class Mixture(BatchSource):
    """Several TokenLoaders as one.

    sources: what to mix, as the config lists it.
    loaders: one for each path of sources; their block_size, eot, doc_mask and shuffle are alike.
    n_windows: samples until the first source would begin its second epoch, at the first weights;
    without shuffling all windows of all sources.
    phases: how many sets of weights follow each other. With more than one, the samples of a run
    depend on global_batch_size, so that it must not change from one step to the next.
    Raises ValueError for weights that Ratio refuses.
    """

    def __init__(self, sources: tuple[DataSource, ...], loaders: dict[str, TokenLoader]):
        self.paths, self.loaders = list(loaders), list(loaders.values())
        one = self.loaders[0]
        self.names, self.block_size, self.backend = one.names, one.block_size, one.backend
        self.windows = [loader.n_windows for loader in self.loaders]
        if one.shuffle:
            self.from_steps = sorted({s.from_step for s in sources})
            weights = {(s.path, s.from_step): s.weight for s in sources}
            self.ratios = [
                Ratio([weights.get((path, step), Fraction(0)) for path in self.paths])
                for step in self.from_steps
            ]
        else:
            self.from_steps, self.ratios = [0], [Ratio([Fraction(n) for n in self.windows])]
        self.phases = len(self.ratios)
        self.n_tokens = sum(loader.n_tokens for loader in self.loaders)

        def repeats(i: int) -> bool:
            return bool((self.ratios[0].counts(np.array([i]))[:, 0] > self.windows).any())

        self.n_windows = bisect(range(sum(self.windows) + 1), False, key=repeats) - 1

    def read(self, i: np.ndarray, global_batch_size: int, out: Batch) -> Batch:
        samples = self._samples(i, global_batch_size)
        ahead = self._samples(i + global_batch_size, global_batch_size)
        for loader, mine, next_step in zip(self.loaders, samples, ahead, strict=True):
            loader.fill(mine, out)
            loader.prefetch(next_step)
        return out

    def buffers(self, rows: int, *, pin_memory: bool = False) -> Batch:
        return self.loaders[0].buffers(rows, pin_memory=pin_memory)

    def epochs(self, step: int, global_batch_size: int) -> dict[str, float]:
        """How often each source has been gone through before a step, by path."""
        counts = self._before(step * global_batch_size, global_batch_size).tolist()
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
            parts = [str(Fraction(r.weights[s], sum(r.weights))) for r in self.ratios]
            weights = [list(pair) for pair in zip(self.from_steps, parts, strict=True)]
            found += [entry | {"weights": weights} for entry in loader.identity()]
        return found

    def _starts(self, global_batch_size: int) -> list[int]:
        """The first sample of each phase; those beyond all samples of a run are alike."""
        return [min(step * global_batch_size, 1 << 62) for step in self.from_steps]

    def _samples(self, i: np.ndarray, global_batch_size: int) -> np.ndarray:
        """Each source's own sample for samples i (n,), SKIP where it has none: (sources, n)."""
        starts = self._starts(global_batch_size)
        phases = np.searchsorted(starts, i, side="right") - 1
        samples = np.full((len(self.loaders), len(i)), SKIP)
        for phase in np.unique(phases):
            here, start, ratio = phases == phase, starts[phase], self.ratios[phase]
            before = ratio.counts(i[here] - start)
            has = ratio.counts(i[here] - start + 1) > before
            before += self._before(start, global_batch_size)[:, None]
            samples[:, here] = np.where(has, before, SKIP)
        return samples

    def _before(self, sample: int, global_batch_size: int) -> np.ndarray:
        """How many of the samples before this one each source has given: (sources,) int64."""
        starts = self._starts(global_batch_size)
        counts = np.zeros(len(self.paths), dtype=np.int64)
        for ratio, start, end in zip(self.ratios, starts, [*starts[1:], sample], strict=True):
            counts += ratio.counts(np.array([max(min(end, sample) - start, 0)]))[:, 0]
        return counts


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
