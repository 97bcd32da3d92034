"""How everything here is timed and written down, in one place.

First the results are compared, then the times. What is compared runs in turns within one run, so
that whatever disturbs the machine disturbs all alike. A time is the median of repeated calls, with
the 20th and 80th percentile beside it. On a GPU each call starts with a cold L2 (a buffer larger
than it is overwritten first) and is timed by two events around the call alone; rates are compared
with ceilings measured in the same run: a large copy, a large bf16 matmul.
A result file holds the command, commit, hardware, load and versions. Beside it lie its tables in
Markdown and, of some, a picture of bars.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpt2.device import cpu_name
from gpt2.storage import write_whole
from gpt2.train.receipt import git_state, versions

WARMUP_MS, REPEAT_MS = 50, 200
FLUSH_BYTES = 256 * 2**20  # several times the 60 MB L2 of an H200

# Of an H200, measured on one like those the project is timed on; they label the static floors only.
H200_COPY_BYTES_PER_S, H200_BF16_FLOPS_PER_S = 4.3e12, 790e12


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and the peak memory that it added, in bytes."""

    median: float
    p20: float
    p80: float
    calls: int
    peak_bytes: int


def measure(call: Callable[..., object], *, prepare: Callable[[], tuple] = tuple) -> Timing:
    """Time call(*prepare()) on the current CUDA device, prepare left out."""
    call(*prepare())  # compiles
    given = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*given)
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    del given

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    estimate = sum(_timed(call, prepare, flush) for _ in range(3)) / 3
    for _ in range(max(1, int(WARMUP_MS / estimate))):
        call(*prepare())
    n = min(max(10, int(REPEAT_MS / estimate)), 1000)
    return Timing(*spread([_timed(call, prepare, flush) for _ in range(n)]), n, peak_bytes)


def spread(values: Collection[float]) -> tuple[float, float, float]:
    """The median, and the 20th and 80th percentile."""
    ordered = sorted(values)
    p20, p80 = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return statistics.median(ordered), p20, p80


def _timed(call: Callable[..., object], prepare: Callable[[], tuple], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    given = prepare()
    # also gives the host time to queue the call, so that launches are not part of the time
    flush.zero_()
    start.record()
    call(*given)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_ceilings() -> dict[str, float]:
    """Bytes/s of a 1 GiB copy, read and written, and FLOP/s of an 8192-cubed bf16 matmul, now."""
    n, n_copied = 8192, 2**30
    source, target = (torch.empty(n_copied, dtype=torch.int8, device="cuda") for _ in range(2))
    copy = measure(lambda: target.copy_(source))
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = measure(lambda: a @ b)
    return {
        "copy_bytes_per_s": 2 * n_copied / (copy.median * 1e-3),
        "bf16_flops_per_s": 2 * n**3 / (matmul.median * 1e-3),
    }


def provenance() -> dict[str, object]:
    """Command, commit, hardware, load (processes that ran or waited, over 1, 5 and 15 minutes) and
    versions.
    """
    git, device = git_state(), f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "command": " ".join(["python", *sys.argv]), "commit": git["commit"],
        "uncommitted_changes": git["dirty"], "load": os.getloadavg(), **versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else device,
    }  # fmt: skip


def arguments(doc: str) -> argparse.ArgumentParser:
    """A benchmark's parser, with --out, the folder of its results."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def write_results(out: Path, name: str, text: str, content: dict[str, object]) -> None:
    """Writes out/name.json, provenance and content, and out/name.md, so that a file that exists is
    complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    plain = lambda value: asdict(value) if isinstance(value, Timing) else str(value)  # noqa: E731
    content = json.dumps(provenance() | content, indent=1, default=plain)
    write_whole(out / f"{name}.json", content + "\n")
    write_whole(out / f"{name}.md", text + "\n")
    print(f"written: {out / name}.json and .md")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with padded columns, which reads well in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def draw_bars(
    path: Path, panels: dict[str, dict[str, float]], xlabel: str, ours: Collection[str] = ()
) -> None:
    """A picture with a panel for each title, in it a bar for each name; those in ours stand out."""
    from matplotlib.figure import Figure

    height = sum(1 + 0.3 * len(values) for values in panels.values())
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False).flat
    for one, (title, values) in zip(axes, panels.items(), strict=True):
        colors = ["#c33" if name in ours else "#9ab" for name in values]
        bars = one.barh(list(values), list(values.values()), color=colors)
        one.bar_label(bars, [f"{value:,.4g}" for value in values.values()], padding=2, fontsize=8)
        one.set(title=title, xlabel=xlabel)
        one.invert_yaxis()
        one.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
