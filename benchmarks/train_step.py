"""A training step of the real trainer, against plain compiled PyTorch and nanoGPT.

    python benchmarks/train_step.py                              gpt2, on a GPU
    python benchmarks/train_step.py --model gpt2 gpt2-medium gpt2-xl --nanogpt ../nanoGPT
    python benchmarks/train_step.py --model char --rows 4 --rounds 1 --device cpu
    python benchmarks/train_step.py --option exact_reduction=true   a variant of the trainer

Runs from a checkout, without installing. Every measurement is a process of its own, so that peak
memory is the contestant's and its first step is a first step: one of each contestant with empty
compile caches (cold), then rounds of one of each in turn, with the caches that the first left
(warm). A step's time is the median over all rounds, between events on the device, with no waiting
inside a round. The last round also profiles some steps. Contestants: benchmarks/baseline.py.

    MFU = tokens/s x (6 N + 12 L C T) / peak, N without position embeddings (PaLM, appendix B)

Data wait is the host's time in fetching a batch over a step's: a GPU that has work queued does not
notice it. A step's time is told by kind of kernel, from its name, and idle, when none ran. Beside
it stand floors, for M tokens a step at the ceilings that were measured in the same run:

    GEMM       6 FLOPs a token and matrix element, the padded head included
    attention  3.5 x 2 B H T^2 D FLOPs a layer: causal, forward and backward, as papers count
    norm       (2 L + 1) x 8 M C values: each reads and writes two tensors forward, and backward
    loss       the logits written over once: 2 M V values
    optimizer  32 bytes a parameter: p, g, m, v read, p, m, v written, g read for the norm

Writes train_step.json, train_step.md and train_step.png under --out.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.baseline import Setup, make, timed_steps, write_data  # noqa: E402
from gpt2.config import PRESETS, GPTConfig  # noqa: E402
from gpt2.device import Execution  # noqa: E402
from gpt2.model import GPT  # noqa: E402

ROWS = {"gpt2": 64, "gpt2-medium": 32, "gpt2-large": 16, "gpt2-xl": 16}
N_TOKENS = 20_000_000
PROFILED = 3  # steps
# Of an H200 in bf16 at T = 1024: tokens/s, and times the faster of the others. What to reach.
BARS = {"gpt2": (600e3, 1.25), "gpt2-medium": (230e3, 1.15), "gpt2-xl": (55e3, None)}
PUBLISHED = {"gpt2": 490e3}  # tokens/s of one H200: modded-nanogpt, track 3, d5098d67
# The first that matches counts: attention kernels are made of matmuls, too.
PATTERNS = {
    "attention": r"attention|attn|flash|fmha|sdpa|mha_",
    "loss": r"cross_entropy|log_?softmax|nll|logsumexp|_LossSum",
    "optimizer": r"adam|multi_tensor|foreach|lp_?norm|linalg_vector_norm|clip_?grad",
    "norm": r"layer_?norm|batch_norm",
    "GEMM": r"gemm|cublas|cutlass|nvjet|xmma|wgmma|splitk|^aten::(mm|addmm|bmm|_addmm)",
}
KINDS = ("GEMM", "attention", "norm", "loss", "optimizer", "other", "idle")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def measure(name: str, setup: Setup, steps: int, profile: bool, launched: float) -> dict:
    """One contestant in this process: its first step, then `steps` timed ones.

    launched: time.time() when the process was started.
    """
    device = torch.device(setup.device)
    contestant = make(name, setup)
    timed_steps(contestant.step, 1, device)
    record = {"launch_to_first_step_s": time.time() - launched, **contestant.details}
    timed_steps(contestant.step, 3, device)
    waited, started = contestant.waited_s, time.perf_counter()
    record["step_ms"] = timed_steps(contestant.step, steps, device)
    took = time.perf_counter() - started
    record["data_wait_share"] = (contestant.waited_s - waited) / took
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if profile:
        record["profile"] = profile_steps(contestant.step, min(PROFILED, steps), device)
    return record | {"last_loss": contestant.close()}


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    found = (k for k, pattern in PATTERNS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def profile_steps(step: Callable[[], None], n: int, device: torch.device) -> dict:
    """Runs n steps under torch.profiler: summarize() of their kernels, on a CPU of operators."""
    with torch.profiler.profile() as profile:
        timed_steps(step, n, device)
    if device.type != "cuda":
        times = [(e.key, e.self_cpu_time_total) for e in profile.key_averages()]
        return summarize([{"name": name, "ts": 0.0, "dur": us} for name, us in times], n)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return summarize([e for e in events if e.get("cat") in ON_DEVICE], n)


def summarize(events: list[dict], steps: int) -> dict:
    """From a trace's events (name, ts, dur in microseconds) to ms a step by kind, and the largest
    of kind other.
    """
    by_kind, other = dict.fromkeys(KINDS, 0.0), Counter()
    end = min((e["ts"] for e in events), default=0.0)
    for event in sorted(events, key=lambda e: e["ts"]):
        kind, ms = kind_of(event["name"]), event["dur"] / steps / 1e3
        by_kind[kind] += ms
        if kind == "other":
            other[event["name"][:100]] += ms
        # Streams overlap, so idle is what none of them covers.
        by_kind["idle"] += max(event["ts"] - end, 0.0) / steps / 1e3
        end = max(end, event["ts"] + event["dur"])
    return {"ms": by_kind, "largest_other": dict(other.most_common(8))}


def floors_ms(
    config: GPTConfig, rows: int, accum: int, n_params: int, ceilings: dict[str, float]
) -> dict[str, float]:
    """The least ms a step of each kind; see the head of this file. bf16 activations."""
    flops, per_s = ceilings["bf16_flops_per_s"], ceilings["copy_bytes_per_s"]
    C, L, V, T = config.n_embd, config.n_layer, config.padded_vocab_size, config.block_size
    tokens, value = rows * accum * T, 2
    matrices = 12 * L * C * C + V * C
    return dict.fromkeys(KINDS, 0.0) | {
        "GEMM": 1e3 * 6 * tokens * matrices / flops,
        "attention": 1e3 * 3.5 * 2 * tokens * T * C * L / flops,
        "norm": 1e3 * (2 * L + 1) * 8 * tokens * C * value / per_s,
        "loss": 1e3 * 2 * tokens * V * value / per_s,
        "optimizer": 1e3 * 32 * n_params / per_s,
    }


def in_own_process(name: str, setup: Setup, steps: int, caches: Path, profile: bool) -> dict:
    """measure() in a process with compile caches of its own. Raises ValueError where it fails."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton",
        "TRITON_INTERPRET": "0",
    }  # fmt: skip
    job = {"name": name, "setup": asdict(setup), "steps": steps, "profile": profile}
    command = [sys.executable, __file__, "--job", json.dumps(job | {"launched": time.time()})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ValueError(f"{name}: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_model(preset: str, args, ceilings: dict, folder: Path) -> dict:
    """All contestants on one model: the records, and what follows from them."""
    setup = Setup(
        preset=preset, rows=args.rows or ROWS.get(preset, 16), accum=args.accum,
        device=args.device, dtype=args.dtype, compile=args.compile, kernels=args.kernels,
        data=str(folder / preset), nanogpt=args.nanogpt, options=tuple(args.option),
    )  # fmt: skip
    write_data(Path(setup.data), setup.shape.vocab_size, args.tokens)
    wanted = {"trainer": True, "pytorch": not args.alone, "nanogpt": args.nanogpt}
    contestants: dict[str, dict] = {name: {} for name in wanted if wanted[name]}
    for turn in range(args.rounds + 1):
        for name, found in contestants.items():
            print(f"{preset} {name}: {f'round {turn}' if turn else 'cold'}", flush=True)
            caches, profile = folder / preset / name, turn == args.rounds
            try:
                add(found, in_own_process(name, setup, args.steps, caches, profile), cold=turn == 0)
            except ValueError as error:
                print(f"  failed: {error}")
                found["error"] = str(error)
    return conclude(setup, contestants, ceilings)


def add(found: dict, record: dict, cold: bool) -> None:
    """Takes a process's record into its contestant's."""
    series = {f"{'cold' if cold else 'warm'}_first_step_s": record.pop("launch_to_first_step_s")}
    times, wait = record.pop("step_ms"), record.pop("data_wait_share")
    if not cold:
        series |= {"rounds_ms": times, "data_wait_share": wait}
    found |= record
    for name, value in series.items():
        found.setdefault(name, []).append(value)


def conclude(setup: Setup, contestants: dict[str, dict], ceilings: dict) -> dict:
    """Medians, tokens/s, MFU and floors, beside the raw records."""
    with torch.device("meta"):
        model = GPT(setup.shape, "torch", "meta")
    peak = Execution(torch.device(setup.device), getattr(torch, setup.dtype)).peak_flops
    for record in contestants.values():
        if times := [ms for times in record.get("rounds_ms", []) for ms in times]:
            record["median_ms"], record["p20_ms"], record["p80_ms"] = common.spread(times)
            record["tokens_per_s"] = setup.tokens / record["median_ms"] * 1e3
            flops = record["tokens_per_s"] * model.flops_per_token()
            record["mfu"] = flops / peak if peak else None
    n = model.n_params()
    floors = floors_ms(setup.shape, setup.rows, setup.accum, n, ceilings) if ceilings else None
    return {
        "model": setup.preset, "setup": asdict(setup), "tokens_a_step": setup.tokens,
        "parameters": n, "flops_a_token": model.flops_per_token(), "peak": peak,
        "floors_ms": floors, "contestants": contestants,
    }  # fmt: skip


def report(results: list[dict]) -> str:
    """The tables, as Markdown."""
    header = [
        "model", "contestant", "ms a step", "p20..p80", "tokens/s", "MFU", "peak GB", "data wait",
        "first step cold s", "warm s",
    ]  # fmt: skip
    rows = []
    for result in results:
        for name, r in result["contestants"].items():
            if "median_ms" not in r:
                rows.append([result["model"], name, r.get("error", "not run")[:40], *[""] * 7])
                continue
            first = [r.get(f"{kind}_first_step_s") for kind in ("cold", "warm")]
            rows.append([
                result["model"], name, f"{r['median_ms']:.1f}",
                f"{r['p20_ms']:.1f}..{r['p80_ms']:.1f}", f"{r['tokens_per_s']:,.0f}",
                f"{r['mfu']:.1%}" if r["mfu"] else "n/a",
                f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "n/a",
                f"{statistics.median(r['data_wait_share']):.2%}",
                *(f"{statistics.median(seconds):.1f}" if seconds else "n/a" for seconds in first),
            ])  # fmt: skip
    tables = [common.markdown_table(header, rows), *map(kinds_table, results)]
    return "\n\n".join([*tables, "\n".join(line for r in results for line in bars(r))]).strip()


def kinds_table(result: dict) -> str:
    """Milliseconds a step by kind, beside the floors."""
    columns = {n: r["profile"]["ms"] for n, r in result["contestants"].items() if "profile" in r}
    if result["floors_ms"]:
        columns["floor"] = result["floors_ms"]
    rows = [[kind, *(f"{ms[kind]:.2f}" for ms in columns.values())] for kind in KINDS]
    rows.append(["all", *(f"{sum(ms.values()):.2f}" for ms in columns.values())])
    return common.markdown_table([f"{result['model']}: ms a step", *columns], rows)


def bars(result: dict) -> list[str]:
    """Each of the bars with what was measured; they are for one H200 in bf16."""
    model, setup, ours = result["model"], result["setup"], result["contestants"].get("trainer", {})
    on_gpu = torch.device(setup["device"]).type == "cuda"
    if not (model in BARS and "median_ms" in ours and on_gpu and setup["dtype"] == "bfloat16"):
        return []
    others = [r for n, r in result["contestants"].items() if n != "trainer" and "median_ms" in r]
    tokens_per_s, ratio = BARS[model]
    found = [("tokens/s", ours["tokens_per_s"], ">=", tokens_per_s, ",.0f")]
    if model in PUBLISHED:
        times = ours["tokens_per_s"] / PUBLISHED[model]
        name = f"times the {PUBLISHED[model]:,.0f} tokens/s of modded-nanogpt's one H200"
        found.append((name, times, ">=", 1.0, ".2f"))
    if others and ratio is not None:
        times = ours["tokens_per_s"] / max(r["tokens_per_s"] for r in others)
        found.append(("times the fastest other", times, ">=", ratio, ".2f"))
    if others and model == "gpt2":
        part = ours["peak_bytes"] / min(r["peak_bytes"] for r in others)
        found.append(("of the least other peak", part, "<=", 0.6, ".2f"))
    found.append(("data wait", statistics.median(ours["data_wait_share"]), "<=", 0.01, ".2%"))
    for kind, bar in (("cold", 60.0), ("warm", 15.0)):
        if seconds := ours.get(f"{kind}_first_step_s"):
            found.append((f"first step {kind}, s", statistics.median(seconds), "<=", bar, ".1f"))
    return [
        f"{model}: {what} {value:{form}}, bar {sign} {bar:{form}}: "
        + ("met" if (value >= bar if sign == ">=" else value <= bar) else "NOT met")
        for what, value, sign, bar, form in found
    ]


def parse() -> argparse.Namespace:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", nargs="+", default=["gpt2"], choices=PRESETS)
    parser.add_argument("--rows", type=int, help="of one forward pass; default: by model")
    parser.add_argument("--accum", type=int, default=4, help="forward passes a step")
    parser.add_argument("--steps", type=int, default=10, help="timed, in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of the random data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", default=None)
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "cpp", "torch"])
    parser.add_argument("--option", action="append", default=[], help="of the trainer, NAME=VALUE")
    parser.add_argument("--nanogpt", default="", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--alone", action="store_true", help="the trainer without the others")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.compile = on_gpu if args.compile is None else args.compile
    return args


def main() -> None:
    args = parse()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(measure(**job | {"setup": Setup(**job["setup"])})))
        return
    ceilings = {}
    if torch.device(args.device).type == "cuda":
        ceilings = common.measure_ceilings()
        torch.cuda.empty_cache()
    else:
        print("on a CPU: MFU, idle time, floors and bars are not applicable")
    with tempfile.TemporaryDirectory() as folder:
        results = [measure_model(m, args, ceilings, Path(folder)) for m in args.model]
    text, panels = report(results), {}
    print(f"\n{text}\n\nMFU = tokens/s x (6 N + 12 L C T) / peak; T = the model's block_size")
    for result in results:
        peak = f"{result['peak'] / 1e12:.1f} TFLOP/s" if result["peak"] else "not known here"
        print(f"{result['model']}: {result['flops_a_token']:,} FLOPs a token, peak {peak}")
        timed = {n: r for n, r in result["contestants"].items() if "median_ms" in r}
        panels[result["model"]] = bar_of = {n: r["median_ms"] for n, r in timed.items()}
        if result["floors_ms"]:
            bar_of["floor"] = sum(result["floors_ms"].values())
    found = {"ceilings": ceilings, "results": results}
    common.write_results(args.out, "train_step", text, found)
    common.draw_bars(args.out / "train_step.png", panels, "ms a step", ours=("trainer",))


if __name__ == "__main__":
    main()
