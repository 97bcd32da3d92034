"""Times other tiles for each kernel than those that triton_kernels/launch.py ships.

    python benchmarks/tune.py                       all kernels, at GPT-2 124M's shapes
    python benchmarks/tune.py --kernel "attention dkv" --kernel layer_norm
    python benchmarks/tune.py --heads 25            gpt2-xl's shapes: 25 heads, 1600 wide

One kernel after the other: each candidate takes the table's place, must pass the parity check of
benchmarks/kernels.py, and is timed in the mode that the kernel decides (attention's dq and dk/dv in
the whole backward pass). Then the fastest stays in place while the next kernel is tried. A
candidate that does not compile, does not fit or is wrong says so instead of a time. Nothing is
changed in launch.py: the last lines printed are the entries that would make it faster.

On a GPU it writes tune.json and tune.md under --out. Without one it only checks that the candidates
give right results, through Triton's interpreter.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common, kernels  # noqa: E402
from benchmarks.kernels import Problem  # noqa: E402
from triton_kernels import launch  # noqa: E402
from triton_kernels.launch import AttentionTiles, CrossEntropyTile  # noqa: E402

WORTH = 0.98  # of the shipped tile's time: below it, a candidate is said to be better


@dataclass(frozen=True)
class Kernel:
    """A table entry that is tried. table[key] is the shipped one; mode: what is timed."""

    name: str
    table: dict
    key: object
    candidates: list
    mode: str
    problem: Callable[[], Problem]  # at full size
    small: Callable[[], Problem]  # for the parity check


def all_kernels(arch: str, heads: int, tokens: int) -> list[Kernel]:
    """The kernels with their candidates; widths are 64 x heads, rows of 1,024 tokens."""
    width = 64 * heads
    dtype = torch.bfloat16 if arch != "interpret" else torch.float16
    attention = launch.for_architecture(launch.ATTENTION, arch)
    norm = launch.for_architecture(launch.LAYER_NORM, arch)
    losses, norm_key = launch.CROSS_ENTROPY, min(limit for limit in norm if limit >= width)
    loss_key = next(a for a in losses if losses[a] is launch.for_architecture(losses, arch))

    def tiles(kernel: str, *shapes: tuple[int, int, int, int]) -> Kernel:
        table = attention[kernel][min(limit for limit in attention[kernel] if limit >= 64)]
        return Kernel(
            f"attention {kernel}", table, max(table), [AttentionTiles(*s) for s in shapes],
            "forward" if kernel == "fwd" else "backward",
            partial(kernels.attention_problem, tokens // 1024, 1024, heads, 64),
            partial(kernels.attention_problem, 1, 200, 2, 64, dtype),
        )  # fmt: skip

    shipped, loss = norm[norm_key], losses[loss_key]
    norm_problems = (
        partial(kernels.layer_norm_problem, tokens, width),
        partial(kernels.layer_norm_problem, 67, width, dtype),
    )
    return [
        # Queries x keys, warps, stages. Each compiles for sm_90 without a spill, with and without
        # documents; dk/dv with 128 queries spills at any number of warps.
        tiles(
            "fwd", (128, 64, 4, 2), (128, 64, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4),
            (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        ),
        tiles(
            "dkv", (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (32, 128, 8, 2),
            (64, 128, 8, 2), (64, 128, 8, 3),
        ),
        tiles(
            "dq", (64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 32, 4, 3), (64, 32, 4, 3),
        ),
        Kernel(
            "layer_norm", norm, norm_key,
            [
                replace(shipped, **change)
                for change in (
                    dict(fwd_rows=1), dict(fwd_rows=2), dict(fwd_rows=8), dict(fwd_warps=2),
                    dict(fwd_warps=8),
                )
            ],
            "forward", *norm_problems,
        ),
        Kernel(
            "layer_norm backward", norm, norm_key,
            [
                replace(shipped, **change)
                for change in (
                    dict(bwd_stages=1), dict(bwd_stages=3), dict(bwd_programs=2),
                    dict(bwd_programs=3), dict(bwd_programs=5), dict(bwd_programs=8),
                    dict(bwd_rows=1), dict(bwd_rows=4), dict(bwd_warps=8), dict(dw_parts=64),
                    dict(dw_parts=256), dict(dw_cols=32),
                )
            ],
            "backward", *norm_problems,
        ),
        Kernel(
            "cross_entropy", losses, loss_key,
            [
                CrossEntropyTile(block, tail, warps)
                for block, tail, warps in (
                    (4096, 2048, 8), (2048, 1024, 8), (2048, 2048, 4), (8192, 2048, 16),
                    (8192, 4096, 32), (4096, 1024, 32), (16384, 2048, 32),
                )
                if (block, tail, warps) != (loss.block, loss.tail, loss.warps)
            ],
            "forward+backward",
            partial(kernels.cross_entropy_problem, tokens, kernels.V, kernels.PADDED_V),
            partial(kernels.cross_entropy_problem, 5, kernels.V, kernels.PADDED_V, dtype),
        ),
    ]  # fmt: skip


@contextmanager
def in_place(kernel: Kernel, tile) -> Iterator[None]:
    """tile where the shipped one stands."""
    shipped = kernel.table[kernel.key]
    kernel.table[kernel.key] = tile
    try:
        yield
    finally:
        kernel.table[kernel.key] = shipped


def try_tile(kernel: Kernel, tile, device: torch.device, problem: Problem | None) -> dict:
    """A record of one candidate: its time, or why it has none. problem None: parity alone."""
    record = {"kernel": kernel.name, "tile": repr(tile)}
    with in_place(kernel, tile):
        try:
            with device:
                torch.manual_seed(0)
                small = kernel.small()
                failures = kernels.check_parity(small)
            if failures:
                return record | {"error": f"wrong: {failures[0]}"}
            if problem is None:
                return record
            function = next(iter(problem.ours.values()))
            timing = kernels._time(function, problem.inputs, kernel.mode)
            return record | {"us": 1e3 * timing.median, "p20": 1e3 * timing.p20,
                             "p80": 1e3 * timing.p80}  # fmt: skip
        except Exception as error:  # Triton has many, for tiles that a device cannot have
            lines = str(error).strip().splitlines()
            return record | {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}


def tune(kernel: Kernel, device: torch.device, timed: bool) -> list[dict]:
    """Records of the shipped tile and of every candidate; leaves the fastest in place."""
    problem = None
    if timed:
        with device:
            problem = kernel.problem()
    shipped = kernel.table[kernel.key]
    tiles = [shipped, *(t for t in kernel.candidates if t != shipped)]
    records = []
    for tile in tiles:
        records.append(try_tile(kernel, tile, device, problem))
        shown = records[-1].get("error") or f"{records[-1].get('us', 0):,.1f} us" * timed or "right"
        print(f"{kernel.name:<20} {tile}  {shown}", flush=True)
    times = {i: r["us"] for i, r in enumerate(records) if "us" in r}
    if times and 0 in times:
        best = min(times, key=times.get)
        if times[best] < WORTH * times[0]:
            kernel.table[kernel.key] = tiles[best]
            records[best]["better"] = times[0] / times[best]
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", action="append", help="only this one (may be repeated)")
    parser.add_argument("--heads", type=int, default=12, help="of 64; 12, 16, 20, 25 in GPT-2")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro batch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device = torch.device("cuda" if kernels.HAS_CUDA else "cpu")
    arch = launch.architecture(device)
    found = all_kernels(arch, options.heads, options.tokens)
    names = [kernel.name for kernel in found]
    for name in options.kernel or []:
        if name not in names:
            parser.error(f"unknown kernel {name!r}: one of {', '.join(names)}")
    chosen = [k for k in found if not options.kernel or k.name in options.kernel]
    if not kernels.HAS_CUDA:
        print("no CUDA device: nothing is timed; results are checked through the interpreter")
    records = [record for k in chosen for record in tune(k, device, kernels.HAS_CUDA)]
    wrong = [r for r in records if r.get("error", "").startswith("wrong")]
    if kernels.HAS_CUDA:
        content = common.provenance() | {
            "architecture": arch, "heads": options.heads, "tokens": options.tokens,
            "records": records,
        }  # fmt: skip
        common.write_json(options.out / "tune.json", content)
        rows = [
            [r["kernel"], r["tile"], r.get("error") or f"{r['us']:,.1f}",
             f"{r['better']:.3f} x" if "better" in r else ""]
            for r in records
        ]  # fmt: skip
        header = ["kernel", "tile", "us", "faster than shipped by"]
        (options.out / "tune.md").write_text(common.markdown_table(header, rows) + "\n")
        for record in records:
            if "better" in record:
                print(f"better on {arch}: {record['kernel']} {record['tile']}")
    print(f"{len(records)} tiles of {len(chosen)} kernels, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
