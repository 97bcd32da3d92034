"""Where a training step's time goes, by kind of kernel, and the least that each kind could take.

The kinds: GEMM, attention, norm, loss, optimizer, other, and idle, when no kernel ran. A kernel's
kind comes from its name; "other" lists its largest by name, so that nothing hides there.

Floors, for M tokens a step, N trained parameters, at the ceilings that were measured in the same
run (a large copy, a large bf16 matmul):

    GEMM       6 FLOPs a token and matrix element, the padded head included
    attention  3.5 x 2 B H T^2 D FLOPs a layer: causal, forward and backward, as papers count
    norm       (2 L + 1) x 8 M C values: each reads and writes two tensors forward, and backward
    loss       the logits written over once: 2 M V values
    optimizer  32 bytes a parameter: p, g, m, v read, p, m, v written, g read for the norm
    other      none: all of it could be fused into something else

The product of heads and D is C. Sources: the floors of benchmarks/kernels.py.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2.config import GPTConfig

KINDS = ("GEMM", "attention", "norm", "loss", "optimizer", "other", "idle")
# The first that matches counts: attention kernels are made of matmuls, too.
PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("attention", r"attention|attn|flash|fmha|sdpa|mha_"),
        ("loss", r"cross_entropy|log_?softmax|nll|logsumexp"),
        ("optimizer", r"adam|multi_tensor|foreach|lp_?norm|linalg_vector_norm|clip_?grad"),
        ("norm", r"layer_?norm|batch_norm"),
        ("GEMM", r"gemm|cublas|cutlass|nvjet|xmma|wgmma|splitk|^aten::(mm|addmm|bmm|_addmm)"),
    )
)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(name)), "other")


def profile_steps(step: Callable[[], None], n: int, device: torch.device) -> dict:
    """Runs n steps under torch.profiler.

    Returns ms a step by kind, and the largest kernels of "other" with theirs. On a CPU operators
    stand for kernels, and idle is 0.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(n):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return summarize([e for e in events if e.get("cat") in ON_DEVICE], n)
    averages = profile.key_averages()
    times = [(e.key, e.self_cpu_time_total) for e in averages]
    return _summary(times, idle_us=0.0, steps=n)


def summarize(events: list[dict], steps: int) -> dict:
    """From a trace's device events (name, ts, dur in microseconds) to ms a step by kind."""
    times = [(e["name"], e["dur"]) for e in events]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    idle, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:  # streams overlap, so the union counts
        idle += max(start - end, 0.0)
        end = max(end, stop)
    return _summary(times, idle, steps)


def _summary(times: list[tuple[str, float]], idle_us: float, steps: int) -> dict:
    by_kind = dict.fromkeys(KINDS, 0.0)
    other: Counter[str] = Counter()
    for name, us in times:
        kind = kind_of(name)
        by_kind[kind] += us
        if kind == "other":
            other[name] += us
    by_kind["idle"] = idle_us
    return {
        "ms": {kind: us / steps / 1e3 for kind, us in by_kind.items()},
        "largest_other": {name[:100]: us / steps / 1e3 for name, us in other.most_common(8)},
    }


def floors_ms(
    config: GPTConfig, rows: int, accum: int, n_params: int, ceilings: dict[str, float]
) -> dict[str, float]:
    """The least milliseconds a step of each kind; see the head of this file. bf16 activations."""
    flops, per_s = ceilings["bf16_flops_per_s"], ceilings["copy_bytes_per_s"]
    C, L, V, T = config.n_embd, config.n_layer, config.padded_vocab_size, config.block_size
    tokens, value = rows * accum * T, 2
    matrices = 12 * L * C * C + V * C
    seconds = {
        "GEMM": 6 * tokens * matrices / flops,
        "attention": 3.5 * 2 * rows * accum * T * T * C * L / flops,
        "norm": (2 * L + 1) * 8 * tokens * C * value / per_s,
        "loss": 2 * tokens * V * value / per_s,
        "optimizer": 32 * n_params / per_s,
        "other": 0.0,
        "idle": 0.0,
    }
    return {kind: 1e3 * s for kind, s in seconds.items()}


def draw(results: list[dict], path: Path) -> None:
    """A bar for each profiled contestant and one for the floors, a group for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars: list[tuple[str, dict[str, float]]] = []
    for model in results:
        for name, record in model["contestants"].items():
            if record.get("profile"):
                bars.append((f"{model['model']}\n{name}", record["profile"]["ms"]))
        if model.get("floors_ms"):
            bars.append((f"{model['model']}\nfloor", model["floors_ms"]))
    if not bars:
        return
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(bars)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ("#2b6cb0", "#dd6b20", "#38a169", "#c53030", "#805ad5", "#718096", "#e2e8f0")
    for row, (_, ms) in enumerate(bars):
        left = 0.0
        for kind, color in zip(KINDS, colors, strict=True):
            axes.barh(row, ms[kind], left=left, color=color, label=kind if row == 0 else None)
            left += ms[kind]
        axes.text(left, row, f" {left:.1f} ms", va="center")
    axes.set(xlabel="ms a step", yticks=range(len(bars)))
    axes.set_yticklabels([label for label, _ in bars])
    axes.set_xlim(0, 1.15 * max(sum(ms.values()) for _, ms in bars))
    axes.invert_yaxis()
    axes.legend(ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
