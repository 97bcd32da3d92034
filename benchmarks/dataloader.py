"""Tokens a second of loaders, side by side in one run, on one thread and without worker processes.

    python benchmarks/dataloader.py                       # writes benchmarks/results/dataloader.*
    python benchmarks/dataloader.py --tokens 20000000 --rounds 3 --out /tmp

Each gives batches (x, y) of int64 from the same random tokens, in an order of its own:

    cpp                    this project's TokenLoader
    numpy twin             its fallback without a compiler
    numpy memmap rows      rows of a memory map, copied into new x and y, in permuted order
    nanoGPT get_batch      the map opened again each batch, a row a tensor, stacked
    build-nanogpt          a shard as int64 in memory, batches are views in file order; not shuffled
    torch DataLoader       a map-style dataset over a memory map, shuffled, num_workers=0
    litdata                where it is installed

The access patterns of the others are written anew here, after their published code.
Warm: all files in the page cache; loaders take turns in rounds, and each round times a stretch of
consecutive batches. Tokens/s come from the whole time, so build-nanogpt's include its loading of
shards; p50 and p99 are of single batches, and on a busy machine p99 is the machine's. Cold: the
files are dropped from the page cache (posix_fadvise) before a loader is opened; the time is that of
opening and of the first batches.
"""

import gc
import importlib.metadata
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common  # noqa: E402
from gpt2.data import TokenLoader, find_shards, write_shard  # noqa: E402

T, VOCABULARY, SHARDS = 1024, 50257, 4
SHAPES = (12, 64)  # rows
TOKENS_A_STRETCH = 4_000_000  # of a loader, in each round
COLD_BATCHES = 20
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def write_data(folder: Path, n_tokens: int) -> None:
    """The same tokens as our shards, one file without header, and .npy shards."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, VOCABULARY, n_tokens // SHARDS).astype("<u2") for _ in range(SHARDS)]
    for i, part in enumerate(parts):
        write_shard(folder / f"train_{i:06}.bin", part)
        np.save(folder / f"shard_{i:06}.npy", part)
    np.concatenate(parts).tofile(folder / "all.bin")


def ours(folder: Path, rows: int, backend: str) -> Batches:
    data = TokenLoader(find_shards(folder, "train"), T, vocab_size=VOCABULARY, backend=backend)
    return (data.batch(step, rows) for step in itertools.count())


def memmap_rows(folder: Path, rows: int) -> Batches:
    data = np.memmap(folder / "all.bin", "<u2", "r")
    n, rng = (len(data) - 1) // T, np.random.default_rng(0)
    while True:
        order = rng.permutation(n)
        for i in range(0, n - rows + 1, rows):
            x, y = np.empty((rows, T), np.int64), np.empty((rows, T), np.int64)
            for row, window in enumerate(order[i : i + rows]):
                x[row] = data[window * T : window * T + T]
                y[row] = data[window * T + 1 : window * T + T + 1]
            yield torch.from_numpy(x), torch.from_numpy(y)


def nanogpt(folder: Path, rows: int) -> Batches:
    while True:
        data = np.memmap(folder / "all.bin", np.uint16, "r")  # each time: memmaps used to leak
        starts = torch.randint(len(data) - T, (rows,)).tolist()
        x = [torch.from_numpy(data[s : s + T].astype(np.int64)) for s in starts]
        y = [torch.from_numpy(data[s + 1 : s + 1 + T].astype(np.int64)) for s in starts]
        yield torch.stack(x), torch.stack(y)


def build_nanogpt(folder: Path, rows: int) -> Batches:
    while True:
        for i in range(SHARDS):
            tokens = np.load(folder / f"shard_{i:06}.npy").astype(np.int32)
            tokens = torch.tensor(tokens, dtype=torch.long)
            for at in range(0, len(tokens) - rows * T, rows * T):
                part = tokens[at : at + rows * T + 1]
                yield part[:-1].view(rows, T), part[1:].view(rows, T)


class MemmapDataset(torch.utils.data.Dataset):
    def __init__(self, path: Path):
        self.data = np.memmap(path, "<u2", "r")

    def __len__(self) -> int:
        return (len(self.data) - 1) // T

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = torch.from_numpy(self.data[i * T : i * T + T + 1].astype(np.int64))
        return window[:-1], window[1:]


def torch_loader(folder: Path, rows: int) -> Batches:
    options = dict(batch_size=rows, shuffle=True, drop_last=True, num_workers=0)
    loader = torch.utils.data.DataLoader(MemmapDataset(folder / "all.bin"), **options)
    while True:
        yield from map(tuple, loader)


def litdata_loader(folder: Path, rows: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=T + 1), shuffle=True
    )
    loader = StreamingDataLoader(dataset, batch_size=rows, drop_last=True)
    while True:
        for batch in map(torch.Tensor.long, loader):
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def _litdata_shard(path: str):
    yield torch.from_numpy(np.load(path).astype(np.int32)).to(torch.uint16)


def write_litdata(folder: Path) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        _litdata_shard, sorted(map(str, folder.glob("*.npy"))), str(folder / "litdata"),
        chunk_size=(T + 1) * 8192, item_loader=TokensLoader(), num_workers=1, verbose=False,
    )  # fmt: skip


def find_loaders(folder: Path) -> tuple[dict[str, Callable[[int], Batches]], dict[str, str]]:
    """Loaders by name, and why others are left out."""
    loaders = {
        "cpp": lambda rows: ours(folder, rows, "cpp"),
        "numpy twin": lambda rows: ours(folder, rows, "numpy"),
        "numpy memmap rows": lambda rows: memmap_rows(folder, rows),
        "nanoGPT get_batch": lambda rows: nanogpt(folder, rows),
        "build-nanogpt": lambda rows: build_nanogpt(folder, rows),
        "torch DataLoader": lambda rows: torch_loader(folder, rows),
    }
    try:
        write_litdata(folder)
    except ImportError as error:
        return loaders, {"litdata": f"not installed ({error})"}
    return loaders | {"litdata": lambda rows: litdata_loader(folder, rows)}, {}


def check(name: str, batches: Batches, rows: int) -> None:
    for _ in range(3):
        x, y = next(batches)
        assert x.shape == y.shape == (rows, T) and x.dtype == y.dtype == torch.int64, name
        assert torch.equal(x[:, 1:], y[:, :-1]) and 0 <= x.min() and x.max() < VOCABULARY, name


def warm(loaders: dict, rows: int, rounds: int) -> list[dict]:
    running = {name: make(rows) for name, make in loaders.items()}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for name, batches in running.items():
        check(name, batches, rows)
    for _ in range(rounds):
        for name, batches in running.items():
            for i in range(5 + TOKENS_A_STRETCH // (rows * T)):
                start = time.perf_counter()
                x, y = next(batches)
                seconds = time.perf_counter() - start
                if i >= 5:  # the first ones find another loader's data in the CPU's caches
                    times[name].append(seconds)
                del x, y
    return [
        record(name, rows, "warm", statistics.fmean(seconds), batches=len(seconds))
        | {"p50_ms": statistics.median(seconds) * 1e3}
        | {"p99_ms": sorted(seconds)[int(0.99 * (len(seconds) - 1))] * 1e3}
        for name, seconds in times.items()
    ]


def cold(loaders: dict, rows: int, rounds: int, folder: Path) -> list[dict]:
    """Opening and the first batches, all files dropped from the page cache before."""
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, make in loaders.items():
            gc.collect()  # what is still mapped is not dropped
            drop_from_cache(folder)
            start = time.perf_counter()
            batches = make(rows)
            for _ in range(COLD_BATCHES):
                next(batches)
            times[name].append((time.perf_counter() - start) / COLD_BATCHES)
            del batches
    return [
        record(name, rows, "cold", statistics.median(seconds), batches=COLD_BATCHES)
        for name, seconds in times.items()
    ]


def record(name: str, rows: int, cache: str, seconds: float, **more) -> dict:
    rate = {"mtokens_per_s": rows * T / seconds / 1e6}
    return {"loader": name, "rows": rows, "block_size": T, "cache": cache} | more | rate


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)  # what is not written yet is not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def ratios(results: list[dict]) -> dict[str, dict]:
    """What the project promises of itself, warm: ratios within this run.

    Of median times, but of whole times against the best other, as its shard loading counts.
    """
    found = {}
    for rows in SHAPES:
        at = {r["loader"]: r for r in results if r["rows"] == rows and r["cache"] == "warm"}
        rate = {name: r["mtokens_per_s"] for name, r in at.items()}
        median, ours = {name: r["p50_ms"] for name, r in at.items()}, rate.pop("cpp")
        best = max(rate, key=rate.get)
        found[f"{rows}x{T}"] = {
            "over nanoGPT get_batch": median["nanoGPT get_batch"] / median["cpp"],
            "over numpy memmap rows": median["numpy memmap rows"] / median["cpp"],
            "over the best other": ours / rate[best],
            "the best other": best,
            "p99 over p50": at["cpp"]["p99_ms"] / at["cpp"]["p50_ms"],
        }
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.tokens)
        loaders, left_out = find_loaders(folder)
        results = [r for rows in SHAPES for r in warm(loaders, rows, options.rounds)]
        results += [r for rows in SHAPES for r in cold(loaders, rows, 3, folder)]
    keys = ["loader", "rows", "cache", "mtokens_per_s", "p50_ms", "p99_ms"]
    table = [[f"{r[k]:.4g}" if type(r.get(k)) is float else str(r.get(k, "")) for k in keys]
             for r in results]  # fmt: skip
    text = common.markdown_table(keys, table)
    print(text)
    for shape, values in ratios(results).items():
        print(shape, ", ".join(f"{k}: {v if isinstance(v, str) else f'{v:.2f}'}"
                               for k, v in values.items()))  # fmt: skip
    common.write_results(options.out, "dataloader", text, {
        "cpu": common.cpu_name(), "threads": 1, "numpy": np.__version__,
        "litdata": None if left_out else importlib.metadata.version("litdata"),
        "tokens": options.tokens, "rounds": options.rounds, "ratios": ratios(results),
        "left_out": left_out, "results": results,
    })  # fmt: skip
    panels: dict[str, dict[str, float]] = {}
    for r in results:
        title = f"{r['rows']}x{T}, {r['cache']}"
        panels.setdefault(title, {})[r["loader"]] = r["mtokens_per_s"]
    common.draw_bars(options.out / "dataloader.png", panels, "million tokens a second", ("cpp",))
    print(f"left out: {left_out}")


if __name__ == "__main__":
    main()
