"""Mixtures: several data sets in exact proportions, as one loader.

Which source the i-th sample of a mixture comes from, and how many came from that source before it,
are computed from i alone, so batches stay a pure function of (data, seed, step) and any step is
reached at once. Let w be the integer weights, W their sum. Among the first i samples, source 0 has

    c0(i) = floor((i w0 + W/2) / W),     i w0 / W rounded,

the remaining i - c0(i) samples are shared by the other sources in the same way, and so on. Each
further sample raises exactly one of these counts: that source is its own. So the counts are exact
at every multiple of W, and never more than about a sample off in between.

Weights may change from a step on (from_step); a source goes on where it was. Each source counts its
own epochs.
"""

from fractions import Fraction
from math import lcm

import numpy as np

from gpt2.config import DataSource
from gpt2.data.loader import Batch, Provenance, TokenLoader, rank_rows
from gpt2.data.numpy_backend import SKIP

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


class Mixture:
    """Several TokenLoaders as one; batch and the attributes are those of TokenLoader.

    sources: what to mix, as the config lists it.
    loaders: one for each path of sources; their block_size, eot and doc_mask are alike.
    n_windows: samples until the first source would begin its second epoch, at the first weights.
    """

    chat_template: str | None = None

    def __init__(self, sources: tuple[DataSource, ...], loaders: dict[str, TokenLoader]):
        self.paths = list(loaders)
        self.loaders = list(loaders.values())
        one = self.loaders[0]
        self.block_size, self.backend, self.doc_mask = one.block_size, one.backend, one.doc_mask
        self.buffers = one.buffers
        self.verifiers = [loader.verifier for loader in self.loaders]
        self.from_steps = sorted({s.from_step for s in sources})
        self.ratios = []
        for from_step in self.from_steps:
            weight = {s.path: s.weight for s in sources if s.from_step == from_step}
            self.ratios.append(Ratio([weight.get(path, Fraction(0)) for path in self.paths]))
        self.n_tokens = sum(loader.n_tokens for loader in self.loaders)
        self.n_windows = self._one_epoch()

    def batch(
        self,
        step: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        out: Batch | None = None,
    ) -> Batch:
        """As TokenLoader.batch. Where weights change by step, global_batch_size must be the run's.

        Raises ValueError, OSError.
        """
        first, rows = rank_rows(step, global_batch_size, rank, world_size)
        out = self.buffers(rows) if out is None else out
        row = first - step * global_batch_size + np.arange(rows)
        samples = self._samples(step, row, global_batch_size)
        ahead = self._samples(step + 1, row, global_batch_size)
        for loader, mine, next_step in zip(self.loaders, samples, ahead, strict=True):
            loader.fill(mine, out)
            loader.prefetch(next_step)
        return out

    def epochs(self, step: int, global_batch_size: int) -> dict[str, float]:
        """How often each source has been gone through before a step, by path."""
        counts = self._before(step, global_batch_size).tolist()
        windows = [loader.n_windows for loader in self.loaders]
        return {p: c / n for p, c, n in zip(self.paths, counts, windows, strict=True)}

    def provenance(self, step: int, row: int, global_batch_size: int, token: int = 0) -> Provenance:
        """As TokenLoader.provenance."""
        if not 0 <= row < rank_rows(step, global_batch_size)[1]:
            raise ValueError(f"row {row} is not one of the {global_batch_size} rows of a step")
        samples = self._samples(step, np.array([row]), global_batch_size)[:, 0]
        source = int(np.argmax(samples != SKIP))
        return self.loaders[source].provenance_of(int(samples[source]), token)

    def _samples(self, step: int, row: np.ndarray, global_batch_size: int) -> np.ndarray:
        """Each source's own sample for rows of a step, SKIP where it has none: (sources, rows)."""
        phase = sum(step >= from_step for from_step in self.from_steps) - 1
        ratio, from_step = self.ratios[phase], self.from_steps[phase]
        i = (step - from_step) * global_batch_size + row
        before = ratio.counts(i)
        has = ratio.counts(i + 1) > before
        return np.where(has, before + self._before(from_step, global_batch_size)[:, None], SKIP)

    def _before(self, step: int, global_batch_size: int) -> np.ndarray:
        """Samples that each source has given before a step: (sources,) int64."""
        counts = np.zeros(len(self.paths), dtype=np.int64)
        ends = [*self.from_steps[1:], step]
        for ratio, start, end in zip(self.ratios, self.from_steps, ends, strict=True):
            if start < step:
                n = (min(end, step) - start) * global_batch_size
                counts += ratio.counts(np.array([n]))[:, 0]
        return counts

    def _one_epoch(self) -> int:
        windows = np.array([loader.n_windows for loader in self.loaders])
        low, high = 1, int(windows.sum())
        while low < high:
            middle = (low + high + 1) // 2
            enough = bool((self.ratios[0].counts(np.array([middle]))[:, 0] <= windows).all())
            low, high = (middle, high) if enough else (low, middle - 1)
        return low
