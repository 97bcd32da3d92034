"""A training step of the real trainer, against plain compiled PyTorch and nanoGPT.

    python benchmarks/train_step.py                              gpt2, on a GPU
    python benchmarks/train_step.py --model gpt2 gpt2-medium gpt2-xl --nanogpt ../nanoGPT
    python benchmarks/train_step.py --model char --rows 4 --rounds 1 --device cpu
    python benchmarks/train_step.py --option exact_reduction=true   a variant of the trainer

Runs from a checkout, without installing. Every measurement is a process of its own, so that peak
memory is the contestant's and its first step is a first step. First one of each contestant with
empty compile caches (cold), then rounds of one of each in turn, with the caches that the first left
(warm). A step's time is the median over all rounds; it is taken between events on the device, with
no waiting inside a round. The last round's processes also profile some steps.

    MFU = tokens/s x (6 N + 12 L C T) / peak, N without position embeddings (PaLM, appendix B)

Data wait is the host's time in fetching a batch over a step's: a GPU that has work queued does not
notice it. Contestants: benchmarks/baseline.py. Kinds and floors: benchmarks/step_profile.py.
Writes train_step.json, train_step.md and train_step.png under --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from benchmarks.baseline import Setup, make, timed_steps, write_data  # noqa: E402
from benchmarks.step_profile import KINDS, draw, floors_ms, profile_steps  # noqa: E402
from gpt2.config import PRESETS  # noqa: E402
from gpt2.dist import peak_flops  # noqa: E402
from gpt2.model import GPT  # noqa: E402

ROWS = {"gpt2": 64, "gpt2-medium": 32, "gpt2-large": 16, "gpt2-xl": 16}
N_TOKENS = 20_000_000
PROFILED = 3  # steps
# Of an H200 in bf16 at T = 1024: tokens/s, and times the faster of the others. What to reach.
BARS = {"gpt2": (600e3, 1.25), "gpt2-medium": (230e3, 1.15), "gpt2-xl": (55e3, None)}


def measure(name: str, setup: Setup, steps: int, profile: bool, launched: float) -> dict:
    """One contestant in this process: its first step, then `steps` timed ones.

    launched: time.time() when the process was started.
    """
    device = torch.device(setup.device)
    contestant = make(name, setup)
    started = time.time()
    timed_steps(contestant.step, 1, device)
    now = time.time()
    record = {
        "launch_to_first_step_s": now - launched, "first_step_s": now - started,
        **contestant.details,
    }  # fmt: skip
    timed_steps(contestant.step, 3, device)
    waited = contestant.waited_s
    wall = time.perf_counter()
    record["step_ms"] = timed_steps(contestant.step, steps, device)
    wall = time.perf_counter() - wall
    record["data_wait_share"] = (contestant.waited_s - waited) / wall
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        record["reserved_bytes"] = torch.cuda.max_memory_reserved()
    if profile:
        record["profile"] = profile_steps(contestant.step, min(PROFILED, steps), device)
    record["last_loss"] = contestant.close()
    return record


def in_own_process(name: str, setup: Setup, args, caches: Path, profile: bool) -> dict:
    """measure() in a process with compile caches of its own. Raises ValueError where it fails."""
    environment = dict(
        os.environ, TORCHINDUCTOR_CACHE_DIR=str(caches / "inductor"),
        TRITON_CACHE_DIR=str(caches / "triton"),
    )  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    out = caches / "record.json"
    out.unlink(missing_ok=True)
    job = {"name": name, "setup": asdict(setup), "steps": args.steps, "profile": profile}
    command = [sys.executable, __file__, "--job", json.dumps(job | {"launched": time.time()})]
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True
    )
    if done.returncode or not out.exists():
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ValueError(f"{name}: {reason[0]}")
    return json.loads(out.read_text())


def measure_model(preset: str, args, ceilings: dict, folder: Path) -> dict:
    """All contestants on one model: the records, and what follows from them."""
    setup = Setup(
        preset=preset, rows=args.rows or ROWS.get(preset, 16), accum=args.accum,
        device=args.device, dtype=args.dtype, compile=args.compile, kernels=args.kernels,
        data=str(folder / preset), nanogpt=args.nanogpt, options=tuple(args.option),
    )  # fmt: skip
    write_data(Path(setup.data), setup.shape.vocab_size, args.tokens)
    names = ["trainer", *(["pytorch"] if not args.alone else [])]
    names += ["nanogpt"] if args.nanogpt else []
    contestants: dict[str, dict] = {}
    for turn in range(args.rounds + 1):
        for name in names:
            print(f"{preset} {name}: {f'round {turn}' if turn else 'cold'}", flush=True)
            caches = folder / preset / name
            caches.mkdir(parents=True, exist_ok=True)
            try:
                record = in_own_process(name, setup, args, caches, turn == args.rounds)
            except ValueError as error:
                print(f"  failed: {error}")
                contestants.setdefault(name, {})["error"] = str(error)
                continue
            add(contestants.setdefault(name, {}), record, cold=turn == 0)
    return conclude(setup, contestants, ceilings)


def add(all_: dict, record: dict, cold: bool) -> None:
    """Takes a process's record into its contestant's."""
    kind = "cold" if cold else "warm"
    for key in ("launch_to_first_step_s", "first_step_s"):
        all_.setdefault(f"{kind}_{key}", []).append(record.pop(key))
    times, wait = record.pop("step_ms"), record.pop("data_wait_share")
    if not cold:
        all_.setdefault("rounds_ms", []).append(times)
        all_.setdefault("data_wait_share", []).append(wait)
    all_.update(record)


def conclude(setup: Setup, contestants: dict[str, dict], ceilings: dict) -> dict:
    """Medians, tokens/s, MFU and floors, beside the raw records."""
    with torch.device("meta"):
        model = GPT(setup.shape, "torch", "meta")
    peak = peak_flops(torch.device(setup.device), getattr(torch, setup.dtype))
    for record in contestants.values():
        times = sorted(t for times in record.get("rounds_ms", []) for t in times)
        if not times:
            continue
        record["median_ms"] = statistics.median(times)
        record["p20_ms"], record["p80_ms"] = (times[int(q * (len(times) - 1))] for q in (0.2, 0.8))
        record["tokens_per_s"] = setup.tokens / record["median_ms"] * 1e3
        flops = record["tokens_per_s"] * model.flops_per_token()
        record["mfu"] = flops / peak if peak else None
    result = {
        "model": setup.preset, "setup": asdict(setup), "tokens_a_step": setup.tokens,
        "parameters": model.n_params(), "flops_a_token": model.flops_per_token(), "peak": peak,
        "contestants": contestants,
    }  # fmt: skip
    if ceilings:
        result["floors_ms"] = floors_ms(
            setup.shape, setup.rows, setup.accum, model.n_params(), ceilings
        )
    return result


def report(results: list[dict]) -> str:
    """The tables, as Markdown."""
    header = [
        "model", "contestant", "ms a step", "p20..p80", "tokens/s", "MFU", "peak GB", "data wait",
        "first step cold s", "warm s",
    ]  # fmt: skip
    rows, notes = [], []
    for result in results:
        for name, r in result["contestants"].items():
            if "median_ms" not in r:
                rows.append([result["model"], name, r.get("error", "not run")[:40], *[""] * 7])
                continue
            warm = r.get("warm_launch_to_first_step_s", [])
            rows.append([
                result["model"], name, f"{r['median_ms']:.1f}",
                f"{r['p20_ms']:.1f}..{r['p80_ms']:.1f}", f"{r['tokens_per_s']:,.0f}",
                f"{r['mfu']:.1%}" if r["mfu"] else "n/a",
                f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "n/a",
                f"{statistics.median(r['data_wait_share']):.2%}",
                f"{r['cold_launch_to_first_step_s'][0]:.1f}"
                if "cold_launch_to_first_step_s" in r else "n/a",
                f"{statistics.median(warm):.1f}" if warm else "n/a",
            ])  # fmt: skip
        notes += bars(result)
    text = [common.markdown_table(header, rows), ""]
    text += [kinds_table(result) for result in results]
    if notes:
        text += ["", *notes]
    return "\n".join(text)


def kinds_table(result: dict) -> str:
    """Milliseconds a step by kind, beside the floors."""
    profiled = {n: r["profile"] for n, r in result["contestants"].items() if r.get("profile")}
    floors = result.get("floors_ms")
    header = [f"{result['model']}: ms a step", *profiled, *(["floor"] if floors else [])]
    rows = []
    for kind in (*KINDS, "all"):
        parts = KINDS if kind == "all" else (kind,)
        values = [sum(p["ms"][k] for k in parts) for p in profiled.values()]
        row = [kind, *(f"{value:.2f}" for value in values)]
        rows.append(row + ([f"{sum(floors[k] for k in parts):.2f}"] if floors else []))
    return "\n" + common.markdown_table(header, rows)


def bars(result: dict) -> list[str]:
    """Each of the bars with what was measured; they are for one H200 in bf16."""
    ours = result["contestants"].get("trainer", {})
    others = {n: r for n, r in result["contestants"].items() if n != "trainer" and "median_ms" in r}
    setup = result["setup"]
    if result["model"] not in BARS or "median_ms" not in ours or setup["dtype"] != "bfloat16":
        return []
    if torch.device(setup["device"]).type != "cuda":
        return []
    tokens_per_s, ratio = BARS[result["model"]]
    checks = [("tokens/s", ours["tokens_per_s"], tokens_per_s, True, ",.0f")]
    if others and ratio is not None:
        best = max(r["tokens_per_s"] for r in others.values())
        checks.append(("times the fastest other", ours["tokens_per_s"] / best, ratio, True, ".2f"))
    if others and result["model"] == "gpt2":
        least = min(r["peak_bytes"] for r in others.values())
        checks.append(("of the least other peak", ours["peak_bytes"] / least, 0.6, False, ".2f"))
    wait = statistics.median(ours["data_wait_share"])
    checks.append(("data wait", wait, 0.01, False, ".2%"))
    for kind, bar in (("cold", 60.0), ("warm", 15.0)):
        if seconds := ours.get(f"{kind}_launch_to_first_step_s"):
            checks.append((f"first step {kind}, s", statistics.median(seconds), bar, False, ".1f"))
    return [
        f"{result['model']}: {what} {value:{form}}, bar {'>=' if up else '<='} {bar:{form}}: "
        f"{'met' if (value >= bar) == up or value == bar else 'NOT met'}"
        for what, value, bar, up, form in checks
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["gpt2"], choices=PRESETS)
    parser.add_argument("--rows", type=int, help="of one forward pass; default: by model")
    parser.add_argument("--accum", type=int, default=4, help="forward passes a step")
    parser.add_argument("--steps", type=int, default=10, help="timed, in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of the random data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", default=None)
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "torch"])
    parser.add_argument("--option", action="append", default=[], help="of the trainer, NAME=VALUE")
    parser.add_argument("--nanogpt", default="", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--alone", action="store_true", help="the trainer without the others")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results"))
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
        setup = Setup(**job["setup"])
        setup = replace(setup, options=tuple(setup.options))
        record = measure(job["name"], setup, job["steps"], job["profile"], job["launched"])
        common.write_json(Path(args.out), record)
        return
    on_gpu = torch.device(args.device).type == "cuda"
    ceilings = common.measure_ceilings() if on_gpu else {}
    if on_gpu:
        torch.cuda.empty_cache()
    else:
        print("on a CPU: MFU, peak memory, idle time, floors and bars are not applicable")
    with tempfile.TemporaryDirectory() as folder:
        results = [measure_model(m, args, ceilings, Path(folder)) for m in args.model]
    out = Path(args.out)
    text = report(results)
    print(f"\n{text}\n\nMFU = tokens/s x (6 N + 12 L C T) / peak; T = the model's block_size")
    for result in results:
        peak = f"{result['peak'] / 1e12:.1f} TFLOP/s" if result["peak"] else "not known here"
        print(f"{result['model']}: {result['flops_a_token']:,} FLOPs a token, peak {peak}")
    common.write_json(
        out / "train_step.json", common.provenance() | {"ceilings": ceilings, "results": results}
    )
    (out / "train_step.md").write_text(text + "\n")
    draw(results, out / "train_step.png")
    print(f"results: {out / 'train_step.json'}, .md and .png")


if __name__ == "__main__":
    main()
