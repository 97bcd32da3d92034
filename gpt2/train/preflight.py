"""Before step 0: what the run is, what it will need, what there is, and whether it can go.

Memory is measured on a GPU: the peaks of a forward and backward pass of one row and of two,
extended in a straight line. The passes run uncompiled, which needs no less than compiled ones do.
On a CPU it is estimated: weights, gradients, moments and their copies for checkpoints; what
autograd keeps of each block, per token and channel 8 bytes of the residual stream and 14 numbers of
a matmul's width (layer norms 2, attention 4, MLP 8); the logits, with two gradients where they are
not computed in chunks. Dropout's masks and the like are left out: no run that fits is refused.
What Muon needs besides its moments is little, and needed when activations are not.

Time is what a step takes at best: its FLOPs at the rate of a matmul measured here, AdamW's bytes at
that of a copy. Disk is the room for the checkpoints that stay and the one being written.

All ranks decide alike: by the rank with the least room, and by the slowest device.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2.checkpoint import Checkpoint, list_checkpoints
from gpt2.config import GPTConfig, TrainConfig
from gpt2.cpu import LOGITS
from gpt2.data import Mixture
from gpt2.data.loader import BatchSource
from gpt2.device import Execution
from gpt2.dist import Distributed
from gpt2.lora import lora_config
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.train.between import Due
from gpt2.train.layouts import Layout
from gpt2.train.metrics import duration
from gpt2.train.minutes import most_steps

KEPT_FREE = 0.1  # of a GPU's memory: fragments, NCCL's buffers, and what others may still take
MEASURE_S = 0.02  # how long each rate is measured
V2_NAMES = "max", "current", "inactive_file"  # of a control group's limits and usage
V1_NAMES = "limit_in_bytes", "usage_in_bytes", "total_inactive_file"
CPU_TOKENS = 1 << 14  # of a micro batch that auto takes on a CPU; more is no faster there

Need = Callable[[int], dict[str, int]]  # rows of a micro batch -> bytes at a step's peak, by parts
Table = list[tuple[str, str]]


def preflight(
    config: TrainConfig, objective: nn.Module, optimizer: torch.optim.Optimizer,
    source: BatchSource, execution: Execution, group: Distributed, *,
    trial: Callable[[int], None] | None, resumed: Checkpoint | None = None, has_val: bool = True,
) -> tuple[TrainConfig, Table, dict]:  # fmt: skip
    """Checks that the run fits; all ranks call it.

    source: of the batches that are trained on.  trial(rows): a forward and a backward pass of that
    many rows; called on a GPU only.  has_val: whether there is validation data.
    Returns config with its micro_batch_size as a number, rows of the run's table, and what is
    predicted: step_ms (None where batches may be shorter than block_size) and peak_bytes.
    micro_batch_size auto takes the largest that fits, on a CPU within half of its memory and
    CPU_TOKENS. A resumed run keeps the checkpoint's where that fits: its order of additions.
    Raises ValueError where memory cannot suffice, naming the largest micro batch that fits; OSError
    where the disk cannot.
    """
    model, length, device = objective.model, source.block_size, execution.device
    one = replace(config, micro_batch_size=1) if config.micro_batch_size == "auto" else config
    rows = one.micro_batch_size * one.grad_accum_steps(length, group.world_size)  # of a device
    weights = 4 * _count(objective.parameters())
    gradients = 4 * _count(p for p in objective.parameters() if p.requires_grad)
    own = [p for part in optimizer.param_groups for p in part["params"]]
    moments = 8 * _count(own) - 4 * _count(p for p in own if p in optimizer.matrices)
    # Adapters are saved alone; the copies to go back to are of all weights.
    saved = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = saved = saved - 4 * sum(p.numel() for p in optimizer.matrices)
    if config.guard == "rollback":
        copies += 2 * (4 * _count(model.parameters()) + moments)
    others = {"moments": moments}
    if device.type == "cuda":
        host = available_bytes(torch.device("cpu"))
        if group.any(copies > host):
            raise ValueError(
                f"copies for checkpoints and rollback need {size(copies)} of host memory for each "
                f"rank, {size(host)} are usable: use fewer ranks on a host, or guard skip"
            )
        passes = _measured(config, objective, rows, group, trial)  # with weights and gradients
        others["moments"] *= not optimizer.state
        free = available_bytes(device)
    else:
        passes = partial(_estimated, config, model.config, length, execution.dtype.itemsize)
        others |= {"weights": weights, "gradients": gradients, "copies for checkpoints": copies}
        free = available_bytes(device) + weights + (moments if optimizer.state else 0)

    def need(n: int) -> dict[str, int]:
        sums = 1  # of gradients
        if config.exact_reduction:  # one for each level of the tree; two more for an exchange
            micro_steps = rows // n
            sums = max((micro_steps & -micro_steps).bit_length(), 3 if group.world_size > 1 else 1)
        return others | passes(n) | {"partial sums": (sums - 1) * gradients}

    chosen, peak, table = _choose(config, need, free, rows, length, group, resumed)
    config, first_step = replace(config, micro_batch_size=chosen), resumed.step if resumed else 0
    rates = group.gather(measure_rates(model.config.n_embd, chosen * length, execution))
    flops, bandwidth = (min(rate) for rate in zip(*rates, strict=True))
    step_s = None
    if source.full_rows:
        # As the model counts FLOPs, but of rows of `length` tokens and the causal half of attention
        c = model.config
        token = model.flops_per_token() - 6 * c.n_layer * c.n_embd * (2 * c.block_size - length)
        # AdamW reads 16 bytes a parameter and writes 12; before it the norm reads the gradients.
        step_s = rows * length * token / flops + 32 * _count(own) / bandwidth
        step_s += optimizer.flops() / flops
        if config.max_minutes and resumed is None:
            config = replace(config, max_steps=most_steps(config, step_s))
        steps = max(config.max_steps - first_step, 0)
        table.append((
            "time",
            f"about {step_s * 1e3:,.1f} ms a step at best, {duration(step_s * steps)} for "
            f"{steps:,} steps, by matmuls of {size(flops, 'FLOP')}/s and copies of "
            f"{size(bandwidth)}/s",
        ))  # fmt: skip
    is_saved = map(Due(config, has_val).save, range(first_step + 1, config.max_steps + 1))
    has_best = has_val and config.eval_every > 0
    table.append(_check_disk(config, group, saved, sum(is_saved), has_best))
    return config, table, {"step_ms": step_s and step_s * 1e3, "peak_bytes": peak}


def _measured(config: TrainConfig, objective: nn.Module, rows: int, group, trial) -> Need:
    """What weights, gradients and passes take, from passes of one row and of two."""
    device, peaks = group.device, []
    trained = [p for p in objective.parameters() if p.requires_grad]
    # As in a later micro step: with gradients. Those of DDP lie in its buckets at all times.
    is_ddp = group.world_size > 1 and config.sharding != "full" and not config.exact_reduction
    with torch.compiler.set_stance("force_eager"):
        for n in (1, 1, min(2, rows)):  # the first one makes handles and workspaces
            try:
                for p in trained if not is_ddp else ():
                    p.grad = torch.zeros_like(p)
                torch.cuda.reset_peak_memory_stats(device)
                trial(n)
                torch.cuda.synchronize(device)
                peaks.append(torch.cuda.max_memory_allocated(device))
            except torch.OutOfMemoryError:
                peaks.append(torch.cuda.mem_get_info(device)[1])  # all there is, more than is free
            finally:
                for p in trained:
                    p.grad = None
    torch.cuda.empty_cache()
    more = max(peaks[2] - peaks[1], 0)
    return lambda n: {"weights, gradients and a row": peaks[1], "further rows": (n - 1) * more}


def _estimated(
    config: TrainConfig, shape: GPTConfig, length: int, width: int, n: int
) -> dict[str, int]:
    """What passes of n rows take, by the formula at the head of this file; width: of a dtype."""
    stream = n * length * shape.n_embd  # numbers in it
    block = stream * (8 + 14 * width)
    activations = shape.n_layer * block
    if config.activation_checkpointing:  # what enters each block, and one of them whole
        activations = shape.n_layer * stream * (4 + width) + block
    logits = n * length * shape.padded_vocab_size
    at_once = 3 * logits if logits <= LOGITS else LOGITS  # else in chunks, in place
    return {"activations": activations, "logits": 4 * at_once}


def _choose(
    config: TrainConfig, need: Need, free: int, rows: int, length: int, group: Distributed,
    resumed: Checkpoint | None,
) -> tuple[int, int, Table]:  # fmt: skip
    """Rows of a micro batch and the bytes of their peak. Raises ValueError where none fit."""
    on_gpu, chosen = group.device.type == "cuda", config.micro_batch_size

    def fit(room: int, most: int) -> int:
        """The largest micro batch that fits on every rank, 0 where none does."""
        dividing = (n for n in range(1, most + 1) if rows % n == 0)
        fitting = (n for n in dividing if sum(need(n).values()) <= room)
        return min(group.gather(max(fitting, default=0)))

    largest = fit(free, rows)
    if chosen == "auto":
        before = resumed.train.get("micro_batch_size") if resumed else None
        if isinstance(before, int) and before <= largest and rows % before == 0:
            chosen = before
        else:
            chosen = largest if on_gpu else fit(free // 2, CPU_TOKENS // length)
    chosen = chosen or 1  # where no row fits, or only one does and that barely
    found = group.gather((need(chosen), free))
    parts, free = max(found, key=lambda rank: sum(rank[0].values()) - rank[1])
    peak = sum(parts.values())
    where = "the GPU" if on_gpu else "the CPU's memory"
    where += " of the rank with the least room" if group.world_size > 1 else ""
    if chosen > largest:
        remedy = (
            f"use --micro_batch_size {largest}, the largest that fits and divides the {rows} rows "
            "that a device has in a step; the result stays the same"
            if largest
            else "and even micro_batch_size 1 does not fit: use activation_checkpointing, sharding "
            f"on several devices, a smaller model, or a block_size below {length}"
        )
        what = f"micro_batch_size {chosen} needs {size(peak)} on {where}, {size(free)} are usable"
        raise ValueError(f"{what}: {remedy}")
    how = "measured" if on_gpu else "estimated"
    return chosen, peak, [
        ("memory", f"{size(peak)} at the peak of a step ({how}), {size(free)} usable on {where}"),
        ("  of which", ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)),
        ("  largest fit", f"micro_batch_size {largest}"),
    ]  # fmt: skip


def _check_disk(
    config: TrainConfig, group: Distributed, one: int, n_saves: int, has_best: bool
) -> tuple[str, str]:  # fmt: skip
    """A row of the table; one: bytes of a checkpoint; has_best: besides the newest the best one
    stays. Raises OSError where they find no room."""
    n = min(config.keep_last + 1 + has_best, n_saves) if config.keep_last else n_saves
    here = next(p for p in (config.folder, *config.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(here).free
    if config.keep_last:  # those of this run make room
        kept = list_checkpoints(config.folder)
        free += sum(f.stat().st_size for path in kept for f in path.iterdir())
    # Only the main rank writes, perhaps on a disk of its own; its finding is everyone's.
    if group.broadcast(free < n * one):
        raise OSError(
            errno.ENOSPC,
            f"{n} checkpoints of {size(one)} lie there at a time (keep_last {config.keep_last}), "
            f"{size(free)} are free: make room, lower keep_last or choose another out_dir",
            str(here),
        )
    return "disk", f"{n} checkpoints of {size(one)} at a time, {size(free)} free"


def available_bytes(device: torch.device) -> int:
    """Bytes that this process may still take: of a GPU less a margin, of a host this rank's share
    of what the kernel calls available, within the limits of the process's control groups."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return int(free * (1 - KEPT_FREE))
    return available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that this process can still have: the kernel's estimate, within the limits of
    its control groups and of those above them. Page cache can be given back."""
    free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", (proc / "meminfo").read_text())[1])
    groups = proc / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, V2_NAMES
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", V1_NAMES
        else:
            continue
        # In a container the path may lie outside of what is mounted: then the root is its own.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: of "max"
                most, used = (int((folder / f"memory.{name}").read_text()) for name in names[:2])
                stat = (folder / "memory.stat").read_text().split()
                cache = dict(zip(stat[::2], stat[1::2], strict=True)).get(names[2], 0)
                free = min(free, most - used + int(cache))
    return max(free, 0)


@torch.no_grad()
def measure_rates(channels: int, tokens: int, execution: Execution) -> tuple[float, float]:
    """FLOP/s of a matmul and bytes/s of a copy of the model's own sizes, the best of several."""
    if execution.device.type == "cpu":
        tokens = min(tokens, 512)  # a larger matmul may take seconds
    new = partial(torch.ones, device=execution.device, dtype=execution.dtype)
    x, weight, out = new(tokens, channels), new(channels, 4 * channels), new(tokens, 4 * channels)
    source, target = new(1 << 24), new(1 << 24)  # more than caches hold

    def best(call: Callable[[], Tensor]) -> float:
        """Seconds."""
        seconds = []
        while len(seconds) < 5 or sum(seconds) < MEASURE_S:  # the first one makes handles
            start = time.perf_counter()
            call()
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    flops = 8 * tokens * channels**2 / best(lambda: torch.mm(x, weight, out=out))
    return flops, 2 * source.nbytes / best(lambda: target.copy_(source))


def _count(tensors: Iterable[Tensor]) -> int:
    """Numbers in tensors; of those that ranks share out, in this rank's part."""
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)


def size(value: float, unit: str = "B") -> str:
    """Bytes, or another unit, in words: 3.21 GB, 12.5 MB, 83.1 GFLOP."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            value /= factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}{unit}"
    return f"{value / 1e3:.0f} k{unit}"


def describe(
    c: TrainConfig, m: GPT, data: BatchSource, tokenizer: Tokenizer, execution: Execution,
    layout: Layout, resources: Table, *, grad_accum_steps: int, first_step: int,
) -> Table:  # fmt: skip
    """Everything that follows from the options, as rows of a table; resources: of preflight()."""
    n_ranks, shape, adapters = layout.group.world_size, m.config, lora_config(m)
    tokens, flops, peak = c.max_steps * c.tokens_per_step, m.flops_per_token(), execution.peak_flops
    formula = ("6 N" if adapters is None else "4 N + 2 n") + " + 12 L C T"
    peak = f"{peak / 1e12:.1f} TFLOP/s a device" if peak else "not known"
    alone = " (one process: nothing to share out)" * (c.sharding != "none" and n_ranks == 1)
    rows = [
        ("model", f"{m.n_params():,} parameters: {shape.n_layer} layers, {shape.n_head} heads, "
         f"{shape.n_embd} wide, context {shape.block_size}, vocabulary {shape.vocab_size}"),
        ("data", f"{c.data}: {data.n_tokens:,} train tokens, {tokenizer.name} tokenizer, "
         f"{data.backend} loader"),
        ("step", f"{c.tokens_per_step:,} tokens = {n_ranks} ranks x {grad_accum_steps} micro steps "
         f"x {c.micro_batch_size} rows x {data.block_size}"),
        ("run", f"{c.max_steps:,} steps, {tokens:,} tokens, {tokens / data.n_tokens:.2f} epochs, "
         f"{tokens * flops:.2e} FLOPs"),
        ("device", execution.describe()),
        ("layout", f"sharding {c.sharding}{alone}"
         + ", activation checkpointing" * c.activation_checkpointing),
        ("kernels", m.ops.describe()),
        ("MFU", f"{flops:,} FLOPs a token ({formula}) x tokens/s / peak; peak {peak}"),
        ("run folder", str(c.folder)),
    ]  # fmt: skip
    if isinstance(data, Mixture):
        for path, epochs in data.epochs(c.max_steps, c.tokens_per_step // data.block_size).items():
            rows.append(("  of which", f"{path}: {epochs:.2f} epochs"))
    if adapters is not None:
        n = sum(p.numel() for p in layout.params)
        rows.insert(1, (
            "adapters",
            f"{n:,} parameters are trained: rank {adapters.rank}, scale {adapters.scale:g}, in "
            f"{', '.join(adapters.layers)} of every block; base {m.lora_base['path']}",
        ))  # fmt: skip
    rows += resources
    if first_step:
        rows.append(("resumed", f"from step {first_step}"))
    elif not c.init_from:
        rows.append(("first loss", f"about ln(vocabulary) = {math.log(shape.vocab_size):.2f}"))
    return rows
