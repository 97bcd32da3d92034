"""Before step 0: what the run will need, what there is, and whether it can go.

Memory is gpt2.train.memory's formula against what the device has free; a run that cannot fit is
refused with the largest micro batch that does, and `micro_batch_size: auto` takes that one. Time is
a lower bound: each part of a step at the ceiling measured here, a matmul with the model's own shape
or a copy, with nothing lost between them (an efficiency of 1). Real steps take longer; the run's
lines say how much. Disk is the room for the checkpoints that stay and the one being written.

All ranks decide alike: by the least memory and the slowest device among them.
"""

import errno
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2.checkpoint import Checkpoint, list_checkpoints
from gpt2.config import TrainConfig, nearest_multiples
from gpt2.dist import Distributed
from gpt2.model import GPT
from gpt2.train.memory import Ceilings, Memory, Setting, largest_fit, memory, step_parts
from gpt2.train.metrics import duration

KEPT_FREE = 0.1  # of the memory there is: allocator, cuBLAS, NCCL, and what no formula knows
MEASURE_S = 0.02  # how long the ceilings are measured, each


@dataclass(frozen=True)
class Preflight:
    """What was found; rows() says it."""

    setting: Setting
    memory: Memory
    available: int  # bytes that the run may use on the device with the least
    largest: int  # the largest micro batch that fits
    ceilings: Ceilings
    steps: int  # that are still to be done
    checkpoint_bytes: int
    n_checkpoints: int  # that lie on the disk at the same time
    disk_free: int
    where: str  # the device, in words
    full_rows: bool = True  # else nothing is said of time

    def predicted(self) -> dict[str, float | None]:
        """What the receipt keeps."""
        step_ms = self.step_seconds * 1e3 if self.full_rows else None
        return {"step_ms": step_ms, "peak_bytes": self.memory.peak}

    @property
    def step_seconds(self) -> float:
        """The least time that a step can take."""
        return sum(step_parts(self.setting, self.ceilings).values())

    def rows(self) -> list[tuple[str, str]]:
        """Memory, time and disk as rows of the table that a run prints before its first step."""
        m, s = self.memory, self.setting
        logits = "gradients of the head" if m.logits and not m.working else "logits and loss"
        names = dict(
            parameters="parameters", gradients="gradients", optimizer="AdamW's moments",
            activations="activations", bfloat16_weights="bfloat16 weights", logits=logits,
            working="in flight", batches="batches", host_copies="copies for checkpoints",
        )  # fmt: skip
        parts = [f"{names[k]} {size(v)}" for k, v in vars(m).items() if v or k == "gradients"]
        if not m.gradients:  # one micro step: they come as the activations go
            parts[1] = f"gradients {size(4 * s.n_trained)} (made after the peak)"
        seconds = step_parts(s, self.ceilings)
        total = self.step_seconds
        largest = sorted(seconds, key=seconds.get, reverse=True)[:3]
        shares = ", ".join(f"{name} {seconds[name] / total:.0%}" for name in largest)
        dtype = "bfloat16" if s.bfloat16 else "float32"
        return [
            (
                "memory",
                f"{size(m.peak)} at the peak of a step by formula, {size(self.available)} usable "
                f"on {self.where}",
            ),
            ("  of which", ", ".join(parts)),
            ("  largest fit", f"micro_batch_size {self.largest}"),
            *[
                (
                    "time",
                    f"at least {_seconds(total)} a step, {duration(total * self.steps)} for "
                    f"{self.steps:,} steps: each part at its ceiling ({shares})",
                )
            ]
            * self.full_rows,
            (
                "  ceilings",
                f"measured: {dtype} matmul {size(self.ceilings.flops, 'FLOP')}/s, copy "
                f"{size(self.ceilings.bandwidth)}/s",
            ),
            (
                "disk",
                f"{self.n_checkpoints} checkpoints of {size(self.checkpoint_bytes)} at a time, "
                f"{size(self.disk_free)} free",
            ),
        ]


def preflight(
    config: TrainConfig,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    group: Distributed,
    *,
    block_size: int,
    bfloat16: bool,
    compiled: bool,
    doc_mask: bool = False,
    reference: int = 0,
    full_rows: bool = True,
    resumed: Checkpoint | None = None,
) -> tuple[TrainConfig, Preflight]:
    """Checks that the run fits; returns config with its micro_batch_size as a number, and findings.

    All ranks call it. block_size: tokens in a training row. doc_mask: batches have a doc_start.
    reference: parameters of a frozen second model. full_rows: False where batches may be shorter
    than block_size, so that time has no lower bound.
    A resumed run with micro_batch_size auto keeps the checkpoint's where that fits, so that its
    additions keep their order.
    Raises ValueError where memory cannot suffice, naming the largest micro batch that fits; OSError
    where the disk cannot.
    """
    s = _setting(config, model, group, block_size)
    n_params = s.n_params + reference
    s = replace(s, n_params=n_params, bfloat16=bfloat16, compiled=compiled, doc_mask=doc_mask)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [t for t in (*model.parameters(), *moments) if isinstance(t, torch.Tensor)]
    held = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)
    available = available_bytes(group.device, held)
    available = min(group.gather(available))
    largest = largest_fit(s, available)
    rows = s.rows * s.micro_steps
    chosen = config.micro_batch_size
    if chosen == "auto":
        chosen = largest
        if resumed is not None:
            before = resumed.train.get("micro_batch_size")
            if isinstance(before, int) and before <= largest and rows % before == 0:
                chosen = before
    s = replace(s, rows=chosen or 1, micro_steps=rows // (chosen or 1))
    plan = memory(s)
    if not largest or chosen > largest:
        raise ValueError(_refusal(config, s, plan.peak, available, largest, group.device))
    _check_host_memory(s, group)
    resolved = replace(config, micro_batch_size=chosen)
    first_step = 0 if resumed is None else resumed.step
    one, n = _checkpoint_bytes(model), _n_checkpoints(config, first_step)
    free = _check_disk(config, group, one, n)
    ceilings = measure_ceilings(group.device, s)
    every = group.gather((ceilings.flops, ceilings.bandwidth))
    ceilings = Ceilings(*(min(values) for values in zip(*every, strict=True)))
    where = str(group.device) if s.cuda else "the CPU's memory"
    if group.world_size > 1:
        where += ", the least of all ranks"
    steps = max(config.max_steps - first_step, 0)
    found = Preflight(s, plan, available, largest, ceilings, steps, one, n, free, where, full_rows)
    return resolved, found


def available_bytes(device: torch.device, held: int = 0) -> int:
    """Bytes that this process may use on a device, the margin taken off.

    held: what it holds there already and counts as its need. A CPU's memory is what the kernel
    calls available, within the limits of the process's control groups, shared among the ranks of
    this host.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = available_host_bytes() // ranks + held
    return int(free * (1 - KEPT_FREE))


def available_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that this process can still have: the kernel's estimate, within all limits."""
    lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for entry in groups:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may lie outside of what is mounted: then the root is its own.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            left = _left_in(folder, *names)
            free = free if left is None else min(free, left)
            if folder == root:
                break
    return max(free, 0)


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """What a control group has left; None without a limit. Page cache can be given back."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int((folder / usage).read_text()) + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None


@torch.no_grad()
def measure_ceilings(device: torch.device, s: Setting) -> Ceilings:
    """What matmuls and copies of the model's own size reach on a device, the best of several."""
    C = s.shape.n_embd
    dtype = torch.bfloat16 if s.bfloat16 else torch.float32
    weight = torch.ones(C, 4 * C, device=device, dtype=dtype)
    # On a CPU in steps, since a large matmul may take seconds there.
    rows, flops = s.tokens if s.cuda else min(s.tokens, 64), 0.0
    while True:
        x = torch.ones(rows, C, device=device, dtype=dtype)
        out = torch.empty(rows, 4 * C, device=device, dtype=dtype)
        seconds = _best_time(lambda x=x, out=out: torch.mm(x, weight, out=out), device)
        flops = max(flops, 2 * rows * C * 4 * C / seconds)
        if rows == s.tokens or 4 * seconds > MEASURE_S:
            break
        rows = min(4 * rows, s.tokens)
    source = torch.ones(min(s.tokens * 4 * C, 1 << 26), device=device, dtype=dtype)
    target = torch.empty_like(source)
    seconds = _best_time(lambda: target.copy_(source), device)
    return Ceilings(flops, 2 * source.nbytes / seconds)


def _best_time(work, device: torch.device) -> float:
    """Seconds of one call, the best of those within MEASURE_S."""
    best, spent = float("inf"), 0.0
    work()  # the first call makes threads and handles
    while spent < MEASURE_S:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return best


def size(value: float, unit: str = "B") -> str:
    """Bytes, or another unit, in words: 3.21 GB, 12.5 MB, 83.1 GFLOP."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            value /= factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}{unit}"
    return f"{value / 1e3:.0f} k{unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _setting(config: TrainConfig, model: GPT, group: Distributed, block_size: int) -> Setting:
    per_row = block_size * group.world_size
    if config.tokens_per_step % per_row:
        raise ValueError(
            f"tokens_per_step {config.tokens_per_step} is not a multiple of block_size "
            f"{block_size} x {group.world_size} ranks; the nearest are "
            f"{nearest_multiples(config.tokens_per_step, per_row)}"
        )
    rows, micro_steps = 1, config.tokens_per_step // per_row
    if config.micro_batch_size != "auto":
        rows = config.micro_batch_size
        micro_steps = config.grad_accum_steps(block_size, group.world_size)
    parameters = list(model.parameters())
    return Setting(
        shape=model.config, rows=rows, block_size=block_size, micro_steps=micro_steps,
        bfloat16=False, cuda=group.device.type == "cuda", kernels=model.ops.name,
        n_params=sum(p.numel() for p in parameters),
        n_trained=sum(p.numel() for p in parameters if p.requires_grad),
        sharding=config.sharding if group.world_size > 1 else "none",
        activation_checkpointing=config.activation_checkpointing,
        world_size=group.world_size, exact_reduction=config.exact_reduction,
        # One for the checkpoint being written, two to roll back to.
        host_copies=1 + 2 * (config.guard == "rollback"),
    )  # fmt: skip


def _refusal(config, s: Setting, peak: int, available: int, largest: int, device) -> str:
    what = f"micro_batch_size {s.rows} needs {size(peak)} on {device}, {size(available)} are usable"
    if largest:
        fits = memory(replace(s, rows=largest, micro_steps=s.rows * s.micro_steps // largest))
        return (
            f"{what}: use --micro_batch_size {largest}, the largest that fits ({size(fits.peak)}) "
            f"and divides the {s.rows * s.micro_steps} rows that a device has in a step; the "
            "result stays the same"
        )
    one = replace(s, rows=1, micro_steps=s.rows * s.micro_steps)
    return (
        f"{what}, and even micro_batch_size 1 needs {size(memory(one).peak)}: use "
        f"activation_checkpointing or, on several devices, sharding; train a smaller model; use a "
        f"block_size below {s.block_size}, or a device with more memory"
    )


def _check_host_memory(s: Setting, group: Distributed) -> None:
    """The copies of a GPU's state must fit its host; on a CPU they are part of the peak."""
    needed = s.host_copies * 4 * (s.n_params + 2 * s.n_trained) if s.cuda else 0
    free = int(available_bytes(torch.device("cpu")))
    if any(group.gather(needed > free)):
        raise ValueError(
            f"{s.host_copies} copies of weights and moments for checkpoints and rollback need "
            f"{size(needed)} of host memory for each rank, {size(free)} are usable: use fewer "
            "ranks on a host, or guard skip"
        )


def _checkpoint_bytes(model: GPT) -> int:
    """Weights without padding and two moments of what is trained, in float32; rest below 1 MiB."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (model.n_params() + 2 * trained) + (1 << 20)


def _n_checkpoints(config: TrainConfig, first_step: int) -> int:
    """How many lie on the disk at the same time, the one being written included."""
    periods = (config.save_every, config.eval_every, config.sample_every)
    due = {step for n in periods if n for step in range(n, config.max_steps, n)}
    saves = len([step for step in due if step > first_step]) + 1
    if not config.keep_last:
        return saves
    return min(config.keep_last + 1, saves)


def _check_disk(config: TrainConfig, group: Distributed, one: int, n: int) -> int:
    """Bytes that are free for checkpoints, those of this run counted as free."""
    folder = Path(config.out_dir) / config.run_name
    here = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(here).free
    kept = list_checkpoints(folder)
    if config.keep_last:
        free += sum(f.stat().st_size for path in kept for f in path.iterdir())
    # Only the main rank writes, perhaps on a disk of its own; its finding is everyone's.
    if group.broadcast(free < n * one):
        raise OSError(
            errno.ENOSPC,
            f"{n} checkpoints of {size(one)} lie there at a time (keep_last {config.keep_last}), "
            f"{size(free)} are free: make room, lower keep_last or choose another out_dir",
            str(here),
        )
    return free
