"""How everything here is timed and written down, in one place. See benchmarks/kernels.py for a use.

A time is the median of repeated calls, with the 20th and 80th percentile beside it. Each call
starts with a cold L2 (a buffer larger than it is overwritten first) and is timed on the device by
two events around the call alone. Rates are compared with ceilings that are measured in the same
run: the bandwidth of a large copy and the rate of a large bf16 matmul.
A result file holds the command, the commit, the hardware and the versions, and appears at once or
not at all.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

WARMUP_MS, REPEAT_MS = 50, 200
FLUSH_BYTES = 256 * 2**20  # several times the 60 MB L2 of an H200
ROOT = Path(__file__).resolve().parent.parent

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


def measure(
    call: Callable[..., object],
    *,
    prepare: Callable[[], tuple] = tuple,
    warmup_ms: float = WARMUP_MS,
    repeat_ms: float = REPEAT_MS,
) -> Timing:
    """Time call(*prepare()) on the current CUDA device, prepare left out. Waits for the device, as
    it must.
    """
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
    for _ in range(max(1, int(warmup_ms / estimate))):
        call(*prepare())
    n = min(max(10, int(repeat_ms / estimate)), 1000)
    times = sorted(_timed(call, prepare, flush) for _ in range(n))
    median, p20, p80 = (times[int(q * (n - 1))] for q in (0.5, 0.2, 0.8))
    return Timing(median, p20, p80, n, peak_bytes)


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
    """Bytes/s of a 1 GiB copy (read and written) and FLOP/s of an 8192-cubed bf16 matmul on this
    device, now.
    """
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
    """Command, commit, hardware and versions."""

    def git(*arguments: str) -> str:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return result.stdout.strip()

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    hardware = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write content beside path, sync it and rename it, so that a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1, default=_plain)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Timing) else str(value)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with padded columns, which reads well in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return (
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            + " |"
        )

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
